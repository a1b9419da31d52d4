"""DiffusionNFT (arXiv 2509.16117): learning from what was made, without trajectories and densities.

The targets are made by the ODE. Each is then noised anew, as in pre-training, and two policies that lie
around the one that made it, v⁺ = v_old + β (v − v_old) and v⁻ = v_old − β (v − v_old), are drawn to it in the
measure of its reward, and of what is missing to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openlance.flow.path import interpolate, time_grid
from openlance.flow.solver import Transition, euler
from openlance.rl.grpo import Judged
from openlance.rl.rollout import Targets, Visit, as_learnt
from openlance.train.settings import RLConfig


def merit(advantage: Tensor) -> Tensor:
    """In [0, 1], 0.5 for the mean of the group: 0.5 + 0.5 clip(A, ±1)."""
    return 0.5 + 0.5 * advantage.clamp(-1, 1)


@dataclass(frozen=True)
class NFT:
    """The algorithm; see `RLConfig` for its settings. The window's length is the number of times."""

    config: RLConfig
    compares = True

    def window(self, generator: torch.Generator) -> range:
        """How many times each target is learnt from."""
        return range(self.config.window)

    def explore(
        self, targets: Targets, window: range, generator: torch.Generator
    ) -> tuple[Tensor, list[Visit]]:
        """Make the targets: (their states at the end, noised states of them)."""
        grid = time_grid(self.config.rollout_steps, self.config.time_shift)
        with torch.no_grad():
            *_, clean = euler(targets.velocity, targets.draw(generator), grid)
        return clean, [self._visit(targets, clean, number, generator) for number in window]

    def _visit(self, targets: Targets, clean: Tensor, number: int, generator: torch.Generator) -> Visit:
        """At a time of its own share of [0, 1], so that the times are spread evenly."""
        share = (number + float(torch.rand((), generator=generator))) / self.config.window
        t = min(max(share, 1e-3), 1.0)
        times = torch.full(clean.shape[:-1], t, device=clean.device)
        state, velocity = interpolate(clean, targets.draw(generator), times)
        return Visit(targets, Transition(t, t), state, as_learnt(targets, state, t), velocity)

    def judge(self, visit: Visit, velocity: Tensor, advantage: Tensor) -> Judged:
        """The loss of a visit, whose velocity is now this one and whose targets have advantages [members]."""
        wanted = merit(advantage)
        change = self.config.strength * (velocity - visit.velocity)
        towards, away = (
            (visit.velocity + sign * change - visit.goal).square().flatten(1).mean(1) for sign in (1, -1)
        )
        loss = wanted * towards + (1 - wanted) * away
        numbers = {"moved": (velocity - visit.velocity).detach().square().flatten(1).mean(1)}
        if visit.reference is not None:
            kl = (velocity - visit.reference).square().flatten(1).mean(1)
            loss, numbers["kl"] = loss + self.config.kl * kl, kl.detach()
        return Judged(loss, numbers)
