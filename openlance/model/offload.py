"""Weights that wait on the host and are on the device only while they are needed.

Work goes in phases, and each needs few of the weights: the vision tower looks, the experts run a context,
denoise or answer, the VAE encodes or decodes. A `Placement` brings what a phase needs when the first of it is
called, and drops what stands in the way; of the experts it keeps as many layers as it was told, and copies
the others one ahead of their use. Nothing is computed elsewhere or otherwise, so results are the same, bit
for bit; the token embedding alone is looked up on the host, which takes rows of it and is exact as well.

It hooks into modules and changes none of their code: without a placement nothing of this runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from openlance.model.cache import Workspace
from openlance.model.experts import EXPERTS
from openlance.model.lance import Lance
from openlance.model.quantize import pieces, placed, scheme_of, stored_bytes
from openlance.model.vae import VAE

PARTS_IN: dict[str, str | None] = {
    "encode": "encoder",
    "look": "vision",
    "context": None,
    "denoise": None,
    "answer": "head",
    "decode": "decoder",
}
"""Phase -> the part that it needs as a whole. The experts run in context, denoise and answer."""
SLOTS = 2  # layers of an expert on the device that are there for their turn only: the one that runs, the next

Layers = Mapping[str, int]
"""Expert -> how many of its layers are kept on the device."""


def spread(layers: int) -> list[int]:
    """Numbers of layers in an order whose every beginning lies evenly among them: by their bits, reversed.

    What is kept is spread so that the layers between two that are copied give the copy time.
    """
    bits = max(layers - 1, 1).bit_length()
    return sorted(range(layers), key=lambda number: int(f"{number:0{bits}b}"[::-1], 2))


class Placement:
    """A model and its VAE, computing on `device` with the weights on the host.

    plan: phase -> the layers of each expert that stay on the device in it; a phase not named keeps none. The
    weights must be on the host, and are left there, in page-locked memory for a GPU: what goes to the device
    is a copy. `phase` is the current one.
    """

    def __init__(
        self, model: Lance, vae: VAE | None, device: torch.device, plan: Mapping[str, Layers]
    ) -> None:
        self.model, self.vae, self.device, self.plan = model, vae, device, plan
        self.begin()

    def begin(self) -> None:
        """Take hold of the weights, which are on the host."""
        model, vae, device = self.model, self.vae, self.device
        self.phase: str | None = None
        experts = [name for name in EXPERTS if name in model.parts]
        self._layers = {name: [Parcel(device, layer[name]) for layer in model.layers] for name in experts}  # type: ignore[index]
        self._order = spread(len(model.layers))
        self._parts = {name: Parcel(device, *modules) for name, modules in _parts(model, vae).items()}
        self._rest = Parcel(device, *_rest(model))
        self._belts: dict[str, Belt] = {}
        self._hooks: list[Any] = []
        self._rest.bring()
        self._watch()
        model.runs_on = device
        if vae is not None:
            vae.runs_on = device

    def enter(self, phase: str) -> None:
        """Bring what the phase needs and keeps, and drop all else."""
        if phase == self.phase:
            return
        for belt in self._belts.values():
            belt.stop()
        self._belts.clear()
        kept = self.plan.get(phase, {})
        stay = {name: set(self._order[: kept.get(name, 0)]) for name in self._layers}
        wanted = [parcels[n] for name, parcels in self._layers.items() for n in stay[name]]
        part = PARTS_IN[phase]
        wanted += [self._parts[part]] if part is not None else []
        every = [*self._parts.values(), *(one for parcels in self._layers.values() for one in parcels)]
        for parcel in every:
            if parcel not in wanted:
                parcel.drop()
        for parcel in wanted:
            parcel.bring()
        for name, parcels in self._layers.items():
            moved = {n: parcel for n, parcel in enumerate(parcels) if n not in stay[name]}
            self._belts[name] = Belt(moved, self.device)
        self.phase = phase

    @property
    def held(self) -> int:
        """Bytes of weights on the device now."""
        parcels = [self._rest, *self._parts.values()]
        parcels += [one for belongs in self._layers.values() for one in belongs]
        slots = [tensor for belt in self._belts.values() for tensor in belt.tensors]
        kept = [tensor for parcel in parcels if parcel.away for tensor in parcel.host]
        return sum(map(stored_bytes, slots + kept))

    def leave(self) -> None:
        """Everything on the host again, as it was before."""
        self.enter("context")
        for belt in self._belts.values():
            belt.stop()
        for hook in self._hooks:
            hook.remove()
        for parcels in self._layers.values():
            for parcel in parcels:
                parcel.drop()
        self._rest.drop()
        self.model.runs_on = None
        if self.vae is not None:
            self.vae.runs_on = None

    def _watch(self) -> None:
        """Hooks where a phase begins, and around every layer."""
        model, hooks = self.model, self._hooks
        hooks.append(model.embed.register_forward_pre_hook(lambda _, ids: (ids[0].cpu(),)))
        hooks.append(model.embed.register_forward_hook(lambda _, ids, rows: rows.to(self.device)))
        begins: dict[str, nn.Module] = {"answer": model.head}
        if "vision" in model.parts:
            begins["look"] = model.vision
        if self.vae is not None:
            begins |= {"encode": self.vae.net.encoder.conv_in, "decode": self.vae.net.post_quant_conv}
        for phase, module in begins.items():
            hooks.append(module.register_forward_pre_hook(lambda _, args, phase=phase: self.enter(phase)))
        for number, layer in enumerate(model.layers):
            hooks.append(layer.register_forward_pre_hook(lambda _, args, n=number: self._before(n, *args)))
            hooks.append(layer.register_forward_hook(lambda _, args, out, n=number: self._after(n, args[0])))

    def _before(
        self, number: int, halves: Mapping[str, Tensor], table: Any, pattern: Any, cache: Any, layer: int
    ) -> None:
        """A layer is about to run on these halves: contexts grow a cache, all else has a workspace."""
        on_top = isinstance(cache, Workspace)
        self.enter(("denoise" if "gen" in halves else "answer") if on_top else "context")
        for name in halves:
            self._belts[name].take(number)

    def _after(self, number: int, halves: Mapping[str, Tensor]) -> None:
        for name in halves:
            self._belts[name].give_back(number)


@contextmanager
def paused(placement: Placement | None) -> Iterator[None]:
    """Everything on the host, for what changes weights."""
    if placement is not None:
        placement.leave()
    try:
        yield
    finally:
        if placement is not None:
            placement.begin()


class Parcel:
    """The weights of some modules: on the host always, and as a copy on the device at times."""

    def __init__(self, device: torch.device, *modules: nn.Module) -> None:
        self.device = device
        self._places = list(_places(modules))
        if device.type == "cuda":
            self._places = [(store, key, _pinned(tensor)) for store, key, tensor in self._places]
        self.away = False
        self.drop()

    @property
    def host(self) -> list[Tensor]:
        return [tensor for _, _, tensor in self._places]

    def bring(self) -> None:
        """Copy them to the device, where they are not there."""
        if not self.away:
            self.use([_copy(tensor, self.device) for tensor in self.host])

    def use(self, tensors: list[Tensor]) -> None:
        """Let the modules compute with these tensors."""
        for (store, key, _), tensor in zip(self._places, tensors, strict=True):
            store[key] = tensor
        self.away = True

    def drop(self) -> None:
        """Let the modules hold what is on the host."""
        for store, key, tensor in self._places:
            store[key] = tensor
        self.away = False


@dataclass(eq=False)
class Slot:
    """Room on the device for one layer. holds: its number. filled, free: events of CUDA, when the copy into
    it is done, and when nothing computes with it any more."""

    tensors: list[Tensor]
    holds: int | None = None
    filled: Any = None
    free: Any = None


@dataclass(eq=False)
class Belt:
    """Layers of one expert that are on the device for their turn only.

    While one runs, the next is copied into the other of two slots: on CUDA on a stream of its own, ordered by
    events, so that the copy hides behind the computation, and memory does not grow however far the host runs
    ahead.
    """

    parcels: Mapping[int, Parcel]
    device: torch.device
    _slots: list[Slot] = field(default_factory=list)
    _stream: Any = None

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for slot in self._slots for tensor in slot.tensors]

    def take(self, number: int) -> None:
        """Let a layer compute on the device, and send for the one after it. One that stays there does so."""
        if number not in self.parcels:
            return
        slot = self._holding(number) or self._fetch(number, busy=None)
        if slot.filled is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.filled)
        self.parcels[number].use(slot.tensors)
        following = self._following(number)
        if self._holding(following) is None:
            self._fetch(following, busy=slot)

    def give_back(self, number: int) -> None:
        if number in self.parcels:
            self.parcels[number].drop()
            slot = self._holding(number)
            assert slot is not None
            slot.free = self._event()

    def stop(self) -> None:
        """Give up the slots; every layer is on the host."""
        for parcel in self.parcels.values():
            parcel.drop()
        if self._stream is not None:  # copies that nobody waited for still write to the slots
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self._slots.clear()

    def _following(self, number: int) -> int:
        """The next of these layers, after the last the first."""
        return min(self.parcels, key=lambda other: (other <= number, other))

    def _holding(self, number: int) -> Slot | None:
        return next((slot for slot in self._slots if slot.holds == number), None)

    def _fetch(self, number: int, busy: Slot | None) -> Slot:
        """Copy a layer into a slot that nothing computes with."""
        host = self.parcels[number].host
        slot = next((slot for slot in self._slots if slot is not busy), None)
        if slot is None or len(self._slots) < SLOTS:
            slot = Slot([_empty_like(tensor, self.device) for tensor in host], free=self._event())
            self._slots.append(slot)
        elif [tensor.shape for tensor in slot.tensors] != [tensor.shape for tensor in host]:  # adapters
            slot.tensors = [_empty_like(tensor, self.device) for tensor in host]
        slot.holds = number
        if self.device.type != "cuda":
            _fill(slot.tensors, host)
            return slot
        self._stream = self._stream or torch.cuda.Stream(self.device)
        self._stream.wait_event(slot.free)
        with torch.cuda.stream(self._stream):
            _fill(slot.tensors, host)
            slot.filled = self._stream.record_event()
        return slot

    def _event(self) -> Any:
        """Now, on the stream that computes."""
        return torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None


def _parts(model: Lance, vae: VAE | None) -> dict[str, list[nn.Module]]:
    """What goes to the device as a whole."""
    parts: dict[str, list[nn.Module]] = {"head": [model.head]}
    if "vision" in model.parts:
        parts["vision"] = [model.vision]
    if vae is not None:
        parts["encoder"] = [vae.net.encoder, vae.net.quant_conv]
        parts["decoder"] = [vae.net.decoder, vae.net.post_quant_conv]
    return parts


def _rest(model: Lance) -> list[nn.Module]:
    """What is small, and stays on the device."""
    apart = ("embed", "head", "layers", "vision")
    return [module for name, module in model.named_children() if name not in apart]


def _places(modules: tuple[nn.Module, ...]) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Where each weight and buffer of the modules is kept: a dictionary and the name in it."""
    for module in modules:
        for owner in module.modules():
            for store in (owner._parameters, owner._buffers):
                yield from ((store, key, tensor) for key, tensor in store.items() if tensor is not None)


def _plain(tensor: Tensor) -> list[Tensor]:
    """A tensor, or what a quantised one consists of."""
    return [tensor] if scheme_of(tensor) is None else list(pieces(tensor).values())


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    made = _empty_like(tensor, device)
    _fill([made], [tensor])
    return made


def _empty_like(tensor: Tensor, device: torch.device) -> Tensor:
    """Of the same kind; a quantised one comes filled."""
    if scheme_of(tensor) is None:
        made = torch.empty_like(tensor, device=device, requires_grad=False)
    else:
        made = placed(tensor, device, tensor.dtype)
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


@torch.no_grad()
def _fill(tensors: list[Tensor], host: list[Tensor]) -> None:
    for target, source in zip(tensors, host, strict=True):
        for into, of in zip(_plain(target), _plain(source), strict=True):
            into.copy_(of, non_blocking=True)


def _pinned(tensor: Tensor) -> Tensor:
    """In page-locked memory, from which a copy runs beside the computation."""
    if scheme_of(tensor) is not None:
        return tensor
    locked = tensor.detach().pin_memory()
    return nn.Parameter(locked, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else locked
