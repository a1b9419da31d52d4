"""A new Lance from a Qwen2.5-VL checkpoint in transformers' layout.

The und expert, embeddings and vision tower are the checkpoint's; the gen expert starts as a copy of the und
expert. QK norms and everything about latents and time are new.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig

from openlance.config import ModelConfig, lance_3b
from openlance.errors import InputError
from openlance.model.checkpoint import Stored, fill, open_tensors
from openlance.model.hub import find_folder
from openlance.model.lance import Lance
from openlance.model.names import PARTS, VISION, part_of, to_ours, to_released
from openlance.model.release import (
    VISION_KEYS,
    Release,
    check_config,
    read_backbone,
    read_fields,
    read_json,
    weight_files,
)
from openlance.tokenizer import Tokenizer

FILES = ["*.json", "*.safetensors", "merges.txt"]  # what is wanted of a repository on the hub

# What parameter names begin with -> with what the same names begin in a release of Lance.
MODEL, HEAD = "language_model.model.", "language_model.lm_head."
FILE_LAYOUT = {"model.": MODEL, "lm_head.": HEAD, "visual.": VISION}  # what transformers writes
MODULE_LAYOUT = {"model.language_model.": MODEL, "lm_head.": HEAD, "model.visual.": VISION}  # its own modules

NEW = re.compile(r"(latent_in|latent_out|time_embed)\..+|.+\.[qk]_norm\.weight")  # names that Qwen lacks
# Variants of Qwen2.5-VL that our backbone does not compute are refused.
COMPUTED = {"hidden_act": "silu", "use_sliding_window": False, "rope_type": "default"}


def from_qwen(
    source: str | Path,
    *,
    base: ModelConfig | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    parts: Iterable[str] = PARTS,
    seed: int = 0,
) -> tuple[Lance, ModelConfig, Tokenizer]:
    """The network to start training from, its configuration, and the checkpoint's tokenizer.

    source: a folder with config.json, safetensors (one file or shards) and tokenizer, or a Hugging Face id.
    base: all that the checkpoint does not say (VAE, MaPE, sampling, sizes, whether there are QK norms).
        Default the released settings, but with ViT tokens moved in understanding too, as in training.
    seed: of what is drawn (see `new_parameter`); the same on every device.
    Raises InputError naming the file and the setting, or the parameters that are missing, surplus,
        misshapen or not finite.
    """
    folder = find_folder(source, FILES)
    parts = frozenset(parts)
    tokenizer = Tokenizer.load(folder)
    config, tied = _read_config(folder, _new_lance() if base is None else base)
    config = replace(config, tokens=tokenizer.special)
    check_config(config, tokenizer, Release(folder, folder.name, folder, (), None, None))
    with torch.device("meta"):
        model = Lance(config, parts)
    with ExitStack() as files:
        found = {key: t for path in weight_files(folder) for key, t in open_tensors(path, files).items()}
        layout = _layout(found)
        origins = _origins(model, tied=tied and "lm_head.weight" not in found)
        stored = _inherited(found, layout, parts)
        stored |= {name: stored[origin] for name, origin in origins.items() if origin in stored}
        stored |= _new_parameters(model, folder, seed)
        fill(model, stored, device, dtype, folder, lambda name: _key(origins.get(name, name), layout))
    return model, config, tokenizer


def new_parameter(name: str, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """The first value of a parameter that Qwen2.5-VL does not have.

    QK norms are one. Latents and time start as in DiT (arXiv 2212.09748): Xavier-uniform for the input,
    Normal(0, 0.02) for the time embedder, zero for biases and for the output. So the velocity starts at
    zero, and its first gradients go to the output alone, not through a random one into the copied expert.
    """
    value = torch.zeros(shape)
    if name.endswith("_norm.weight"):
        return value.fill_(1)
    if name == "latent_in.weight":
        return nn.init.xavier_uniform_(value, generator=rng)
    if name.startswith("time_embed.") and name.endswith("weight"):
        return nn.init.normal_(value, std=0.02, generator=rng)
    return value


def _new_lance() -> ModelConfig:
    base = lance_3b()
    return replace(base, name="lance", mape=replace(base.mape, shift_understanding=True))


def _read_config(folder: Path, base: ModelConfig) -> tuple[ModelConfig, bool]:
    """`base` with the checkpoint's shapes, and whether its output embedding is the input embedding.

    transformers reads the file: it knows the older forms and the values that go without saying.
    """
    file = folder / "config.json"
    data = read_json(file)
    if data.get("model_type") != "qwen2_5_vl":
        raise InputError(f"{file}: model_type must be qwen2_5_vl, not {data.get('model_type')!r}")
    try:
        qwen = Qwen2_5_VLConfig.from_dict(data)
    except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: not settings of Qwen2.5-VL ({' '.join(str(error).split())})") from error
    text, vision = qwen.text_config.to_dict(), qwen.vision_config.to_dict()
    rope = text["rope_parameters"]
    for name, value in COMPUTED.items():
        given = (text | rope)[name]
        if given != value:
            raise InputError(f"{file}: {name} must be {value}, not {given!r}")
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": rope}
    config = replace(
        base,
        backbone=read_backbone(text, file, base.backbone),
        vision=read_fields(base.vision, vision, VISION_KEYS, file, required=True),
    )
    return config, qwen.tie_word_embeddings


def _layout(keys: Iterable[str]) -> dict[str, str]:
    """Which of the two layouts the names are in."""
    is_modules = any(key.startswith(("model.language_model.", "model.visual.")) for key in keys)
    return MODULE_LAYOUT if is_modules else FILE_LAYOUT


def _name(key: str, layout: Mapping[str, str]) -> str | None:
    """Our name of a parameter of the checkpoint; None where it is not one that we take over."""
    for theirs, released in layout.items():
        if key.startswith(theirs):
            name = to_ours(released + key.removeprefix(theirs))
            return None if name is None or NEW.fullmatch(name) or part_of(name) == "gen" else name
    return None


def _key(name: str, layout: Mapping[str, str]) -> str:
    """The checkpoint's name of one of our parameters."""
    key = to_released(name) or name
    for theirs, released in layout.items():
        if key.startswith(released):
            return theirs + key.removeprefix(released)
    return key


def _origins(model: nn.Module, tied: bool) -> dict[str, str]:
    """Our parameters that start as a copy -> our name of what is copied."""
    names = [name for name, _ in model.named_parameters()]
    copies = {name: name.replace(".gen.", ".und.") for name in names if ".gen." in name}
    return copies | ({"head.weight": "embed.weight"} if tied else {})


def _inherited(
    found: Mapping[str, Stored], layout: Mapping[str, str], parts: frozenset[str]
) -> dict[str, Stored]:
    """Our name -> tensor of the checkpoint, of the parts wanted; names that we lack stand as they are."""
    named = {_name(key, layout) or key: tensor for key, tensor in found.items()}
    return {
        name: tensor for name, tensor in named.items() if part_of(name) in parts or to_released(name) is None
    }


def _new_parameters(model: nn.Module, folder: Path, seed: int) -> dict[str, Stored]:
    """Our name -> what `new_parameter` gives when read; drawn in the order of the model's parameters."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if NEW.fullmatch(name)}
    return {
        name: Stored(folder, name, shape, partial(new_parameter, name, shape, rng))
        for name, shape in shapes.items()
    }
