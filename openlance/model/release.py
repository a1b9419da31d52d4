"""The released folder layout: where its files are, and its configuration both ways.

Lance_3B/ or Lance_3B_Video/   llm_config.json, model.safetensors (or shards and an index), tokenizer files
Qwen2.5-VL-ViT/                config.json, vit.safetensors
Wan2.2_VAE.safetensors or .pth, and optionally Wan2.2_VAE.config.json
openlance.json                 optional: what the released layout keeps in code (`OWN_FIELDS`)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from openlance.config import BackboneConfig, ModelConfig, VAEConfig, lance_3b
from openlance.errors import InputError
from openlance.tokenizer import Tokenizer

LLM_CONFIG = "llm_config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
VIT_FOLDER = "Qwen2.5-VL-ViT"
VIT_WEIGHTS = "vit.safetensors"
VAE_FILES = ("Wan2.2_VAE.safetensors", "Wan2.2_VAE.pth")
VAE_CONFIG = "Wan2.2_VAE.config.json"
OWN_CONFIG = "openlance.json"
DEFAULT_VARIANT = "Lance_3B"

# Released configuration key -> our field.
BACKBONE_KEYS = {
    "hidden_size": "hidden", "num_hidden_layers": "layers", "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads", "intermediate_size": "mlp", "vocab_size": "vocab",
    "rms_norm_eps": "norm_eps", "rope_theta": "rope_base",
}  # fmt: skip
VISION_KEYS = {
    "depth": "depth", "hidden_size": "hidden", "num_heads": "heads", "intermediate_size": "mlp",
    "out_hidden_size": "out_hidden", "patch_size": "patch", "temporal_patch_size": "temporal_patch",
    "spatial_merge_size": "merge", "window_size": "window", "fullatt_block_indexes": "full_attention_layers",
}  # fmt: skip
VAE_KEYS = {
    "z_dim": "channels", "dim": "base", "dec_dim": "decoder_base", "dim_mult": "multipliers",
    "num_res_blocks": "residual_blocks", "temperal_downsample": "temporal_downsample",
}  # fmt: skip
ELSEWHERE = ("backbone", "vision", "vae", "tokens")
OWN_FIELDS = tuple(f.name for f in dataclasses.fields(ModelConfig) if f.name not in ELSEWHERE)
OWN_VAE_FIELDS = ("mean", "std")

Config = TypeVar("Config")


@dataclass(frozen=True)
class Release:
    """The files of one variant in a folder of the released layout; `folder` also holds the tokenizer."""

    root: Path
    variant: str
    folder: Path
    weights: tuple[Path, ...]
    vit: Path | None  # the ViT's folder, where there is one
    vae: Path | None  # the VAE's weights, where there are any


def read_layout(path: Path, variant: str | None = None, *, weights: bool = True) -> Release:
    """Finds the files below a release's folder, or a variant's own folder.

    variant: its name; None takes the only one, or Lance_3B. weights: whether the variant's must be there.
    Raises InputError naming the folder, what was looked for and what was found.
    """
    if (path / LLM_CONFIG).is_file():
        path = path.resolve()
        if variant not in (None, path.name):
            raise InputError(f"{path}: this is the folder of variant {path.name}, not of {variant}")
        root, variant = path.parent, path.name
    else:
        root, variant = path, choose_variant(path, variant)
    folder = root / variant
    vit = root / VIT_FOLDER
    vae = [root / name for name in VAE_FILES if (root / name).is_file()]
    return Release(
        root=root,
        variant=variant,
        folder=folder,
        weights=weight_files(folder) if weights else (),
        vit=vit if vit.is_dir() else None,
        vae=vae[0] if vae else None,
    )


def choose_variant(root: Path, variant: str | None) -> str:
    """The variant's name, after a check that it is there. Raises InputError."""
    found = sorted(entry.name for entry in root.iterdir() if (entry / LLM_CONFIG).is_file())
    if not found:
        raise InputError(
            f"{root}: not a Lance release. Looked for a folder with {LLM_CONFIG} in it, such as "
            f"{DEFAULT_VARIANT}; found {_listing(root)}"
        )
    if variant is None:
        variant = found[0] if len(found) == 1 else DEFAULT_VARIANT
    if variant not in found:
        raise InputError(f"{root}: no variant {variant}; choose one of {', '.join(found)}")
    return variant


def weight_files(folder: Path) -> tuple[Path, ...]:
    """model.safetensors, or the shards that its index names. Raises InputError."""
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,)
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        raise InputError(
            f"{folder}: no weights. Looked for {WEIGHTS} or {WEIGHTS_INDEX}; found {_listing(folder)}"
        )
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise InputError(f"{index}: weight_map must map parameter names to file names")
    names = sorted(set(table.values()))
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing or not names:
        raise InputError(
            f"{folder}: {WEIGHTS_INDEX} names {some(missing)}, not there; found {_listing(folder)}"
        )
    return tuple(folder / name for name in names)


def read_config(release: Release, tokenizer: Tokenizer | None = None) -> ModelConfig:
    """The model's configuration from the release's files; what none of them says is as released.

    tokenizer: the release's, where it is loaded already.
    Raises InputError naming the file and the field that cannot be used.
    """
    base = lance_3b()
    tokenizer = tokenizer or Tokenizer.load(release.folder)
    llm_file = release.folder / LLM_CONFIG
    llm = read_json(llm_file)
    backbone = read_backbone(llm, llm_file, base.backbone)
    vision_file = release.root / VIT_FOLDER / "config.json"
    vision = read_json(vision_file) if vision_file.is_file() else llm
    if not vision_file.is_file():
        vision_file = llm_file
    config = replace(
        base,
        backbone=backbone,
        vision=read_fields(
            base.vision, vision.get("vision_config", vision), VISION_KEYS, vision_file, required=True
        ),
        vae=_read_vae(release.root / VAE_CONFIG, base.vae),
        tokens=tokenizer.special,
    )
    own = release.root / OWN_CONFIG
    if own.is_file():
        config = _read_own(config, read_json(own), own)
    check_config(config, tokenizer, release)
    return config


def write_config(config: ModelConfig, root: Path, folder: Path, dtype: str) -> None:
    """Writes what `read_config` reads, the tokenizer aside; `folder` is the variant's, inside `root`."""
    backbone, vision, tokens = config.backbone, _write_fields(config.vision, VISION_KEYS), config.tokens
    llm = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **_write_fields(backbone, BACKBONE_KEYS),
        "hidden_act": "silu",
        "rope_scaling": {"type": "mrope", "mrope_section": list(backbone.rope_sections)},
        "qk_norm": backbone.qk_norm,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "bos_token_id": tokens.endoftext,
        "eos_token_id": tokens.im_end,
        "vision_start_token_id": tokens.vision_start,
        "vision_end_token_id": tokens.vision_end,
        "video_token_id": tokens.video_pad,
        "vision_config": vision,
    }
    own = {name: _plain(getattr(config, name)) for name in OWN_FIELDS}
    own["vae"] = {name: getattr(config.vae, name) for name in OWN_VAE_FIELDS}
    (root / VIT_FOLDER).mkdir(exist_ok=True)
    write_json(folder / LLM_CONFIG, llm)
    write_json(root / VIT_FOLDER / "config.json", {"model_type": "qwen2_5_vl", **vision})
    write_json(root / VAE_CONFIG, _write_fields(config.vae, VAE_KEYS))
    write_json(root / OWN_CONFIG, own)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError naming the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: must hold a JSON object, not {type(data).__name__}")
    return data


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def some(names: list[str], limit: int = 8) -> str:
    """Up to `limit` of the names, then how many more."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _listing(folder: Path) -> str:
    return some(sorted(entry.name for entry in folder.iterdir())) or "nothing"


def read_backbone(data: dict[str, Any], file: Path, base: BackboneConfig) -> BackboneConfig:
    """The backbone's shapes from the settings of a Qwen2.5-VL text model; `qk_norm` is ours, and optional."""
    scaling = data.get("rope_scaling")
    sections = scaling.get("mrope_section") if isinstance(scaling, dict) else None
    if not isinstance(sections, list) or len(sections) != 3:
        raise InputError(f"{file}: rope_scaling.mrope_section must be three numbers, not {sections!r}")
    data = {**data, "mrope_section": sections}
    base = read_fields(base, data, {"qk_norm": "qk_norm"}, file)
    return read_fields(base, data, BACKBONE_KEYS | {"mrope_section": "rope_sections"}, file, required=True)


def _read_vae(file: Path, base: VAEConfig) -> VAEConfig:
    """The VAE's shapes; its strides follow from them (its network works on 2 by 2 pixels)."""
    vae = read_fields(base, read_json(file), VAE_KEYS, file) if file.is_file() else base
    return replace(
        vae, spatial_stride=2 ** len(vae.multipliers), temporal_stride=2 ** sum(vae.temporal_downsample)
    )


def _read_own(config: ModelConfig, data: dict[str, Any], file: Path) -> ModelConfig:
    _refuse_unknown(data, (*OWN_FIELDS, "vae"), str(file))
    values = {
        name: typed_like(getattr(config, name), value, f"{file}: {name}")
        for name, value in data.items()
        if name != "vae"
    }
    vae = data.get("vae", {})
    if not isinstance(vae, dict):
        raise InputError(f"{file}: vae must be an object, not {vae!r}")
    _refuse_unknown(vae, OWN_VAE_FIELDS, f"{file}: vae")
    statistics = {
        name: typed_like(getattr(config.vae, name), value, f"{file}: vae.{name}")
        for name, value in vae.items()
    }
    return replace(config, **values, vae=replace(config.vae, **statistics))


def check_config(config: ModelConfig, tokenizer: Tokenizer, release: Release) -> None:
    """Whether backbone, vision, VAE and tokenizer fit together. Raises InputError."""
    backbone, vae, vision = config.backbone, config.vae, config.vision
    if tokenizer.size > backbone.vocab:
        raise InputError(
            f"{release.folder}: the tokenizer has {tokenizer.size} tokens, more than the vocab_size "
            f"{backbone.vocab}"
        )
    if vision.out_hidden != backbone.hidden:
        raise InputError(
            f"{release.root}: the ViT's out_hidden_size {vision.out_hidden} is not the hidden_size "
            f"{backbone.hidden} of {release.variant}"
        )
    for name in OWN_VAE_FIELDS:
        if len(getattr(vae, name)) != vae.channels:
            raise InputError(
                f"{release.root / OWN_CONFIG}: vae.{name} needs {vae.channels} values, one for each channel, "
                f"not {len(getattr(vae, name))}"
            )


def read_fields(
    base: Config, data: Any, keys: Mapping[str, str], file: Path, required: bool = False
) -> Config:
    """`base` with the fields that `data` holds under the released keys; other keys are not ours to judge."""
    if not isinstance(data, dict):
        raise InputError(f"{file}: must hold an object of settings, not {data!r}")
    missing = [key for key in keys if key not in data]
    if required and missing:
        raise InputError(f"{file}: lacks {some(missing)}")
    values = {
        field: typed_like(getattr(base, field), data[key], f"{file}: {key}")
        for key, field in keys.items()
        if key in data
    }
    try:
        return replace(base, **values)  # type: ignore[type-var]
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _write_fields(config: Any, keys: Mapping[str, str]) -> dict[str, Any]:
    return {key: _plain(getattr(config, field)) for key, field in keys.items()}


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]


def _refuse_unknown(data: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise InputError(f"{where}: unknown field(s) {some(unknown)}; known are {', '.join(known)}")


def typed_like(example: Any, value: Any, where: str) -> Any:
    """`value` as the type of `example`, which may be a dataclass. Raises InputError where it is another."""
    if dataclasses.is_dataclass(example):
        if not isinstance(value, dict):
            raise InputError(f"{where} must be an object, not {value!r}")
        known = tuple(field.name for field in dataclasses.fields(example))
        _refuse_unknown(value, known, where)
        values = {
            name: typed_like(getattr(example, name), item, f"{where}.{name}") for name, item in value.items()
        }
        try:
            return replace(example, **values)  # type: ignore[type-var]
        except ValueError as error:  # an InputError, or an interval that is not a pair
            raise InputError(f"{where}: {error}") from error
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(example, tuple) and isinstance(value, list):
        return tuple(typed_like(example[0], item, f"{where}[{n}]") for n, item in enumerate(value))
    if isinstance(example, dict) and isinstance(value, dict):
        if all(isinstance(text, str) for text in value.values()):
            return dict(value)
    elif isinstance(example, float) and number:
        return float(value)
    elif type(value) is type(example) or (example is None and number):  # None: an optional number
        return value
    kind = (
        "a list" if isinstance(example, tuple) else "a number" if example is None else type(example).__name__
    )
    raise InputError(f"{where} must be {kind}, not {value!r}")
