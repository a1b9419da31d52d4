"""Groups of pictures and clips: made, looked at again, judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openlance.config import SamplingConfig
from openlance.data.frames import Frames
from openlance.flow.path import time_grid
from openlance.flow.solver import euler
from openlance.rl.distill import Distillation
from openlance.rl.grpo import GRPO, Judged
from openlance.rl.nft import NFT
from openlance.rl.rewards.base import Media
from openlance.rl.rollout import Prompt, Targets, Visit
from openlance.train.losses import Objective
from openlance.train.parallel import Ranks
from openlance.train.settings import RLConfig

Decode = Callable[[Tensor], Frames]
"""Latents [frames, rows, columns, channels] → frames uint8 [T, H, W, 3]."""


@dataclass(eq=False)
class Pictures:
    """How prompts become pictures or clips, and what is learnt from them; see `openlance.rl.learn.Maker`."""

    objective: Objective
    config: RLConfig
    ranks: Ranks
    decode: Decode

    def __post_init__(self) -> None:
        config, own = self.config, self.objective.model.config.sampling
        guidance = own.guidance if config.guidance is None else config.guidance
        sampling = replace(own, steps=config.rollout_steps, shift=config.time_shift, guidance=guidance)
        unguided = replace(sampling, visual_guidance=None)
        self.sampling: SamplingConfig = sampling if config.algorithm == "grpo" else unguided
        self.explored = self.sampling  # how the pictures of a group are made
        self.algorithm: GRPO | NFT | Distillation
        if config.algorithm == "distill":
            taught = own.guidance if config.teacher_guidance is None else config.teacher_guidance
            self.explored = replace(own, guidance=taught)
            self.algorithm = Distillation(config, self.explored)
        else:
            self.algorithm = NFT(config) if config.algorithm == "nft" else GRPO(config)

    @property
    def compares(self) -> bool:
        return self.algorithm.compares

    def make(
        self, prompt: Prompt, generator: torch.Generator, shared: torch.Generator
    ) -> tuple[list[Media], list[Visit]]:
        window = self.algorithm.window(shared)
        media: list[Media] = []
        visits: list[Visit] = []
        for members in self._passes(prompt):
            targets = Targets(self.objective, prompt.sample, members, self.sampling, self.ranks)
            end, found = self.algorithm.explore(targets, window, generator)
            if self.compares:
                media += [self.decode(latents) for latents in targets.latents(end)]
            visits += found
        return media, visits

    def look(self, visit: Visit) -> Tensor:
        return visit.targets.velocity(visit.state, visit.step.t)

    def judge(self, visit: Visit, found: Tensor, advantage: Tensor) -> Judged:
        return self.algorithm.judge(visit, found, advantage)

    def best(self, prompt: Prompt, generator: torch.Generator) -> Frames:
        targets = Targets(self.objective, prompt.sample, range(1), self.sampling, self.ranks)
        grid = time_grid(self.config.rollout_steps, self.config.time_shift)
        *_, end = euler(targets.velocity, targets.draw(generator), grid)
        return self.decode(targets.latents(end)[0])

    def _passes(self, prompt: Prompt) -> list[range]:
        """The members of a group, so many at once as `tokens` allows."""
        branches = 1 + (self.explored.guidance != 1) + (self.explored.visual_guidance is not None)
        at_once = max(1, self.config.tokens // (branches * len(prompt.sample[-1])))
        group = range(self.config.group)
        return [group[first : first + at_once] for first in range(0, len(group), at_once)]
