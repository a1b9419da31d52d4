"""A checkpoint from disk, where its plan for memory wants it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from openlance.config import ModelConfig
from openlance.infer.device import pick_device
from openlance.infer.orders import PARTS_OF, override
from openlance.infer.plan import Plan, plan_for
from openlance.infer.prepare import sizes_of, square_side
from openlance.model.adapters import WEIGHTS, find_adapter
from openlance.model.checkpoint import find_release, load_model, load_vae, read_config
from openlance.model.lance import Lance
from openlance.model.quantize import Quantize, choose_schemes, schemes_in
from openlance.model.release import Release
from openlance.model.vae import VAE
from openlance.sequence.template import Task
from openlance.tokenizer import Tokenizer

BLOCKS, BLOCK = 1024, 4096  # of a file, for a fingerprint


@dataclass(frozen=True, eq=False)
class Loaded:
    """A checkpoint; device: that it is to compute on. Where the plan moves weights, they are on the host."""

    model: Lance
    tokenizer: Tokenizer
    vae: VAE | None
    device: torch.device
    plan: Plan | None


def load(
    source: str | Path,
    variant: str | None,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    tasks: Sequence[Task] | None,
    sizes: Mapping[str, Any] | None,
    quantize: Quantize | None,
    max_memory: str | int | None,
    largest: Mapping[str, Any] | None,
) -> Loaded:
    """The arguments are those of `LancePipeline.from_pretrained`. Raises InputError."""
    device = pick_device(device)
    schemes = choose_schemes(quantize, device)
    dtype = (torch.float32 if device.type == "cpu" else torch.bfloat16) if dtype is None else dtype
    tasks = tasks or list(Task)
    parts = _parts(tasks)
    release = find_release(source, variant, parts)
    tokenizer = Tokenizer.load(release.folder)
    config = read_config(release, tokenizer)
    config = replace(config, sizes=override(config.sizes, sizes or {}))
    stored = schemes_in(_weights(release, parts))
    plan = plan_for(_asked(config, largest or {}), tasks, dtype, device, max_memory, {**stored, **schemes})
    home = device if plan is None or plan.resident else torch.device("cpu")
    vae = load_vae(release, config, device=home, dtype=dtype) if "vae" in parts else None
    model = load_model(release, config, device=home, dtype=dtype, parts=parts - {"vae"}, quantize=schemes)
    return Loaded(model, tokenizer, vae, device, plan)


def fingerprint(
    source: str | Path, variant: str | None, tasks: Sequence[Task], adapter: str | Path | None = None
) -> str:
    """Tells the weights that these tasks load from others, without reading them whole: a hash of each file's
    length and of blocks from its beginning to its end. Raises InputError where there is no such release."""
    parts = _parts(tasks)
    release = find_release(source, variant, parts)
    files = _weights(release, parts)
    if "vae" in parts and release.vae is not None:
        files.append(release.vae)
    if adapter is not None:
        files.append(find_adapter(adapter) / WEIGHTS)
    digest = hashlib.sha256()
    for file in filter(Path.is_file, files):  # what is lacking is said where it is loaded
        size = file.stat().st_size
        digest.update(f"{size}\n".encode())
        with file.open("rb") as stream:
            for block in range(BLOCKS):
                stream.seek(size * block // BLOCKS)
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()[:16]


def _parts(tasks: Sequence[Task]) -> frozenset[str]:
    return frozenset().union(*(PARTS_OF[task] for task in tasks))


def _asked(config: ModelConfig, largest: Mapping[str, Any]) -> ModelConfig:
    """The configuration as if requests were of this kind by default; see `LancePipeline.from_pretrained`."""
    sizes: dict[str, Any] = {}
    if largest.get("source") is not None:
        sizes = sizes_of(largest["source"], config)
    if largest.get("size") is not None:  # what cannot be is refused when it is ordered
        side = square_side(largest["size"], config)
        sizes |= {"image": side, "video": side}
    if (largest.get("frames") or 0) > 0:
        sizes["frames"] = largest["frames"]
    sampling = {name: largest[name] for name in ("reuse", "reuse_order") if largest.get(name) is not None}
    return replace(config, sizes=override(config.sizes, sizes), sampling=override(config.sampling, sampling))


def _weights(release: Release, parts: frozenset[str]) -> list[Path]:
    """The files that may hold quantised weights of these parts."""
    look = release.vit if "vision" in parts else None
    files = [*release.weights, *([] if look is None else sorted(look.iterdir()))]
    return [file for file in files if file.suffix == ".safetensors"]
