"""What is added to latent tokens: embedded time, and a fixed table of places."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TIME_FEATURES = 256


def time_features(t: Tensor) -> Tensor:
    """[n, 256] cosines, then sines, of times t [n] in [0, 1]; frequencies 10000^(-i/128), unscaled."""
    half = TIME_FEATURES // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angle = t.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimeEmbed(nn.Sequential):
    """Times [n] in [0, 1] → [n, hidden]."""

    def __init__(self, hidden: int):
        super().__init__(nn.Linear(TIME_FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t: Tensor) -> Tensor:
        return super().forward(time_features(t).to(next(self.parameters()).dtype))


def place_features(grid: Tensor, hidden: int) -> Tensor:
    """[n, hidden] float32 fixed sin-cos features of latent places, grid [3, n] (frame, row, column).

    Frame and row get an even third of the width each, columns the rest; of each part, the first half is
    sines and the second cosines with frequencies 10000^(-i / half).
    """
    third = 2 * (hidden // 6)
    parts = []
    for axis, width in zip(grid, (third, third, hidden - 2 * third), strict=True):
        half = width // 2
        frequency = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=grid.device) / half)
        angle = axis.double()[:, None] * frequency
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=-1).float()
