"""Reuse between denoising steps: where little changed, only the first layer runs (first-block caching).

What the first layer adds to the latents tells how far the others' work has moved since they were last run;
where that is little, what they added then is added again, and nearly all of a step is saved. It is an
approximation, off by default. Of order 1, what they added is not taken as it was but led on, along the line
through the last two whole evaluations, over the solver's own times (a forecast as in arXiv 2503.06923).

Everything is kept for each guidance branch by itself, and a target's branches are reused together or not at
all: what guidance amplifies is their difference, so both must be of the same moment. Where one of them has
nothing kept, as when guidance begins to act, they are run whole; where one has no line yet, none is led on.
Guidance acts on velocities, as ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openlance.model.lance import Halves, Stack

if TYPE_CHECKING:
    from openlance.infer.generate import Pass

Key = tuple[int, int]
"""Of a branch: its target, and its kind."""


@dataclass(frozen=True, eq=False)
class Kept:
    """Of a branch's last whole evaluation, at time t: what the first layer added, and the others; [n, hidden]
    each. slope: of the latter over time, [n, hidden], once there were two."""

    first: Tensor
    rest: Tensor
    t: float
    slope: Tensor | None = None

    def at(self, t: float) -> Tensor:
        """What the other layers would add at a time, by the slope; [n, hidden]."""
        assert self.slope is not None
        return self.rest + self.slope * (t - self.t)

    def change(self, first: Tensor) -> Tensor:
        """How far the first layer's work is from what is kept, relative to that; a scalar on the device."""
        apart, size = (x.abs().mean(dtype=torch.float32) for x in (first - self.first, self.first))
        return apart / size


class StepCache:
    """The layers of one denoising, where not all of them need to run at each step.

    threshold: of the relative change of the first layer's work. order: 0 adds again what was added, 1 leads
    it on. runs: for each step, how many branches were run whole, and of how many.
    """

    def __init__(self, threshold: float, order: int = 0):
        self.threshold, self.order = threshold, order
        self.runs: list[tuple[int, int]] = []
        self._kept: dict[Key, Kept] = {}

    def through(self, stack: Stack, halves: Halves, *, now: Pass, t: float) -> Halves:
        """Run the layers over a pass at time t; of what comes out, only the gen half is of the last layer."""
        keys = [(branch.number, branch.kind) for branch in now.branches]
        sizes = [branch.segment.inner for branch in now.branches]
        first = stack.run(halves, 0, 1)
        before = first["gen"].split(sizes)
        added = dict(zip(keys, (first["gen"] - halves["gen"]).split(sizes), strict=True))
        fresh = self._fresh(added)
        again = self._again({key for key in keys if key[0] not in fresh}, t)
        outs = [x + again[key] if key in again else x for key, x in zip(keys, before, strict=True)]
        chosen = [place for place, key in enumerate(keys) if key[0] in fresh]
        if chosen:
            whole = len(chosen) == len(keys)
            stack, some = (stack, first) if whole else now.part(stack, first, chosen)
            ran = stack.run(some, 1)["gen"].split([sizes[place] for place in chosen])
            for place, out in zip(chosen, ran, strict=True):
                outs[place] = out
                key = keys[place]
                self._kept[key] = self._keep(key, added[key], out - before[place], t)
        self._kept = {key: self._kept[key] for key in keys}  # a branch that is left out begins anew
        self.runs.append((len(chosen), len(keys)))
        return {"und": first["und"], "gen": torch.cat(outs)}

    def _again(self, keys: set[Key], t: float) -> dict[Key, Tensor]:
        """What the layers behind the first add to branches that are not run."""
        flat = self._any({key[0] for key in keys if self._kept[key].slope is None})
        return {key: self._kept[key].rest if key[0] in flat else self._kept[key].at(t) for key in keys}

    def _keep(self, key: Key, first: Tensor, rest: Tensor, t: float) -> Kept:
        """Of a whole evaluation of a branch, and of the one before where the order asks for it."""
        last = self._kept.get(key)
        if self.order == 0 or last is None or last.t == t:
            return Kept(first, rest, t)
        return Kept(first, rest, t, (rest - last.rest) / (t - last.t))

    def _fresh(self, added: dict[Key, Tensor]) -> set[int]:
        """The targets to be run whole. Reads the device once."""
        known = [key for key in added if key in self._kept]
        fresh = {key[0] for key in added if key not in self._kept}
        if known:
            changes = torch.stack([self._kept[key].change(added[key]) for key in known]).tolist()
            fresh |= {key[0] for key, c in zip(known, changes, strict=True) if not c < self.threshold}
        return self._any(fresh)

    def _any(self, targets: set[int]) -> set[int]:
        """The targets of which any branch says so; a branch of another process can (`infer.parallel`)."""
        return targets
