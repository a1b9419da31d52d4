"""Weights of a release: load them into our modules, and save ours in the released layout.

Loading streams: the module is built without memory, then each tensor is read from the mapped file, cast and
placed, so the host never holds more than the model in its own dtype and one tensor.
"""

from __future__ import annotations

import math
import pickle
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from openlance.config import ModelConfig
from openlance.errors import InputError
from openlance.model.hub import find_release
from openlance.model.lance import Lance
from openlance.model.names import PARTS, POSITION_TABLE, VISION, part_of, to_ours, to_released
from openlance.model.quantize import (
    Scheme,
    check_fits,
    check_packing,
    flattened,
    pieces,
    placed,
    quantize_weight,
    quantized_in,
    scheme_for,
    scheme_of,
    stored_bytes,
)
from openlance.model.release import (
    LLM_CONFIG,
    VAE_FILES,
    VIT_FOLDER,
    VIT_WEIGHTS,
    WEIGHTS,
    WEIGHTS_INDEX,
    Release,
    read_config,
    some,
    write_config,
    write_json,
)
from openlance.model.vae import VAE
from openlance.model.vae import released_names as vae_names
from openlance.tokenizer import Tokenizer

__all__ = [
    "Release", "count_parameters", "find_release", "load_model", "load_vae", "parameter_shapes",
    "read_config", "save_pretrained",
]  # fmt: skip

SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: `read` brings it to the CPU."""

    file: Path
    key: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def load_model(
    release: Release,
    config: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    parts: Iterable[str] = PARTS,
    quantize: Mapping[str, Scheme] = MappingProxyType({}),
) -> Lance:
    """The network with the release's weights, in `dtype` on `device`.

    parts: which of "und", "gen" and "vision" to build and read; weights of the others are left alone.
    quantize: the scheme of parts, see `openlance.model.quantize`; layers that are stored quantised stay so.
    The ViT comes from model.safetensors (`vit_model.*`); what is not there, from vit.safetensors.
    Raises InputError naming the file and the parameters that are missing, surplus, misshapen or not finite.
    """
    parts = frozenset(parts)
    with torch.device("meta"):
        model = Lance(config, parts)
    check_fits(quantize, model)
    with ExitStack() as files:
        stored = _stored_model(release, parts, model, files)
        fill(model, stored, device, dtype, release.folder, lambda name: to_released(name) or name, quantize)
    return model


def load_vae(
    release: Release,
    config: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VAE:
    """The VAE with the release's weights, from .safetensors or .pth. Raises InputError as `load_model`."""
    if release.vae is None:
        raise InputError(f"{release.root}: no VAE. Looked for {' or '.join(VAE_FILES)}")
    names = vae_names(config.vae)
    ours_to_released = {ours: released for released, ours in names.items()}
    with torch.device("meta"):
        vae = VAE(config.vae)
    with ExitStack() as files:
        opened = open_tensors(release.vae, files)
        stored = {names.get(key, key): tensor for key, tensor in opened.items()}
        fill(vae, stored, device, dtype, release.vae, ours_to_released.__getitem__)
    return vae


def parameter_shapes(config: ModelConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Part ("und", "gen", "vision", "vae") -> our parameter names -> shapes. Takes no memory for weights."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {"und": {}, "gen": {}, "vision": {}, "vae": {}}
    with torch.device("meta"):
        for name, parameter in Lance(config).named_parameters():
            shapes[part_of(name)][name] = tuple(parameter.shape)
        for name, parameter in VAE(config.vae).named_parameters():
            shapes["vae"][name] = tuple(parameter.shape)
    return shapes


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Part -> how many values it has."""
    return {
        part: sum(math.prod(shape) for shape in shapes.values())
        for part, shapes in parameter_shapes(config).items()
    }


def _stored_model(
    release: Release, parts: frozenset[str], model: nn.Module, files: ExitStack
) -> dict[str, Stored]:
    """Our name -> where its tensor is; released names that we do not have stand as they are."""
    stored = {}
    for path in release.weights:
        for key, tensor in open_tensors(path, files).items():
            name = to_ours(key)
            if name is None and key != POSITION_TABLE:
                stored[key] = tensor
            elif name is not None and part_of(name) in parts:
                stored[name] = tensor
    lacking = any(part_of(name) == "vision" and name not in stored for name, _ in model.named_parameters())
    if lacking and release.vit is not None and (release.vit / VIT_WEIGHTS).is_file():
        for key, tensor in open_tensors(release.vit / VIT_WEIGHTS, files).items():
            stored.setdefault(to_ours(VISION + key) or key, tensor)
    return stored


def open_tensors(path: Path, files: ExitStack) -> dict[str, Stored]:
    """The tensors of a .safetensors or .pth file, none of them read yet; `files` closes it."""
    if path.suffix == ".pth":
        return _open_pickled(path)
    try:
        file = files.enter_context(safe_open(path, framework="pt"))
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read as safetensors, is it complete? ({error})") from error
    stored = {key: Stored(path, key, shapes[key], partial(file.get_tensor, key)) for key in shapes}
    for name, (shape, read, keys) in quantized_in(file.metadata() or {}, shapes, file.get_tensor).items():
        stored = {key: tensor for key, tensor in stored.items() if key not in keys}
        stored[name] = Stored(path, name, shape, read)
    return stored


def _open_pickled(path: Path) -> dict[str, Stored]:
    try:
        mapped = zipfile.is_zipfile(path)  # else an older format, which can only be read whole
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        first = (str(error).splitlines() or ["no reason given"])[0]
        raise InputError(f"{path}: cannot be read as weights, is it complete? ({first})") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise InputError(f"{path}: must hold a dictionary of tensors")
    return {
        key: Stored(path, key, tuple(tensor.shape), partial(tensors.__getitem__, key))
        for key, tensor in tensors.items()
    }


def fill(
    module: nn.Module,
    stored: Mapping[str, Stored],
    device: torch.device | str,
    dtype: torch.dtype,
    where: Path,
    released: Callable[[str], str],
    quantize: Mapping[str, Scheme] = MappingProxyType({}),
) -> None:
    """Gives every parameter of a module built on meta its stored tensor, one after the other."""
    parameters = dict(module.named_parameters())
    check_fit({name: tuple(p.shape) for name, p in parameters.items()}, stored, where, released)
    for name, parameter in parameters.items():
        scheme = scheme_for(quantize, name, tuple(parameter.shape))
        tensor = read_tensor(stored[name], device, dtype, scheme)
        owner, _, leaf = name.rpartition(".")
        learns = parameter.requires_grad and scheme_of(tensor) is None
        setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, learns))
    module.to(device)  # buffers, which are computed and not stored
    lost = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    assert not lost, f"built without values: {lost}"


def check_fit(
    wanted: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, Stored],
    where: Path,
    released: Callable[[str], str],
) -> None:
    """Raises InputError naming every parameter that is missing, surplus or misshapen.

    wanted: our names -> shapes. stored: our names -> tensors. released: our name -> its name in the files.
    """
    missing = [released(name) for name in wanted if name not in stored]
    surplus = [tensor.key for name, tensor in stored.items() if name not in wanted]
    misshapen = [
        f"{stored[name].key} {list(stored[name].shape)}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in stored and stored[name].shape != shape
    ]
    kinds = {"missing": missing, "surplus": surplus, "misshapen": misshapen}
    unique = {kind: list(dict.fromkeys(names)) for kind, names in kinds.items()}  # one may serve two of ours
    wrong = [f"{len(names)} {kind} ({some(names)})" for kind, names in unique.items() if names]
    if wrong:
        raise InputError(f"{where}: the weights do not fit the configuration: {'; '.join(wrong)}")


def read_tensor(
    stored: Stored, device: torch.device | str, dtype: torch.dtype, scheme: Scheme | None = None
) -> Tensor:
    """A tensor of its own memory (never the mapped file's) in `dtype` on `device`, known to be finite.

    scheme: to quantise it, from its values as they are stored; it then computes in `dtype`.
    """
    try:
        raw = stored.read()
    except (SafetensorError, OSError, RuntimeError) as error:
        raise InputError(f"{stored.file}: {stored.key} cannot be read ({error})") from error
    if not raw.is_floating_point():
        raise InputError(f"{stored.file}: {stored.key} holds {raw.dtype}, not real numbers")
    kept = scheme_of(raw)
    if kept is not None:
        if scheme not in (None, kept):
            raise InputError(f"{stored.file}: the weights are quantised already, as {kept.name}")
        check_packing(raw, device)
        tensor = placed(raw, device, dtype)
        _check_finite(pieces(tensor).values(), stored, dtype)
        return tensor
    exact = raw.dtype if scheme is not None else dtype
    tensor = torch.empty(stored.shape, dtype=exact, device=device).copy_(raw)
    _check_finite([tensor], stored, exact)
    return tensor if scheme is None else quantize_weight(tensor, scheme, dtype)


def _check_finite(tensors: Iterable[Tensor], stored: Stored, dtype: torch.dtype) -> None:
    for tensor in tensors:
        if tensor.dtype.itemsize > 1 and not torch.stack(tensor.aminmax()).isfinite().all():
            # unlike isfinite(tensor), aminmax takes no memory; numbers of one byte are scaled, and finite
            raise InputError(f"{stored.file}: {stored.key} holds NaN or infinite values as {dtype}")


def save_pretrained(
    folder: str | Path,
    *,
    model: nn.Module | Mapping[str, Tensor],
    vae: VAE | None,
    tokenizer: Tokenizer,
    config: ModelConfig,
    variant: str = "Lance_3B",
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder in the released layout, which loads back bit for bit.

    model: the network, or its state dictionary (an average of weights, a gathered sharded model); parts that
        it lacks are not written. dtype: of the stored weights; None keeps each one's own.
    All is written beside the folder and moved in at the end, so a failed write leaves the old files as they
    were; files that are not replaced stay. Raises InputError for a parameter that the layout has no name for,
    and where the folder holds another variant (the ViT, the VAE and openlance.json belong to one).
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file is in the way")
    others = [path.parent.name for path in folder.glob(f"*/{LLM_CONFIG}") if path.parent.name != variant]
    if others:
        raise InputError(f"{folder}: holds {some(others)}; save {variant} to a folder of its own")
    weights = model if isinstance(model, Mapping) else model.state_dict()
    unknown = [name for name in weights if to_released(name) is None]
    if unknown:
        raise InputError(f"no released name for {some(unknown)}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        stage = Path(temporary) / "new"
        (stage / variant).mkdir(parents=True)
        stored = {str(to_released(name)): tensor for name, tensor in weights.items()}
        kept = next(iter(stored.values())).dtype if dtype is None else dtype
        write_config(config, stage, stage / variant, str(kept).removeprefix("torch."))
        tokenizer.save(stage / variant)
        vit = {name.removeprefix(VISION): t for name, t in stored.items() if name.startswith(VISION)}
        rest = {name: t for name, t in stored.items() if not name.startswith(VISION)}
        _write_shards(rest, stage / variant, dtype, shard_bytes)
        if vit:
            _write(vit, stage / VIT_FOLDER / VIT_WEIGHTS, dtype)
        if vae is not None:
            state = vae.state_dict()
            names = vae_names(config.vae)
            _write({name: state[ours] for name, ours in names.items()}, stage / VAE_FILES[0], dtype)
        _move_in(stage, folder, variant, Path(temporary) / "old")


def _write_shards(tensors: dict[str, Tensor], folder: Path, dtype: torch.dtype | None, limit: int) -> None:
    shards = list(_shards(tensors, dtype, limit))
    if len(shards) == 1:
        _write(tensors, folder / WEIGHTS, dtype)
        return
    table: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        keys = _write({key: tensors[key] for key in shard}, folder / name, dtype)
        table |= dict.fromkeys(keys, name)
    total = sum(_size(tensor, dtype) for tensor in tensors.values())
    write_json(folder / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": table})


def _shards(tensors: dict[str, Tensor], dtype: torch.dtype | None, limit: int) -> Iterator[list[str]]:
    """Names in groups of up to `limit` bytes."""
    group: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if group and size + _size(tensor, dtype) > limit:
            yield group
            group, size = [], 0
        group.append(name)
        size += _size(tensor, dtype)
    yield group


def _size(tensor: Tensor, dtype: torch.dtype | None) -> int:
    quantized = scheme_of(tensor) is not None
    return stored_bytes(tensor) if quantized else tensor.numel() * (dtype or tensor.dtype).itemsize


def _write(tensors: dict[str, Tensor], path: Path, dtype: torch.dtype | None) -> list[str]:
    """Gives the keys that the file has. Quantised tensors stay as they are, whatever the dtype."""
    ready = {}
    for name, tensor in tensors.items():
        wanted = dtype if scheme_of(tensor) is None else None
        ready[name] = tensor.detach().to(device="cpu", dtype=wanted).contiguous()
    plain, header = flattened(ready)
    save_file(plain, path, metadata={"format": "pt"} | header)
    return list(plain)


def _move_in(stage: Path, folder: Path, variant: str, old: Path) -> None:
    """Renames what is complete into place; what it replaces goes to `old`, and back if a rename fails.

    The variant's folder is replaced whole (an earlier save may have had other shards), the rest by file.
    """
    if not folder.exists():
        stage.rename(folder)
        return
    files = [path.relative_to(stage) for path in stage.rglob("*") if path.is_file()]
    names = [Path(variant), *(name for name in files if name.parts[0] != variant)]
    if Path(VAE_FILES[0]) in names:
        names.append(Path(VAE_FILES[1]))  # the same weights in their other form
    moves = []
    for name in names:
        moves += [(folder / name, old / name), (stage / name, folder / name)]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            if source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                source.rename(target)
                done.append((source, target))
    except OSError:
        for source, target in reversed(done):
            target.rename(source)
        raise
