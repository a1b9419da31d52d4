"""Denoising on several devices, one process each: guidance branches or tokens are spread over the processes.

By guidance, each process runs branches of its own, and velocities are exchanged: a few numbers a step, but no
more processes than branches can help, and only while guidance acts. By tokens, each process runs a share of a
branch's tokens through the layers, and in each layer the keys and values of all are gathered; queries stay.
Training exchanges heads instead (`openlance.model.context_parallel`). With 2 heads of keys and values for 16
of queries, gathering moves fewer bytes on up to 8 processes, and needs no way back.

Each process holds all weights, and contexts are run on all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from openlance.config import SamplingConfig
from openlance.errors import InputError
from openlance.flow.multistep import SOLVERS
from openlance.flow.path import time_grid
from openlance.infer.generate import Branch, Denoising, Pass, Target
from openlance.model.attention import Full, Gathered, Pattern, Streams
from openlance.model.cache import Workspace
from openlance.model.context_parallel import Share
from openlance.model.lance import Lance, Stack, Through


@torch.inference_mode()
def denoise_parallel(
    model: Lance,
    targets: Sequence[Target],
    config: SamplingConfig,
    *,
    spread: str = "guidance",
    group: dist.ProcessGroup | None = None,
) -> list[Tensor]:
    """Denoise targets on all processes of a group, each → [frames, rows, columns, channels] float32.

    Every process calls it with the same arguments and gets the same, which is what `denoise_together` gives,
    up to the rounding of sums. spread: "guidance" or "tokens". group: default all processes. Raises
    InputError where there is no such spread or no group, and for reuse between steps where tokens are spread.
    """
    if spread not in SPREADS:
        raise InputError(f"spread must be one of {', '.join(SPREADS)}, not {spread!r}")
    if spread == "tokens" and config.reuse:
        raise InputError(
            "reuse between steps needs all tokens on one process: spread guidance, or set reuse 0"
        )
    if not dist.is_initialized():
        raise InputError("no processes to spread over: start with torchrun and call init_process_group first")
    group = dist.group.WORLD if group is None else group
    assert group is not None, "there is one once processes are initialised"
    work = SPREADS[spread](model, targets, config, group)
    *_, last = SOLVERS[config.solver](work.velocity, work.start, time_grid(config.steps, config.shift))
    return work.latents(last)


class GuidanceParallel(Denoising):
    """Denoising whose branches are spread over the processes of a group."""

    def __init__(
        self, model: Lance, targets: Sequence[Target], config: SamplingConfig, group: dist.ProcessGroup
    ):
        super().__init__(model, targets, config)
        self.group = group

    def _pass(self, guided: bool) -> Pass:
        if guided not in self._passes:
            kinds = sorted({branch.kind for branch in self.branches}) if guided else [0]
            own = kinds[self.group.rank() :: self.group.size()] or [0]  # who has none helps nobody by waiting
            chosen = {s: branch for s, branch in enumerate(self.branches) if branch.kind in own}
            rows = torch.cat([self._rows[branch.number] for branch in chosen.values()])
            self._passes[guided] = BranchPass(
                self.model, self.space, list(chosen), list(chosen.values()), rows, kinds, self.group
            )
        return self._passes[guided]


class BranchPass(Pass):
    """The branches of this process; velocities are those of all. kinds: of branches, in their order."""

    def __init__(
        self,
        model: Lance,
        space: Workspace,
        streams: list[int],
        branches: list[Branch],
        rows: Tensor,
        kinds: list[int],
        group: dist.ProcessGroup,
    ):
        super().__init__(model, space, streams, branches, rows)
        self.kinds, self.group = kinds, group

    def velocities(self, state: Tensor, t: float, through: Through = Stack.run) -> dict[int, list[Tensor]]:
        """Every target has a branch of every kind, so one exchange a kind serves all targets."""
        own = super().velocities(state, t, through)
        mine = sorted({branch.kind for branch in self.branches})
        found: dict[int, list[Tensor]] = {number: [] for number in own}
        for place, kind in enumerate(self.kinds):
            owner = place % self.group.size()
            if owner == self.group.rank():
                some = torch.cat([velocities[mine.index(kind)] for velocities in own.values()])
            else:
                some = torch.cat([torch.empty_like(velocities[0]) for velocities in own.values()])
            dist.broadcast(some, group=self.group, group_src=owner)
            parts = some.split([len(velocities[0]) for velocities in own.values()])
            for velocities, part in zip(found.values(), parts, strict=True):
                velocities.append(part)
        return found


class TokenParallel(Denoising):
    """Denoising whose tokens are spread over the processes of a group, one branch after the other."""

    def __init__(
        self, model: Lance, targets: Sequence[Target], config: SamplingConfig, group: dist.ProcessGroup
    ):
        super().__init__(model, targets, config)
        self.group = group

    def _pass(self, guided: bool) -> Pass:
        if guided not in self._passes:
            chosen = [(s, b) for s, b in enumerate(self.branches) if guided or b.kind == 0]
            single = [
                TokenPass(self.model, self.space, [stream], [branch], self._rows[branch.number], self.group)
                for stream, branch in chosen
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
