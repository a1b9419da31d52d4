"""The path between data and noise, and the times on it."""

from __future__ import annotations

import torch

from openlance.flow.path import draw_times, interpolate, shift_time, time_grid


def test_ends_and_velocity_of_the_path() -> None:
    clean, noise = torch.randn(3, 4), torch.randn(3, 4)
    at, velocity = interpolate(clean, noise, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(at[0], clean[0]) and torch.equal(at[1], noise[1])
    torch.testing.assert_close(at[2], 0.75 * clean[2] + 0.25 * noise[2])
    assert torch.equal(velocity, noise - clean)
    # Walking back along the velocity from anywhere ends at the data.
    torch.testing.assert_close(at - torch.tensor([[0.0], [1.0], [0.25]]) * velocity, clean)


def test_shift_keeps_the_ends_and_its_inverse_is_the_inverse_shift() -> None:
    t = torch.linspace(0, 1, 11)
    assert torch.equal(shift_time(t, 1.0), t)
    for shift in (0.5, 3.5):
        moved = shift_time(t, shift)
        assert moved[0] == 0 and moved[-1] == 1 and bool((moved.diff() > 0).all())
        torch.testing.assert_close(shift_time(moved, 1 / shift), t)
    assert bool((shift_time(t, 3.5)[1:-1] > t[1:-1]).all())  # towards noise


def test_the_grid_falls_from_one_to_zero() -> None:
    grid = time_grid(4, 3.5)
    assert grid[0] == 1 and grid[-1] == 0 and len(grid) == 5
    expected = [3.5 * t / (1 + 2.5 * t) for t in (1, 0.75, 0.5, 0.25, 0)]
    torch.testing.assert_close(grid, torch.tensor(expected))


def test_drawn_times_follow_the_shifted_logistic_normal() -> None:
    def draw(shift: float) -> torch.Tensor:
        return draw_times(4000, shift, torch.Generator().manual_seed(0))

    plain, shifted = draw(1.0), draw(4.0)
    assert torch.equal(plain, draw(1.0))
    assert bool(((plain > 0) & (plain < 1)).all())
    # The median of sigmoid(normal) is 1/2; 4000 draws put the sample's within 0.02 of it (5 sigma).
    assert abs(plain.median() - 0.5) < 0.02
    assert abs(shifted.median() - 4 * 0.5 / (1 + 3 * 0.5)) < 0.02
    torch.testing.assert_close(shifted, shift_time(plain, 4.0))
