"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linear layers of a network, by way of PEFT.

The layers are wrapped in place, so a `Lance` stays one. An adapter is a folder as PEFT writes it:
adapter_config.json and adapter_model.safetensors; beside them sampling.json, where the adapted model samples
in a way of its own (fields of `SamplingConfig`). While such an adapter is active, the model samples so.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from openlance.config import SamplingConfig
from openlance.errors import InputError
from openlance.model.checkpoint import check_fit, open_tensors, read_tensor
from openlance.model.hub import BUNDLED_ADAPTERS
from openlance.model.lance import PARTS, Lance
from openlance.model.quantize import schemes_of
from openlance.model.release import read_json, some, typed_like

CONFIG, WEIGHTS, SAMPLING = "adapter_config.json", "adapter_model.safetensors", "sampling.json"
KEPT, BASE = "adapter_sampling", ""
PREFIX = "base_model.model."  # what PEFT's files put before a model's own names

# Other forms of LoRA are refused: they hold more than two matrices a layer, or change the weights below.
PLAIN = {
    "bias": ("none",),
    "modules_to_save": (None,),
    "use_dora": (False,),
    "init_lora_weights": (True, "gaussian"),
}

# The linear layers of each part: those of attention and MLP.
EXPERT_LINEARS = "(q|k|v|o|gate|up|down)"
LINEARS = {
    "und": rf"layers\.\d+\.und\.{EXPERT_LINEARS}",
    "gen": rf"layers\.\d+\.gen\.{EXPERT_LINEARS}",
    "vision": r"vision\.tower\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate|up|down)_proj)",
}


def add_lora(
    model: Lance,
    parts: Iterable[str],
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    *,
    name: str = "default",
    seed: int = 0,
) -> None:
    """Add a new adapter to all linear layers of some parts ("und", "gen", "vision"), as the active one.

    It changes nothing until it is trained: W x becomes W x + alpha / rank · B A dropout(x), with B zero and A
    drawn from `seed`, in the dtype of W. From here on only the active adapter requires gradients.
    Raises InputError for a part that the model lacks and a name that is taken.
    """
    wanted = sorted(set(parts))
    unknown = [part for part in wanted if part not in model.parts]
    if unknown or not wanted:
        have = ", ".join(sorted(model.parts & PARTS))
        raise InputError(f"no part {some(unknown) or 'given'} for an adapter: this model has {have}")
    if rank < 1 or not 0 <= dropout < 1:
        raise InputError(f"an adapter needs rank >= 1 and dropout in [0, 1), not {rank} and {dropout}")
    peft = _peft()
    target = "|".join(LINEARS[part] for part in wanted)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target)
    _check_new(model, name)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # PEFT draws on the CPU, whatever the model's device
        _inject(peft, config, model, name)
    _activate_new(model, name)


def adapter_names(model: Lance) -> list[str]:
    """All adapters of the model, active or not."""
    return list(_configs(model))


def save_adapter(
    model: Lance,
    folder: str | Path,
    *,
    name: str = "default",
    weights: Mapping[str, Tensor] | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter alone, as PEFT does; `load_adapter` gives it back bit for bit.

    weights: a state dictionary of the model in place of its own (averaged, or gathered over processes).
    sampling: fields of `SamplingConfig` that the adapted model wants, over the checkpoint's.
    Raises InputError for an adapter that is not there.
    """
    folder = Path(folder)
    _check_known(model, [name])
    state = _adapter_weights(model.state_dict() if weights is None else weights, name)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    replace(_configs(model)[name], inference_mode=True).save_pretrained(str(folder))
    if sampling is not None:
        (folder / SAMPLING).write_text(json.dumps(sampling, indent=2) + "\n")


def find_adapter(folder: str | Path) -> Path:
    """The folder of an adapter; "nano-fast" is bundled: nano in five steps without guidance."""
    return BUNDLED_ADAPTERS.get(str(folder), Path(folder))


def load_adapter(model: Lance, folder: str | Path, name: str = "default") -> None:
    """Add a saved adapter under a name and make it the active one; it can be trained further.

    folder: as `find_adapter` takes it.
    Raises InputError, before the model is changed, naming the file and what cannot be used: settings, or the
    parameters that are missing, surplus, misshapen or not finite.
    """
    folder = find_adapter(folder)
    peft = _peft()
    config = _read_config(peft, folder / CONFIG)
    own = _read_sampling(folder / SAMPLING)
    _check_new(model, name)
    shapes = _shapes(peft, config, model, folder)
    file = folder / WEIGHTS
    with ExitStack() as files:
        stored = {key.removeprefix(PREFIX): tensor for key, tensor in open_tensors(file, files).items()}
        check_fit(shapes, stored, file, lambda key: PREFIX + key)
        read = {key: read_tensor(tensor, model.device, model.dtype) for key, tensor in stored.items()}
    _inject(peft, config, model, name, low_cpu_mem_usage=True)  # on meta, until it gets its weights
    named = {f"{layer}.{name}.{leaf}": read[f"{layer}.{leaf}"] for layer, leaf in map(_split, read)}
    model.load_state_dict(named, strict=False, assign=True)
    _samplings(model)[name] = own
    _activate_new(model, name)


def set_adapter(model: Lance, names: str | Iterable[str]) -> None:
    """Make these adapters, and no others, the active ones; what several add is summed.

    The active ones require gradients, the others do not. Raises InputError for a name that is not there.
    """
    active = [names] if isinstance(names, str) else list(names)
    _check_known(model, active)
    for _, layer in _layers(model):
        layer.set_adapter(active)
    _sample_as(model, active)


@contextmanager
def disabled(model: Lance) -> Iterator[None]:
    """Within the block the model is what it was before any adapter: the reference of its own tuning."""
    before = [(layer, layer.disable_adapters) for _, layer in _layers(model)]
    config = model.config
    _sample_as(model, [])
    learns = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for layer, _ in before:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer, off in before:
            layer.enable_adapters(not off)
        model.config = config
        for parameter, flag in learns:  # enabling would let every active adapter learn
            parameter.requires_grad_(flag)


def merge_adapters(model: Lance) -> None:
    """Add what the active adapters do to the weights, and remove all adapters: a plain model again.

    Its weights stay without gradients until `requires_grad_` is called. Raises InputError where the weights
    are quantised: there is no room for a small change between their levels.
    """
    if adapter_names(model) and schemes_of(model):
        raise InputError("adapters cannot be merged into quantised weights: leave them active")
    for _, layer in _layers(model):
        layer.merge()
    config = model.config  # with what the merged ones want
    unload_adapters(model)
    model.config = config


def unload_adapters(model: Lance) -> None:
    """Remove all adapters: the weights are as before the first was added, though still without gradients."""
    for name, layer in _layers(model):
        model.set_submodule(name, layer.get_base_layer())
    if adapter_names(model):
        del model.peft_config
    if hasattr(model, KEPT):
        _sample_as(model, [])
        delattr(model, KEPT)


def _inject(peft: ModuleType, config: Any, model: Lance, name: str, **options: bool) -> None:
    with warnings.catch_warnings():  # it warns of a second adapter
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        warnings.filterwarnings("ignore", ".*get_apply_tensor_subclass")  # for merging, which we refuse
        peft.inject_adapter_in_model(config, model, name, **options)


def _activate_new(model: Lance, name: str) -> None:
    """Make an adapter that was just injected the active one, with dropout as the model's mode says."""
    for _, layer in _layers(model):
        layer.train(layer.get_base_layer().training)
    set_adapter(model, name)


def _layers(model: Lance) -> list[tuple[str, Any]]:
    """The wrapped layers by name."""
    if not adapter_names(model):
        return []
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise InputError("adapters need PEFT: pip install 'openlance[train]'") from error
    return peft


def _adapter_weights(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """One adapter's tensors of a model's state dictionary, under the names that PEFT's files give them."""
    # PEFT's own function mistakes an adapter called "gen" for the expert.
    pattern = re.compile(rf"(.+\.lora_[AB])\.{name}\.(\w+)")
    matches = ((pattern.fullmatch(key), tensor) for key, tensor in state.items())
    return {f"{match[1]}.{match[2]}": tensor for match, tensor in matches if match}


def _split(name: str) -> tuple[str, str]:
    layer, _, leaf = name.rpartition(".")
    return layer, leaf


def _configs(model: Lance) -> dict[str, Any]:
    """PEFT's settings of each adapter, which it keeps on the model."""
    return getattr(model, "peft_config", {})


def _samplings(model: Lance) -> dict[str, dict[str, Any]]:
    """What each loaded adapter wants of the sampling settings; under BASE the model's own, all of them. Kept
    on the model, as PEFT's settings are."""
    if not hasattr(model, KEPT):
        setattr(model, KEPT, {BASE: vars(model.config.sampling)})
    return getattr(model, KEPT)


def _sample_as(model: Lance, active: Iterable[str]) -> None:
    """Give the model the sampling settings of these adapters over its own; of the last, where several have
    some."""
    known = _samplings(model)
    settings = dict(known[BASE])
    for name in active:
        settings |= known.get(name, {})
    model.config = replace(model.config, sampling=SamplingConfig(**settings))


def _read_sampling(file: Path) -> dict[str, Any]:
    """Fields of an adapter's own sampling settings, none where there is no file."""
    if not file.exists():
        return {}
    found = read_json(file)
    chosen = typed_like(SamplingConfig(), found, str(file))
    return {name: getattr(chosen, name) for name in found}


def _check_new(model: Lance, name: str) -> None:
    if name in adapter_names(model):
        raise InputError(f"the model has an adapter {name!r} already: choose another name")
    if not re.fullmatch(r"[\w-]+", name):  # it becomes part of parameter names
        raise InputError(f"{name!r} cannot name an adapter: use letters, digits, - and _")


def _check_known(model: Lance, names: list[str]) -> None:
    have = adapter_names(model)
    unknown = [name for name in names if name not in have]
    if unknown or not names:
        raise InputError(f"no adapter {some(unknown) or 'given'}; the model has {some(have) or 'none'}")


def _read_config(peft: ModuleType, file: Path) -> Any:
    """PEFT's settings of an adapter that only adds to linear layers."""
    settings = read_json(file)
    if settings.get("peft_type") != "LORA":
        raise InputError(f"{file}: peft_type must be LORA, not {settings.get('peft_type')!r}")
    try:
        config = peft.LoraConfig.from_pretrained(str(file.parent))
    except (TypeError, ValueError) as error:
        raise InputError(f"{file}: not settings of LoRA ({error})") from error
    for field, plain in PLAIN.items():
        if getattr(config, field) not in plain:
            raise InputError(f"{file}: {field} must be {plain[0]}, not {getattr(config, field)!r}")
    return config


def _shapes(peft: ModuleType, config: Any, model: Lance, folder: Path) -> dict[str, tuple[int, ...]]:
    """Parameter names -> shapes that an adapter of these settings has on this model; takes no memory."""
    with torch.device("meta"):
        twin = Lance(model.config, model.parts)
        try:
            _inject(peft, config, twin, "default")
        except ValueError as error:
            raise InputError(f"{folder / CONFIG}: does not fit the model ({error})") from error
    state = _adapter_weights(twin.state_dict(), "default")
    return {key: tuple(tensor.shape) for key, tensor in state.items()}
