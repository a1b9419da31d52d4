"""The straight path between data and noise, and the times on it."""

from __future__ import annotations

import torch
from torch import Tensor


def interpolate(clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The point at time t and the velocity there. t=0 is clean, t=1 is noise; velocity points to noise.

    t broadcasts over the leading axes: clean, noise [..., C], t [...].
    """
    t = t[..., None]
    return (1 - t) * clean + t * noise, noise - clean


def shift_time(t: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t): moves times towards noise for s > 1 (arXiv 2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def draw_times(n: int, shift: float, generator: torch.Generator | None = None) -> Tensor:
    """[n] training times: sigmoid of a standard normal, then shifted."""
    return shift_time(torch.sigmoid(torch.randn(n, generator=generator)), shift)


def time_grid(steps: int, shift: float) -> Tensor:
    """[steps + 1] sampling times from 1 to 0: equal steps, shifted."""
    return shift_time(torch.linspace(1, 0, steps + 1), shift)
