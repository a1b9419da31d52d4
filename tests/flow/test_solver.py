"""Euler on velocities whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openlance.flow.path import time_grid
from openlance.flow.solver import euler, transitions, walk


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


MEAN, STD = 1.5, 0.4  # of data that is Gaussian, one number each: everything about it is known


def gaussian_velocity(state: Tensor, t: float) -> Tensor:
    """E[noise − data | state]: linear in the state."""
    variance = ((1 - t) * STD) ** 2 + t**2
    return (t - (1 - t) * STD**2) / variance * (state - (1 - t) * MEAN) - MEAN


def moments(steps: int, window: range, noise: float) -> tuple[float, float]:
    """Mean and variance at the end of the walk, exactly: each step is affine with Gaussian noise."""
    mean, variance = 0.0, 1.0
    for step in transitions(time_grid(steps, 1.0).double(), window, noise):
        at_zero, at_one = (
            float(step.mean(x, gaussian_velocity(x, step.t))) for x in torch.tensor([[0.0], [1.0]]).double()
        )
        mean = at_zero + (at_one - at_zero) * mean
        variance = (at_one - at_zero) ** 2 * variance + step.std**2
    return mean, variance


@pytest.mark.parametrize("noise", [0.3, 0.7, 1.3])
def test_noise_does_not_change_the_marginal(noise: float) -> None:
    """The end is N(MEAN, STD²) whatever the noise; what remains is the length of the steps."""
    mean, variance = moments(1000, range(1000), noise)
    assert mean == pytest.approx(MEAN, abs=2e-3) and variance == pytest.approx(STD**2, abs=2e-3)


def test_samples_have_the_moments_of_the_walk() -> None:
    """Mean and variance of many walks, within five standard errors."""
    count, window = 40_000, range(2, 12)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(count, 1, generator=generator)
    steps = transitions(time_grid(20, 1.0), window, 0.7)
    walked = walk(gaussian_velocity, start, steps, lambda x: torch.randn(x.shape, generator=generator))
    *_, last = walked
    end = last.after
    mean, variance = moments(20, window, 0.7)
    assert float(end.mean()) == pytest.approx(mean, abs=5 * (variance / count) ** 0.5)
    assert float(end.var()) == pytest.approx(variance, abs=5 * variance * (2 / count) ** 0.5)


def test_without_a_window_the_walk_is_euler() -> None:
    """To the bit, and no noise is drawn; with one, up to its first stochastic step."""
    start, times = torch.randn(5, 3), time_grid(7, 3.0)

    def velocity(state: Tensor, t: float) -> Tensor:
        return torch.sin(state) + t

    def never(state: Tensor) -> Tensor:
        raise AssertionError("no noise here")

    plain = list(euler(velocity, start, times))
    walked = [move.after for move in walk(velocity, start, transitions(times), never)]
    assert all(map(torch.equal, plain, walked)) and len(plain) == len(walked) == 7
    steps = transitions(times, range(3, 5))
    noisy = [move.after for move in walk(velocity, start, steps, torch.randn_like)]
    assert [torch.equal(a, b) for a, b in zip(plain, noisy, strict=True)] == [True] * 3 + [False] * 4


def test_densities_are_those_of_torch() -> None:
    """The window's steps against torch's normal distribution, its first step at t = 1 among them."""
    state, velocity, other = (torch.randn(2, 5, 3) for _ in range(3))
    for step in transitions(time_grid(6, 3.0), range(3), 0.7)[:3]:
        reached = step.mean(state, velocity) + step.std * torch.randn(2, 5, 3)
        here, there = (torch.distributions.Normal(step.mean(state, v), step.std) for v in (velocity, other))
        found = step.log_probability(state, velocity, reached)
        torch.testing.assert_close(found, here.log_prob(reached).mean((1, 2)), atol=1e-4, rtol=1e-5)
        kl = torch.distributions.kl_divergence(here, there).mean((1, 2))
        torch.testing.assert_close(step.divergence(velocity, other), kl, atol=1e-4, rtol=1e-4)


def test_noise_levels() -> None:
    """0.7 √(t / (1 − t)); at t = 1 with 1 − t of the step's end."""
    first, second, third = transitions(torch.tensor([1.0, 0.8, 0.5, 0.0]), range(2), 0.7)
    assert first.sigma == pytest.approx(0.7 * (1 / 0.2) ** 0.5)
    assert second.sigma == pytest.approx(0.7 * (0.8 / 0.2) ** 0.5)
    assert third.sigma == 0 and not third.stochastic


def test_the_gradient_goes_through_the_velocity_alone() -> None:
    step = transitions(time_grid(4, 1.0), range(1, 2))[1]
    state, velocity = torch.randn(2, 3, 4), torch.randn(2, 3, 4, requires_grad=True)
    reached = step.mean(state, velocity) + step.std * torch.randn(2, 3, 4)
    step.log_probability(state, velocity, reached).sum().backward()
    error = (reached - step.mean(state, velocity)).detach()
    torch.testing.assert_close(velocity.grad, -error * step.pull / step.std**2 / 12)
