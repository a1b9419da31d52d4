"""GRPO for flow matching (Flow-GRPO, arXiv 2505.05470): groups, advantages, the clipped loss.

A window of the denoising steps is stochastic. Each of its steps is a Gaussian with a density, and what leads
to a higher reward than the rest of the group is made denser.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openlance.flow.path import time_grid
from openlance.flow.solver import transitions, walk
from openlance.rl.rollout import Targets, Visit, as_learnt
from openlance.train.settings import RLConfig

SMALL = 1e-4  # keeps a group of nearly equal rewards from being blown up
LARGEST = 5.0


def advantages(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """(advantages, whether there is any spread), [..., group] and [...] bool, of rewards [..., group].

    A = (R − mean of the group) / (its standard deviation + 1e-4), within ±5; 0 without spread.
    """
    spread = rewards.amax(-1) > rewards.amin(-1)  # asked exactly: a rounded mean differs from equal rewards
    centred = rewards - rewards.mean(-1, keepdim=True)
    scaled = centred / (rewards.std(-1, correction=0, keepdim=True) + SMALL)
    return scaled.clamp(-LARGEST, LARGEST) * spread[..., None], spread


def clipped(ratio: Tensor, advantage: Tensor, ratio_range: float) -> Tensor:
    """max(−A r, −A clip(r, 1 ± range)) for each."""
    bounded = ratio.clamp(1 - ratio_range, 1 + ratio_range)
    return torch.maximum(-advantage * ratio, -advantage * bounded)


@dataclass(frozen=True, eq=False)
class Judged:
    """What a visit comes to: the loss of each target and numbers to report, each [members]."""

    loss: Tensor
    numbers: dict[str, Tensor]


@dataclass(frozen=True)
class GRPO:
    """The algorithm; see `RLConfig` for its settings."""

    config: RLConfig
    compares = True

    def window(self, generator: torch.Generator) -> range:
        """Which steps are stochastic in this rollout."""
        places = self.config.window_steps - self.config.window + 1
        first = int(torch.randint(places, (), generator=generator))
        return range(first, first + self.config.window)

    def explore(
        self, targets: Targets, window: range, generator: torch.Generator
    ) -> tuple[Tensor, list[Visit]]:
        """Make the targets: (their states at the end, the stochastic steps on the way)."""
        steps = transitions(
            time_grid(self.config.rollout_steps, self.config.time_shift), window, self.config.noise
        )
        learnt = {step.t for step in steps if step.stochastic}

        def velocity(state: Tensor, t: float) -> Tensor:
            return as_learnt(targets, state, t) if t in learnt else targets.velocity(state, t)

        with torch.no_grad():
            moves = list(walk(velocity, targets.draw(generator), steps, lambda _: targets.draw(generator)))
        visits = [
            Visit(targets, move.step, move.before, move.velocity, move.after)
            for move in moves
            if move.step.stochastic
        ]
        return moves[-1].after, visits

    def judge(self, visit: Visit, velocity: Tensor, advantage: Tensor) -> Judged:
        """The loss of a visit, whose velocity is now this one and whose targets have advantages [members]."""
        step = visit.step
        old = step.log_probability(visit.state, visit.velocity, visit.goal)
        now = step.log_probability(visit.state, velocity, visit.goal)
        ratio = (now - old).exp()
        loss = clipped(ratio, advantage, self.config.ratio_range)
        numbers = {
            "ratio": ratio.detach(),
            "first_ratio_off": (ratio.detach() - 1).abs(),
            "clipped": ((ratio - 1).abs() > self.config.ratio_range).float(),
        }
        if visit.reference is not None:
            kl = step.divergence(velocity, visit.reference)
            loss, numbers["kl"] = loss + self.config.kl * kl, kl.detach()
        return Judged(loss, numbers)
