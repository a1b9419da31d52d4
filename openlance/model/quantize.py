"""Weights of the layers in 8 or 4 bits, by torchao: they are stored small and widened where they are used.

Only the matrices of the linear layers inside the experts and the ViT are quantised. Embeddings, norms,
biases, the head, latent in and out and the time embedding keep their dtype, and so does all arithmetic. Every
matrix is quantised from its own values alone, so no data, and no kind of task, has a say in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from openlance.config import ModelConfig
from openlance.errors import InputError
from openlance.model.lance import Lance
from openlance.model.names import part_of, to_ours
from openlance.model.vae import VAE


@dataclass(frozen=True)
class Scheme:
    """How the matrix of a linear layer is stored.

    bits: of one weight. group: so many weights of a row share a scale; None: the whole row.
    overhead: bytes beside each group, its scale and zero point. multiple: rows are padded to this length.
    kinds: the tensor classes of torchao that hold it.
    """

    name: str
    bits: int
    group: int | None
    overhead: int
    kinds: tuple[str, ...]
    multiple: int = 1

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a matrix [rows, columns] can be stored so: its rows must come in whole groups."""
        return self.group is None or shape[1] % self.group == 0

    def matrix_bytes(self, shape: tuple[int, ...]) -> int:
        rows, columns = shape
        columns = math.ceil(columns / self.multiple) * self.multiple
        groups = columns // (self.group or columns)
        return rows * (columns * self.bits // 8 + groups * self.overhead)


CUDA_PACKING, CPU_PACKING = "Int4TilePackedTo4dTensor", "Int4OpaqueTensor"
# int4 is counted as CUDA's kernel packs it; the CPU's pads nothing, and keeps scales in the model's dtype.
SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", bits=8, group=None, overhead=5, kinds=("Int8Tensor",)),
        Scheme("fp8", bits=8, group=None, overhead=4, kinds=("Float8Tensor",)),
        Scheme(
            "int4", bits=4, group=128, overhead=4, multiple=1024,
            kinds=(CUDA_PACKING, CPU_PACKING),
        ),
    )
}  # fmt: skip
QUANTIZABLE = ("und", "gen", "vision")
EXPERTS = ("und", "gen")

Quantize = str | Mapping[str, str]
"""A scheme for both experts, or one by part: {"und": "int8", "gen": "fp8"}, which may be written as
"und=int8,gen=fp8". "vision" (the ViT) is quantised only where it is named."""


def choose_schemes(quantize: Quantize | None, device: torch.device | str) -> dict[str, Scheme]:
    """Part -> scheme, after a check that the device can compute with it. Raises InputError where it cannot,
    and for a part or a scheme that is not known."""
    if quantize is None:
        return {}
    chosen = _parse(quantize) if isinstance(quantize, str) else dict(quantize)
    for part, name in chosen.items():
        if part not in QUANTIZABLE:
            raise InputError(f"quantize: no part {part!r}; name some of {', '.join(QUANTIZABLE)}")
        if name not in SCHEMES:
            raise InputError(f"quantize: no scheme {name!r}; choose one of {', '.join(SCHEMES)}")
        _check_device(name, torch.device(device))
    return {part: SCHEMES[name] for part, name in chosen.items()}


def _parse(text: str) -> dict[str, str]:
    """ "int8", or "und=int8,gen=fp8"."""
    if "=" not in text:
        return dict.fromkeys(EXPERTS, text.strip())
    pairs = [pair.partition("=") for pair in text.split(",")]
    parts = [part.strip() for part, _, _ in pairs]
    if len(set(parts)) < len(parts):
        raise InputError(f"quantize: {text!r} names a part twice")
    return {part: name.strip() for part, (_, _, name) in zip(parts, pairs, strict=True)}


def _check_device(scheme: str, device: torch.device) -> None:
    if scheme == "fp8" and device.type not in ("cpu", "cuda"):
        raise InputError(f"quantize: fp8 does not exist on {device.type}; int8 does")
    if scheme != "int4":
        return
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"quantize: int4 has no kernel on {device.type}; int8 works there")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise InputError("quantize: int4 needs a GPU of compute capability 8.0 or later; int8 works here")


def is_layer_weight(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is the matrix of a linear layer, inside an expert's layers or the ViT's."""
    return len(shape) == 2 and name.startswith(("layers.", "vision.tower.blocks."))


def scheme_for(schemes: Mapping[str, Scheme], name: str, shape: tuple[int, ...]) -> Scheme | None:
    """How the parameter of this name (ours) and shape is to be stored; None: as it is."""
    scheme = schemes.get(part_of(name)) if is_layer_weight(name, shape) else None
    return scheme if scheme is not None and scheme.fits(shape) else None


def check_fits(schemes: Mapping[str, Scheme], model: nn.Module) -> None:
    """Raises InputError for a scheme that no layer of its part can be stored in."""
    named = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for part, scheme in schemes.items():
        shapes = [
            shape for name, shape in named.items() if part_of(name) == part and is_layer_weight(name, shape)
        ]
        if shapes and not any(map(scheme.fits, shapes)):
            needs = f"rows of a multiple of {scheme.group} weights"
            raise InputError(f"quantize: {scheme.name} needs {needs}, which no layer of {part} has")


def weight_bytes(
    config: ModelConfig, part: str, scheme: str | None, dtype: torch.dtype = torch.bfloat16
) -> int:
    """What the weights of a part ("und", "gen", "vision", "vae") take with a scheme; None: all in `dtype`.

    What a scheme leaves alone is counted in `dtype`; of the VAE that is everything.
    """
    schemes = {} if scheme is None else {part: SCHEMES[scheme]}
    with torch.device("meta"):
        module: nn.Module = VAE(config.vae) if part == "vae" else Lance(config, {"und", part})
    total = 0
    for name, parameter in module.named_parameters():
        if part not in ("vae", part_of(name)):
            continue
        shape = tuple(parameter.shape)
        chosen = None if part == "vae" else scheme_for(schemes, name, shape)
        total += parameter.numel() * dtype.itemsize if chosen is None else chosen.matrix_bytes(shape)
    return total


def quantize_weight(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """A matrix [rows, columns], as stored on disk, in fewer bits; it takes part in products as if in `dtype`.

    int8: whole numbers times one float32 a row, which is the row's largest absolute value over 127.5.
    fp8: float8 e4m3, scaled likewise to its largest value, 448. int4: 16 levels between two ends a group,
    moved by HQQ (half-quadratic quantisation) to where the error of the weights themselves is least.
    """
    torchao = _torchao()
    if scheme.name == "int4":
        return _int4(torchao, weight, scheme, dtype)
    kind = getattr(torchao, scheme.kinds[0])
    small = kind.from_hp(weight.float(), granularity=torchao.PerRow())
    return placed(small, weight.device, dtype)


def _int4(torchao: Any, weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm

    hqq = Int4ChooseQParamsAlgorithm.HQQ
    block = [1, scheme.group]
    if weight.device.type == "cuda":
        wide = weight.to(torch.bfloat16)  # the kernel computes in nothing else
        return torchao.Int4TilePackedTo4dTensor.from_hp(wide, block, int4_choose_qparams_algorithm=hqq)
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor

    return Int4OpaqueTensor.from_hp(weight.to(dtype), block, int4_choose_qparams_algorithm=hqq)


def scheme_of(tensor: Tensor) -> Scheme | None:
    """The scheme of a quantised tensor; None for any other."""
    kind = type(tensor).__name__
    return next((scheme for scheme in SCHEMES.values() if kind in scheme.kinds), None)


def schemes_of(model: nn.Module) -> dict[str, str]:
    """Part -> name of the scheme that its layers are stored in; parts that are not quantised are left out."""
    named = ((part_of(name), scheme_of(tensor)) for name, tensor in model.named_parameters())
    return {part: scheme.name for part, scheme in named if scheme is not None}


def check_packing(tensor: Tensor, device: torch.device | str) -> None:
    """Raises InputError for a quantised tensor that no device of this kind can compute with."""
    if type(tensor).__name__ == CUDA_PACKING and torch.device(device).type != "cuda":
        raise InputError("int4 as CUDA packs it, which computes on no other device: quantise when loading")


def pieces(tensor: Tensor) -> dict[str, Tensor]:
    """The plain tensors that a quantised one consists of (numbers, scales, zero points), by name."""
    names = _names(tensor, "tensor_data_names") + _names(tensor, "optional_tensor_data_names")
    found = {name: getattr(tensor, name) for name in names}
    return {name: piece for name, piece in found.items() if piece is not None}


def stored_bytes(tensor: Tensor) -> int:
    """What any tensor takes in memory and in a file."""
    return sum(piece.nbytes for piece in pieces(tensor).values()) if scheme_of(tensor) else tensor.nbytes


def placed(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """A copy of a quantised tensor on `device` that computes in `dtype`; numbers and scales are the same."""
    attributes = _names(tensor, "tensor_attribute_names") + _names(tensor, "optional_tensor_attribute_names")
    fields: dict[str, Any] = {name: getattr(tensor, name) for name in attributes}
    if "dtype" in fields:
        fields["dtype"] = dtype
    moved = {name: piece.to(device, copy=True) for name, piece in pieces(tensor).items()}
    return type(tensor)(**fields, **moved)  # type: ignore[call-arg]


def _names(tensor: Tensor, which: str) -> list[str]:
    return list(getattr(tensor, which, ()))


# Files: quantised tensors in safetensors, in the layout that torchao, transformers and diffusers share: each
# piece a tensor of its own, and in the header what they are pieces of.


def flattened(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors as plain ones, and what a file's header must say to put them together again; nothing where none
    is quantised. Raises InputError for one that fits only the device that it is on."""
    if not any(scheme_of(tensor) for tensor in tensors.values()):
        return dict(tensors), {}
    if any(type(tensor).__name__ == CPU_PACKING for tensor in tensors.values()):
        raise InputError(
            "int4 is packed for the device that computes with it, and only CUDA's packing can be saved: "
            "quantise on a GPU, or when loading"
        )
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    return flatten_tensor_state_dict(dict(tensors))


Saved = tuple[tuple[int, ...], Callable[[], Tensor], frozenset[str]]
"""A quantised tensor in a file: its shape, how to read it, and the keys that it consists of."""


def quantized_in(
    header: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]
) -> dict[str, Saved]:
    """The quantised tensors of a file by name.

    header: of the safetensors file. shapes: of all its keys. read: brings the tensor of a key to the CPU.
    """
    found: dict[str, Saved] = {}
    for name in json.loads(header.get("tensor_names", "[]")):
        about = json.loads(header[name])
        if about["_type"] not in {kind for scheme in SCHEMES.values() for kind in scheme.kinds}:
            continue
        owner, _, leaf = name.rpartition(".")
        keys = frozenset(f"{owner}._{leaf}_{piece}" for piece in about["_tensor_data_names"])
        shape = about["_data"].get("shape") or shapes[f"{owner}._{leaf}_qdata"]
        found[name] = (tuple(shape), partial(_join, name, header[name], keys, read), keys)
    return found


def schemes_in(files: Iterable[Path]) -> dict[str, Scheme]:
    """Part -> scheme of what safetensors files of a release hold quantised; only their headers are read.

    Raises InputError for a file that cannot be read.
    """
    found = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: cannot be read as safetensors, is it complete? ({error})") from error
        for key in json.loads(header.get("tensor_names", "[]")):
            kind = json.loads(header[key])["_type"]
            scheme = next((scheme for scheme in SCHEMES.values() if kind in scheme.kinds), None)
            if scheme is not None:
                found[part_of(to_ours(key) or "vision.")] = scheme  # vit.safetensors names no part
    return found


def _join(name: str, about: str, keys: frozenset[str], read: Callable[[str], Tensor]) -> Tensor:
    _torchao()
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    header = {"tensor_names": json.dumps([name]), name: about}
    joined, _ = unflatten_tensor_state_dict({key: read(key) for key in keys}, header)
    return joined[name]


def _torchao() -> Any:
    try:
        import torchao.quantization as torchao
    except ImportError as error:
        raise InputError("quantised weights need torchao: pip install 'openlance[quantize]'") from error
    return torchao
