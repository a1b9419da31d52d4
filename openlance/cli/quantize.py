"""The command that writes a checkpoint with its weights in fewer bits."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional

from openlance.cli.options import option
from openlance.errors import InputError

if TYPE_CHECKING:
    import torch

    from openlance.model.quantize import Scheme
    from openlance.model.release import Release

SHARD_BYTES = 2 * 10**9
"""Small files: quantised tensors are copied once more while a file is written."""


def quantize(
    model: Annotated[Positional[str], option("As --model of other commands.")],
    *,
    to: Annotated[Path, option("Folder to write, in the released layout.")],
    scheme: Annotated[
        str, option("int8, fp8 or int4 for both experts, or by part: und=int8,gen=fp8,vision=int8.")
    ] = "int8",
    variant: Annotated[str | None, option("Lance_3B or Lance_3B_Video, where both are there.")] = None,
    device: Annotated[
        str | None, option("cpu, cuda or mps. int4 is saved from cuda only. Default: the best there is.")
    ] = None,
) -> None:
    """Write a model with the weights of its layers in fewer bits; --model then takes its folder.

    Results are those of `--quantize` when loading, bit for bit; the folder is smaller, and is read faster.

    For example:
      openlance quantize ./Lance --to ./Lance-int8
      openlance quantize ./Lance --to ./Lance-small --scheme und=int8,gen=fp8 --variant Lance_3B_Video
    """
    from openlance.infer.device import pick_device
    from openlance.model.checkpoint import find_release
    from openlance.model.quantize import choose_schemes

    place = pick_device(device)
    schemes = choose_schemes(scheme, place)
    release = find_release(model, variant)
    if to.expanduser().resolve() == release.root.resolve():
        raise InputError(f"--to {to}: this is the model's own folder; choose another")
    _write(release, to.expanduser(), schemes, place)
    before, after = (_weight(found) / 1e9 for found in (release, find_release(to, release.variant)))
    print(f"{to}: {after:.3g} GB of network weights; {before:.3g} GB before")


def _write(release: Release, to: Path, schemes: Mapping[str, Scheme], device: torch.device) -> None:
    """All parts of the network, the rest of it in the dtype that the release names; the VAE as it is."""
    import torch

    from openlance.model.checkpoint import load_model, read_config, save_pretrained
    from openlance.model.release import LLM_CONFIG, read_json
    from openlance.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(release.folder)
    config = read_config(release, tokenizer)
    name = read_json(release.folder / LLM_CONFIG).get("torch_dtype", "bfloat16")
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"{release.folder / LLM_CONFIG}: torch_dtype must name a dtype, not {name!r}")
    network = load_model(release, config, device=device, dtype=dtype, quantize=schemes)
    to.mkdir(parents=True, exist_ok=True)
    if release.vae is not None:
        shutil.copyfile(release.vae, to / release.vae.name)
    save_pretrained(
        to,
        model=network,
        vae=None,
        tokenizer=tokenizer,
        config=config,
        variant=release.variant,
        shard_bytes=SHARD_BYTES,
    )


def _weight(release: Release) -> int:
    """Bytes of the network's files, the ViT's included."""
    vit = [] if release.vit is None else release.vit.glob("*.safetensors")
    return sum(path.stat().st_size for path in (*release.weights, *vit))
