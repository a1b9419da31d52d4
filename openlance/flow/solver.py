"""Solvers of dx/dt = velocity from noise (t=1) to data (t=0)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
"""(state [n, C], time in (0, 1]) → velocity [n, C]."""


def euler(velocity: Velocity, noise: Tensor, times: Tensor) -> Iterator[Tensor]:
    """Yield the state [n, C] after each step along `times` [steps + 1], falling from 1 to 0.

    x ← x − v Δt. The times are read on the host once, before the first step.
    """
    grid = times.tolist()
    deltas = (times[:-1] - times[1:]).tolist()
    state = noise
    for t, delta in zip(grid[:-1], deltas, strict=True):
        state = state - velocity(state, t) * delta
        yield state
