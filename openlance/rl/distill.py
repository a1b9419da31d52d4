"""Distillation into few steps without guidance, along the teacher's own path.

The teacher is the policy that the run began with, guided, in many steps. Between two times of the student's
coarse grid the teacher goes from x to x′; the one straight step that does the same has the velocity
(x − x′) / (t − t′), and that is what the student, unguided, is drawn to. So steps are distilled as by
Salimans and Ho (arXiv 2202.00512) and guidance as by Meng et al. (arXiv 2210.03142), both at once: a plain
regression, which needs neither a critic nor a second network that learns, and no pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from openlance.config import SamplingConfig
from openlance.flow.path import time_grid
from openlance.flow.solver import Transition, euler
from openlance.rl.grpo import Judged
from openlance.rl.rollout import Targets, Visit
from openlance.train.settings import RLConfig


@dataclass(frozen=True)
class Distillation:
    """The algorithm; see `RLConfig` for its settings. teacher: how the teacher samples."""

    config: RLConfig
    teacher: SamplingConfig
    compares = False

    def window(self, generator: torch.Generator) -> range:
        """All steps of the student are learnt."""
        return range(self.config.rollout_steps)

    def explore(
        self, targets: Targets, window: range, generator: torch.Generator
    ) -> tuple[Tensor, list[Visit]]:
        """Make the targets as the teacher, whose weights the network must have now: (their states at the end,
        the states in which the student steps)."""
        shown = targets.sampled(self.teacher)
        grid = time_grid(self.config.teacher_steps, self.config.time_shift)
        start = targets.draw(generator)
        with torch.no_grad():
            states = [start, *euler(shown.velocity, start, grid)]
        coarse = slice(None, None, self.config.teacher_steps // self.config.rollout_steps)
        stops = zip(grid[coarse].tolist(), states[coarse], strict=True)
        visits = []
        for (t, before), (following, after) in pairwise(stops):
            goal = (before - after) / (t - following)
            visits.append(Visit(targets, Transition(t, t - following), before, goal, goal))
        return states[-1], visits

    def judge(self, visit: Visit, velocity: Tensor, advantage: Tensor) -> Judged:
        """The squared distance from what the teacher does, for each target."""
        error = (velocity - visit.goal).square().flatten(1).mean(1)
        return Judged(error, {"error": error.detach()})
