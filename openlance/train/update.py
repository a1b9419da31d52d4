"""What follows the gradients: the learning rate, the optimiser, and the average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from openlance.train.muon import Muon
from openlance.train.parallel import Ranks
from openlance.train.settings import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then the schedule: constant, half a cosine to zero, or linear to zero at the end."""
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    if config.schedule == "cosine":
        done = max(0, step - config.warmup) / max(1, config.steps - config.warmup)
        return config.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if config.schedule == "linear":
        fall = (config.steps - step) / max(1.0, config.decay * config.steps)
        return config.learning_rate * min(rise, fall, 1.0)
    return config.learning_rate * rise


def make_optimizers(
    parameters: Mapping[str, nn.Parameter], config: TrainConfig, ranks: Ranks
) -> tuple[torch.optim.Optimizer, ...]:
    """AdamW without weight decay, as the paper has it; the matrices of the layers by Muon where it is chosen.

    Muon's updates have the size of AdamW's (Liu et al., 2025), so that one learning rate serves both; the
    processes of the run share its work.
    """
    rest = dict(parameters)
    found: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        matrices = [rest.pop(name) for name, p in parameters.items() if "layers." in name and p.dim() == 2]
        dtype = getattr(torch, config.precision)  # bfloat16 is enough, as Jordan's own has it
        all_ranks = None if ranks.size == 1 else dist.group.WORLD
        rate = config.learning_rate
        found.append(Muon(matrices, rate, like_adamw=True, dtype=dtype, processes=all_ranks))
    found.append(
        torch.optim.AdamW(
            list(rest.values()), config.learning_rate, config.betas, config.eps, weight_decay=0.0, fused=True
        )
    )
    return tuple(found)


class Average:
    """Exponential moving average of parameters: a ← d · a + (1 - d) · p after every step.

    d rises to `decay` over the first steps, as (1 + step) / (10 + step), so that the beginning is forgotten.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        self.parameters = parameters
        self.decay = decay
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters as they are after step `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.parameters.items():
            self.values[name].lerp_(parameter, 1 - decay)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Inside, the parameters are the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            held = parameter.detach().clone()
            parameter.copy_(self.values[name])
            self.values[name].copy_(held)
