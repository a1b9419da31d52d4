"""Denoising on several devices, one process each: guidance branches or tokens are spread over the processes.

By guidance, each process runs branches of its own, and velocities are exchanged: a few numbers a step, but no
more processes than branches can help, and only while guidance acts. By tokens, each process runs a share of a
branch's tokens through the layers, and in each layer the keys and values of all are gathered; queries stay.
Training exchanges heads instead (`openlance.model.context_parallel`). With 2 heads of keys and values for 16
of queries, gathering moves fewer bytes on up to 8 processes, and needs no way back.

Each process holds all weights, and contexts are run on all. All take every decision alike: what is run whole
where steps are reused, and who goes on where a callback stops a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from openlance.config import SamplingConfig
from openlance.errors import InputError
from openlance.infer.generate import Branch, Cancelled, Denoising, OnStep, Pass, Step, Target, walk
from openlance.infer.step_cache import StepCache
from openlance.model.attention import Full, Gathered, Pattern, Streams
from openlance.model.cache import Workspace
from openlance.model.context_parallel import Share
from openlance.model.lance import Lance, Stack, Through


@torch.inference_mode()
def denoise_parallel(
    model: Lance,
    targets: Sequence[Target],
    config: SamplingConfig,
    on_step: OnStep | None = None,
    *,
    spread: str = "guidance",
    group: dist.ProcessGroup | None = None,
) -> list[Tensor | Cancelled]:
    """Denoise targets on all processes of a group, each → [frames, rows, columns, channels] float32.

    Every process calls it with the same targets and gets the same, which is what `denoise_together` gives, up
    to the rounding of sums. on_step: as there; a target is dropped where it returns False on any process.
    spread: "guidance" or "tokens". group: default all processes; it must serve tensors of the CPU too. Raises
    InputError where there is no such spread or no group, for reuse between steps where tokens are spread, and
    where the processes ask for different things.
    """
    check_spread(spread, config.reuse)
    if not dist.is_initialized():
        raise InputError("no processes to spread over: start with torchrun and call init_process_group first")
    group = dist.group.WORLD if group is None else group
    assert group is not None, "there is one once processes are initialised"
    _check_alike(targets, config, group)
    return walk(SPREADS[spread](model, targets, config, group), _shared(on_step, group))


def check_spread(spread: str, reuse: float = 0.0) -> None:
    """Raises InputError for what is no spread, and where it does not go with reuse between steps."""
    if spread not in SPREADS:
        raise InputError(f"spread must be one of {', '.join(SPREADS)}, not {spread!r}")
    if spread == "tokens" and reuse:
        raise InputError(
            "reuse between steps needs all tokens on one process: spread guidance, or set reuse 0"
        )


def _check_alike(targets: Sequence[Target], config: SamplingConfig, group: dist.ProcessGroup) -> None:
    """Processes that do not ask for the same would wait for each other for ever."""
    samples = [(*target.sample, *(target.negative or ())) for target in targets]
    asked: dict[str, Any] = {
        "size": [tuple(target.noise.shape) for target in targets],
        "words and media": [[(len(segment), segment.ids.tolist()) for segment in s] for s in samples],
        "seed": [float(target.noise.double().sum()) for target in targets],
        "settings": config,
    }
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, asked, group=group)
    for name in asked:
        if any(other[name] != everyone[0][name] for other in everyone):
            raise InputError(f"the processes ask for different things: give each the same {name}")


def _shared(on_step: OnStep | None, group: dist.ProcessGroup) -> OnStep:
    """The callbacks of all processes: one that stops a target stops it on all."""

    def asked(step: Step) -> bool:
        stop = torch.tensor([on_step is not None and on_step(step) is False], dtype=torch.uint8)
        dist.all_reduce(stop, dist.ReduceOp.MAX, group=group)
        return not stop.item()

    return asked


class GuidanceParallel(Denoising):
    """Denoising whose branches are spread over the processes of a group: all of a kind are one process's."""

    def __init__(
        self, model: Lance, targets: Sequence[Target], config: SamplingConfig, group: dist.ProcessGroup
    ):
        super().__init__(model, targets, config)
        self.group = group
        if self.reuse is not None:
            self.reuse = SharedStepCache(self.reuse, len(targets), group)

    def _pass(self, guided: bool) -> Pass:
        if guided not in self._passes:
            chosen = self._chosen(guided)
            sizes = {number: self.targets[number].segment.inner for number in self.running}
            exchange = Exchange(self.group, len({branch.kind for branch in chosen.values()}), sizes)
            own = [(stream, branch) for stream, branch in chosen.items() if exchange.owns(branch.kind)]
            self._passes[guided] = (
                BranchPass(self.model, self.space, own, self._rows, exchange)
                if own
                else Idle(self.reuse, exchange)
            )
        return self._passes[guided]


@dataclass(frozen=True, eq=False)
class Exchange:
    """Gives every process the velocities of all.

    kinds: of branches that are run. sizes: target → its tokens; each has a branch of every kind.
    """

    group: dist.ProcessGroup
    kinds: int
    sizes: dict[int, int]

    def owns(self, kind: int) -> bool:
        """Whether this process runs the branches of a kind."""
        return kind % self.group.size() == self.group.rank()

    def all(self, own: dict[int, list[Tensor]], like: Tensor) -> dict[int, list[Tensor]]:
        """Target → its velocities [n, C] float32, by kind. One exchange a kind serves all targets.

        own: those of this process. like: for the dtype and device of what arrives.
        """
        found: dict[int, list[Tensor]] = {number: [] for number in self.sizes}
        for kind in range(self.kinds):
            if self.owns(kind):
                some = torch.cat([own[number][kind // self.group.size()] for number in self.sizes])
            else:
                some = like.new_empty(sum(self.sizes.values()), like.shape[1])
            dist.broadcast(some, group=self.group, group_src=kind % self.group.size())
            for velocities, part in zip(found.values(), some.split([*self.sizes.values()]), strict=True):
                velocities.append(part)
        return found


class BranchPass(Pass):
    """The branches of this process; velocities are those of all."""

    def __init__(
        self,
        model: Lance,
        space: Workspace,
        own: list[tuple[int, Branch]],
        rows: Sequence[Tensor],
        exchange: Exchange,
    ):
        streams, branches = [stream for stream, _ in own], [branch for _, branch in own]
        super().__init__(model, space, streams, branches, torch.cat([rows[b.number] for b in branches]))
        self.exchange = exchange

    def velocities(self, state: Tensor, t: float, through: Through = Stack.run) -> dict[int, list[Tensor]]:
        return self.exchange.all(super().velocities(state, t, through), state)


class Idle(Pass):
    """A step in which this process has no branch to run."""

    def __init__(self, reuse: StepCache | None, exchange: Exchange):
        self.reuse, self.exchange = reuse, exchange

    def velocities(self, state: Tensor, t: float, through: Through = Stack.run) -> dict[int, list[Tensor]]:
        if isinstance(self.reuse, SharedStepCache):
            self.reuse.skip()
        return self.exchange.all({}, state)


class SharedStepCache(StepCache):
    """Reuse where a target's branches are spread over processes: what it does with one, it does with all."""

    def __init__(self, own: StepCache, targets: int, group: dist.ProcessGroup):
        super().__init__(own.threshold, own.order)
        self.targets, self.group = targets, group

    def skip(self) -> None:
        """A step without a branch of this process: what it kept is of the past then."""
        self._any(set())  # what is run whole, and what is not led on: those that work ask twice
        self._any(set())
        self._kept = {}

    def _any(self, targets: set[int]) -> set[int]:
        marks = torch.tensor([number in targets for number in range(self.targets)], dtype=torch.uint8)
        dist.all_reduce(marks, dist.ReduceOp.MAX, group=self.group)
        return set(marks.nonzero().flatten().tolist())


class TokenParallel(Denoising):
    """Denoising whose tokens are spread over the processes of a group, one branch after the other."""

    def __init__(
        self, model: Lance, targets: Sequence[Target], config: SamplingConfig, group: dist.ProcessGroup
    ):
        super().__init__(model, targets, config)
        self.group = group

    def _pass(self, guided: bool) -> Pass:
        if guided not in self._passes:
            single = [
                TokenPass(self.model, self.space, [stream], [branch], self._rows[branch.number], self.group)
                for stream, branch in self._chosen(guided).items()
            ]
            self._passes[guided] = OneByOne(single)
        return self._passes[guided]


class TokenPass(Pass):
    """One branch, of whose tokens this process runs a share."""

    def __init__(
        self,
        model: Lance,
        space: Workspace,
        streams: list[int],
        branches: list[Branch],
        rows: Tensor,
        group: dist.ProcessGroup,
    ):
        super().__init__(model, space, streams, branches, rows)
        assert isinstance(self.cache, Workspace)
        share = Share(self.batch.tokens, group)
        self.cache = Gathering(self.cache, share)
        held = len(share.own(torch.arange(share.tokens)))
        self.pattern = Gathered(_first(self.pattern, held, model.device), share)


class OneByOne(Pass):
    """Several passes, one after the other."""

    def __init__(self, passes: Sequence[Pass]):
        self.passes = passes

    def velocities(self, state: Tensor, t: float, through: Through = Stack.run) -> dict[int, list[Tensor]]:
        found: dict[int, list[Tensor]] = {}
        for single in self.passes:
            for number, velocities in single.velocities(state, t, through).items():
                found.setdefault(number, []).extend(velocities)
        return found


class Gathering(Workspace):
    """A workspace, with the same memory, that is given a share's keys and values and is written those of
    all."""

    def __init__(self, space: Workspace, share: Share):
        vars(self).update(vars(space))
        self._share = share

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        both = self._share.whole(torch.cat([key, value], dim=1), 0, self._share.tokens)
        return super().update(layer, *both.split(key.shape[1], dim=1))


def _first(pattern: Pattern, queries: int, device: torch.device) -> Full | Streams:
    """The pattern of one stream for some of its queries, of which each sees the same keys."""
    if isinstance(pattern, Full):
        return pattern
    assert isinstance(pattern, Streams)
    [group] = pattern.groups
    places = torch.arange(queries, device=device)
    return Streams((replace(group, queries=places[None]),), places)


SPREADS = {"guidance": GuidanceParallel, "tokens": TokenParallel}
