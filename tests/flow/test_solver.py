"""Euler on velocities whose answer is known."""

from __future__ import annotations

import pytest
import torch

from openlance.flow.path import time_grid
from openlance.flow.solver import euler


@pytest.mark.parametrize("shift", [1.0, 3.5])
def test_a_straight_path_is_exact_in_any_number_of_steps(shift: float) -> None:
    clean, noise = torch.randn(4, 3), torch.randn(4, 3)
    for steps in (1, 3):
        *_, end = euler(lambda state, t: noise - clean, noise, time_grid(steps, shift))
        torch.testing.assert_close(end, clean)


def test_the_error_of_a_curved_path_falls_with_the_step() -> None:
    """dx/dt = x from 1 to 0 gives x(0) = x(1) / e; Euler's error is of first order."""

    def error(steps: int) -> float:
        *_, end = euler(lambda state, t: state, torch.ones(1, 1), time_grid(steps, 1.0))
        return abs(float(end) - torch.e**-1)

    assert error(40) < 0.01
    assert error(40) == pytest.approx(error(20) / 2, rel=0.1)


def test_each_state_is_given_with_its_time_and_the_noise_is_kept() -> None:
    noise, times = torch.zeros(1, 1), time_grid(4, 2.0)
    seen: list[float] = []

    def velocity(state: torch.Tensor, t: float) -> torch.Tensor:
        seen.append(t)
        return torch.ones_like(state)

    found = [float(state) for state in euler(velocity, noise, times)]
    assert seen == times[:-1].tolist()
    assert found == pytest.approx((times[1:] - 1).tolist())
    assert float(noise) == 0
