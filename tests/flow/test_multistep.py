"""Solvers of second order, against diffusers' schedulers and an equation that is solved on paper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from openlance import config
from openlance.flow.multistep import SOLVERS
from openlance.flow.path import time_grid
from openlance.flow.solver import Velocity, euler

MEAN, STD = 1.5, 0.4  # of data that is Gaussian
SECOND_ORDER = [name for name in SOLVERS if name != "euler"]
IN_LAMBDA = ["dpm++2m", "unipc"]


def gaussian_velocity(state: Tensor, t: float) -> Tensor:
    """E[noise − data | state]; it carries noise z to the data MEAN + STD z."""
    variance = ((1 - t) * STD) ** 2 + t**2
    return (t - (1 - t) * STD**2) / variance * (state - (1 - t) * MEAN) - MEAN


def error(name: str, steps: int, shift: float) -> float:
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    *_, end = SOLVERS[name](gaussian_velocity, noise, time_grid(steps, shift).double())
    return float((end - (MEAN + STD * noise)).abs().max())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_error_falls_with_the_order(shift: float) -> None:
    """Twice the steps: half the error of the first order, a quarter of the second.

    A little more of the latter: the steps at the ends are long in λ, which costs a logarithm.
    """
    ratios = {name: error(name, 800, shift) / error(name, 1600, shift) for name in SOLVERS}
    assert ratios["euler"] == pytest.approx(2, abs=0.05)
    for name in SECOND_ORDER:
        assert 3.2 < ratios[name] < 4.8, name
        assert error(name, 100, shift) < error("euler", 100, shift) / 5


def scheduled(scheduler: Any, velocity: Velocity, state: Tensor) -> Iterator[Tensor]:
    """The states that a scheduler of diffusers goes through on its own grid."""
    scheduler.set_begin_index(0)
    times = scheduler.sigmas[:-1].tolist()
    for number, t in zip(scheduler.timesteps, times, strict=True):
        state = scheduler.step(velocity(state, t), number, state).prev_sample
        yield state


def scheduler_of(name: str, times: Tensor) -> Any:
    """With the grid set by hand; that of UniPC must not begin at 1."""
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 2}
    if name == "unipc":
        made = UniPCMultistepScheduler(solver_type="bh2", **flow)
        made.set_timesteps(sigmas=times[:-1].double().numpy())
        return made
    made = DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **flow)
    made.set_timesteps(len(times) - 1)
    made.sigmas = times.clone()
    return made


@pytest.mark.parametrize("name", IN_LAMBDA)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_the_numbers_are_those_of_diffusers(name: str, steps: int) -> None:
    times = time_grid(steps, 3.0)
    if name == "unipc":
        times[0] = 0.99  # from where its scheduler has the same grid; see the test of the ends for 1
    scheduler = scheduler_of(name, times)
    assert torch.equal(scheduler.sigmas, times)
    noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    found = torch.stack(list(SOLVERS[name](gaussian_velocity, noise, times)))
    expected = torch.stack(list(scheduled(scheduler, gaussian_velocity, noise)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # float32 coefficients; measured 2e-6


@pytest.mark.parametrize("name", IN_LAMBDA)
def test_a_grid_from_one_is_the_limit_of_grids_that_come_near(name: str) -> None:
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    times = time_grid(6, 3.0).double()
    *_, end = SOLVERS[name](gaussian_velocity, noise, times)
    apart = []
    for gap in (1e-4, 1e-8, 1e-16):  # λ there is -9, -18 and -37: it is approached like its inverse
        near = times.clone()
        near[0] = 1 - gap
        *_, other = SOLVERS[name](gaussian_velocity, noise, near)
        apart.append(float((end - other).abs().max()))
    assert apart[0] > apart[1] > apart[2] and apart[2] < 0.3 * apart[0]


@pytest.mark.parametrize("name", SOLVERS)
def test_a_straight_path_is_exact_in_any_number_of_steps(name: str) -> None:
    clean, noise = torch.randn(4, 3), torch.randn(4, 3)
    for steps in (1, 2, 5):
        *_, end = SOLVERS[name](lambda state, t: noise - clean, noise, time_grid(steps, 3.5))
        torch.testing.assert_close(end, clean)


def test_a_velocity_even_in_time_is_followed_exactly() -> None:
    """By ab2, but for its first step, which is Euler's: v = 2t leads from 1 to 0 in all."""
    times = time_grid(5, 3.0).double()
    *_, end = SOLVERS["ab2"](lambda state, t: torch.full_like(state, 2 * t), torch.ones(1).double(), times)
    first = 1 - float(times[1])
    torch.testing.assert_close(end, torch.tensor([0 - first**2]).double())


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_one_step_is_eulers(name: str) -> None:
    noise, times = torch.randn(4, 3), time_grid(1, 3.0)
    [end] = SOLVERS[name](gaussian_velocity, noise, times)
    [plain] = euler(gaussian_velocity, noise, times)
    torch.testing.assert_close(end, plain)


@pytest.mark.parametrize("name", SOLVERS)
def test_what_does_not_move_stays_to_the_bit(name: str) -> None:
    noise = torch.randn(6, 3)
    moving = torch.tensor([[1.0], [0.0], [1.0], [0.0], [1.0], [1.0]])
    states = SOLVERS[name](lambda x, t: gaussian_velocity(x, t) * moving, noise.clone(), time_grid(7, 3.0))
    for state in states:
        assert torch.equal(state[[1, 3]], noise[[1, 3]])
        assert not torch.equal(state[[0, 2]], noise[[0, 2]])


@pytest.mark.parametrize("name", SOLVERS)
def test_one_evaluation_a_step_at_the_times_of_the_grid(name: str) -> None:
    """Each before its state is given, so that a caller who leaves has paid for nothing more."""
    noise, times = torch.ones(2, 1), time_grid(4, 2.0)
    seen: list[float] = []

    def velocity(state: Tensor, t: float) -> Tensor:
        seen.append(t)
        return gaussian_velocity(state, t)

    counts = [len(seen) for _ in SOLVERS[name](velocity, noise, times)]
    assert seen == times[:-1].tolist() and counts == [1, 2, 3, 4]
    assert torch.equal(noise, torch.ones(2, 1))


def test_every_name_of_the_settings_is_a_solver() -> None:
    assert tuple(SOLVERS) == config.SOLVERS and SOLVERS[config.SamplingConfig().solver] is euler
