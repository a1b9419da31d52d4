"""How a model works in the memory that there is: what of it is where, phase by phase.

Every plan here is exact. They are tried from the fastest to the thriftiest, and the first that fits wins: all
weights on the device; else weights on the host, where each phase of the work brings what it needs (see
`openlance.model.offload`) and, of the experts, keeps as many layers as there is room for, the others being
copied just ahead of their use. In either, the VAE runs whole, or frame by frame, or in tiles as well.

What is needed is reckoned by `openlance.infer.memory`; a fifth is left on top for what a device takes itself.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from openlance.config import ModelConfig
from openlance.errors import InputError
from openlance.infer.memory import Estimator
from openlance.infer.orders import PARTS_OF
from openlance.model.checkpoint import parameter_shapes
from openlance.model.experts import EXPERTS
from openlance.model.offload import PARTS_IN, SLOTS
from openlance.model.quantize import Scheme, scheme_for
from openlance.model.tiles import Tiles
from openlance.sequence.template import Task

log = logging.getLogger("openlance")

MARGIN = 1.2
AMPLE = 3
"""Times the weights: where so much is free, nothing is reckoned."""
TILINGS = (None, Tiles(), Tiles(side=32), Tiles(side=16))
USES: dict[str, tuple[str, ...]] = {
    "context": ("und", "gen"),
    "denoise": ("gen", "und"),
    "answer": ("und",),
}
"""Phase -> the experts that run in it, the one that does most of the work first."""

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Weights:
    """Bytes of what is moved as one.

    layer: of one layer, by expert; layers: how many an expert has. parts: "encoder", "decoder", "vision",
    "head". embed: the token embedding, looked up on the host where anything is. rest: always on the device.
    """

    layers: int
    layer: dict[str, int]
    parts: dict[str, int]
    embed: int
    rest: int

    @property
    def all(self) -> int:
        return self.layers * sum(self.layer.values()) + sum(self.parts.values()) + self.embed + self.rest


@dataclass(frozen=True)
class Plan:
    """What a model does to stay within a budget, in bytes.

    resident: all weights are on the device. layers: else, phase -> expert -> layers that stay there in it.
    tiles: how the VAE runs. phases: phase -> bytes reckoned, weights and work, without the margin. tokens:
    that may run together: those of one request with guidance, and as many as there is room for.
    """

    tasks: tuple[Task, ...]
    budget: int
    weights: Weights
    resident: bool
    tiles: Tiles | None
    phases: dict[str, int]
    tokens: int
    layers: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes at most, without the margin."""
        return max(self.phases.values())

    def __str__(self) -> str:
        """In one line."""
        where = max(self.phases, key=self.phases.__getitem__)
        most = f"about {self.peak / 1e9:.3g} GB of {self.budget / 1e9:.3g} ({where}, estimated)"
        return "; ".join([*self._placed(), *self._tiled(), most])

    def _placed(self) -> Iterator[str]:
        if self.resident:
            yield "all weights on the device"
            return
        yield "weights wait on the host and come for their phase"
        copied = []
        for phase, experts in USES.items():
            few = [f"{kept} {name}" for name in experts if (kept := self._kept(phase, name)) is not None]
            copied += [f"{phase} keeps {' and '.join(few)}"] if few else []
        if copied:
            each = f"of {self.weights.layers} layers each, the others are copied ahead of their turn"
            yield f"{', '.join(copied)} {each}"

    def _kept(self, phase: str, expert: str) -> int | None:
        """Layers that stay, where not all of them do."""
        kept = self.layers.get(phase, {}).get(expert, self.weights.layers)
        return None if kept == self.weights.layers else kept

    def _tiled(self) -> Iterator[str]:
        if self.tiles is not None:
            side = self.tiles.side
            yield "the VAE works frame by frame" + (f", in tiles of {side} cells" if side else "")


def parse_memory(text: str | int) -> int:
    """ "8GB", "7.5 GiB" or a number of bytes, in bytes. Raises InputError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = match[2].upper() if match else None
    bare = unit == "" and not isinstance(text, int)
    if match is None or unit not in UNITS or bare or not float(match[1]):
        raise InputError(f"max_memory must be a size such as 8GB or 7.5GiB, not {text!r}")
    return int(float(match[1]) * UNITS[unit])


def make_plan(
    estimator: Estimator,
    tasks: Sequence[Task],
    dtype: torch.dtype,
    budget: int,
    schemes: Mapping[str, Scheme] | None = None,
) -> Plan:
    """The fastest plan whose peak, with the margin, is within `budget` bytes for each of the tasks.

    Requests are of the configuration's sizes. schemes: of parts that are quantised. Raises InputError where
    nothing fits, naming what the thriftiest plan needs.
    """
    room, tasks = int(budget / MARGIN), tuple(tasks)
    weights = weigh(estimator.config, tasks, dtype, schemes or {}, estimator.shapes)
    tokens = 2 * max(estimator.need(task, dtype).tokens for task in tasks)
    working_with = partial(_working, estimator, tasks, dtype)  # reckoned only for what is tried
    for tiles in TILINGS if weights.all <= room else ():
        working = working_with(tiles)
        phases = {phase: weights.all + size for phase, size in working.items()}
        if max(phases.values()) <= room:
            most = _together(tokens, phases, working, room)
            return Plan(tasks, budget, weights, True, tiles, phases, most)
    for tiles in TILINGS:
        working = working_with(tiles)
        kept = {phase: _keep(weights, phase, room - size) for phase, size in working.items()}
        if all(layers is not None for layers in kept.values()):
            layers = {phase: found for phase, found in kept.items() if found is not None}
            phases = {phase: _taken(weights, phase, layers[phase]) + size for phase, size in working.items()}
            most = _together(tokens, phases, working, room)
            return Plan(tasks, budget, weights, False, tiles, phases, most, layers)
    least = max(_taken(weights, phase, {}) + size for phase, size in working.items())
    raise InputError(
        f"max_memory {budget / 1e9:.3g} GB is too little for {', '.join(tasks)}: "
        f"{least * MARGIN / 1e9:.3g} GB would do; or choose a smaller resolution"
    )


def weigh(
    config: ModelConfig,
    tasks: Sequence[Task],
    dtype: torch.dtype,
    schemes: Mapping[str, Scheme],
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]] | None = None,
) -> Weights:
    """The weights that these tasks load. shapes: of the parameters, where they are known already."""
    wanted = frozenset().union(*(PARTS_OF[task] for task in tasks))
    sums: dict[str, int] = {}
    for part, named in (shapes or parameter_shapes(config)).items():
        for name, shape in named.items() if part in wanted else ():
            scheme = None if part == "vae" else scheme_for(schemes, name, shape)
            size = math.prod(shape) * dtype.itemsize if scheme is None else scheme.matrix_bytes(shape)
            unit = _unit(name, part)
            sums[unit] = sums.get(unit, 0) + size
    layers = config.backbone.layers
    return Weights(
        layers,
        {name: sums.pop(name) // layers for name in EXPERTS if name in sums},
        {name: sums.pop(name) for name in ("encoder", "decoder", "vision", "head") if name in sums},
        sums.pop("embed"),
        sum(sums.values()),
    )


def plan_for(
    config: ModelConfig,
    tasks: Sequence[Task],
    dtype: torch.dtype,
    device: torch.device,
    max_memory: str | int | None,
    schemes: Mapping[str, Scheme],
) -> Plan | None:
    """The plan for a budget, or else for what a GPU has free, said in the log; None: nothing to keep to.

    Raises InputError where nothing fits, and for a device that shares the host's memory where not all
    weights do.
    """
    if max_memory is None:
        if device.type != "cuda":
            return None
        budget = torch.cuda.mem_get_info(device)[0]
        if budget > AMPLE * weigh(config, tasks, dtype, schemes).all:
            return None
    else:
        budget = parse_memory(max_memory)
    plan = make_plan(Estimator(config), tasks, dtype, budget, schemes)
    if not plan.resident and device.type != "cuda":
        raise InputError(
            f"max_memory {budget / 1e9:.3g} GB: on {device.type} the weights alone take "
            f"{plan.weights.all / 1e9:.3g} GB; there is nowhere else to keep them"
        )
    if not plan.resident and any(scheme.name == "int4" for scheme in schemes.values()):
        raise InputError("int4 is packed for the device it is on, and cannot wait on the host: choose int8")
    if max_memory is not None or not plan.resident or plan.tiles is not None:
        log.warning("memory: %s", plan)
    return plan


def _unit(name: str, part: str) -> str:
    """What a parameter is moved with."""
    if part == "vae":
        return "encoder" if name.startswith(("net.encoder.", "net.quant_conv.")) else "decoder"
    if name.startswith("layers."):
        return name.split(".")[2]
    first = name.split(".")[0]
    return first if first in ("embed", "head", "vision") else "rest"


def _working(
    estimator: Estimator, tasks: Sequence[Task], dtype: torch.dtype, tiles: Tiles | None
) -> dict[str, int]:
    """Phase -> the most that any of the tasks needs beside weights."""
    found: dict[str, int] = {}
    for task in tasks:
        for phase, size in estimator.need(task, dtype, tiles).phases.items():
            found[phase] = max(found.get(phase, 0), size)
    return found


def _together(tokens: int, phases: Mapping[str, int], working: Mapping[str, int], room: int) -> int:
    """Tokens for which there is room, where one request has so many: the network's work grows as they do."""
    spare = {phase: (room - phases[phase]) / working[phase] for phase in working if phase in USES}
    return int(tokens * (1 + min(spare.values())))


def _taken(weights: Weights, phase: str, layers: Mapping[str, int]) -> int:
    """Bytes of weights on the device in a phase that keeps so many layers."""
    part = PARTS_IN[phase]
    taken = weights.rest + (0 if part is None else weights.parts.get(part, 0))
    for name, size in weights.layer.items():
        kept = layers.get(name, 0)
        copied = weights.layers - kept if name in USES.get(phase, ()) else 0
        taken += size * (kept + min(copied, SLOTS))
    return taken


def _keep(weights: Weights, phase: str, room: int) -> dict[str, int] | None:
    """How many layers of each expert stay on the device in a phase, of as many as fit; None: not even none.

    Experts that run come first. Others stay where there is room, so that they need not be brought again.
    """
    kept: dict[str, int] = {}
    if _taken(weights, phase, kept) > room:
        return None
    uses = USES.get(phase, ())
    for name in sorted(weights.layer, key=lambda name: uses.index(name) if name in uses else len(uses)):
        for count in range(weights.layers, -1, -1):
            if _taken(weights, phase, kept | {name: count}) <= room:
                kept[name] = count
                break
    return kept
