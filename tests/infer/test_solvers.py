"""Denoising with each solver: fixed frames, several targets, cancelling, previews."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from tiny import CHANNELS, network, noise, samples

from openlance.config import SOLVERS, SamplingConfig
from openlance.errors import InputError
from openlance.flow.path import time_grid
from openlance.infer.generate import Cancelled, Denoising, Step, Target, denoise, denoise_together

ATOL = 1e-5  # float32 over several steps, sums in another order
GUIDED = SamplingConfig(steps=5, shift=2.0, guidance=3.0, guidance_interval=(0.4, 1.0))


def targets(*names: str) -> list[Target]:
    """Each with noise of its own."""
    chosen = [samples()[name][:-1] for name in names]
    return [Target(s, noise(*s[-1].grid, CHANNELS, seed=seed)) for seed, s in enumerate(chosen)]


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_preview_is_where_the_last_velocity_leads(solver: str) -> None:
    """From the state that it was found at; fixed frames are in it, and it ends as the result."""
    [target] = targets("first_and_last")
    settings, steps = replace(GUIDED, solver=solver), []
    found = denoise(network(), target.sample, settings, target.noise, on_step=steps.append)
    assert torch.equal(steps[-1].latents, found) and torch.equal(steps[-1].clean, found)
    with torch.inference_mode():
        work = Denoising(network(), [target], settings)
        state = work.start
        for step, t in zip(steps[:-1], time_grid(5, 2.0)[:-2].tolist(), strict=True):
            expected = work.latents(state - t * work.velocity(state, t))[0]
            torch.testing.assert_close(step.clean, expected, atol=ATOL, rtol=0)
            state = step.latents.flatten(0, 2)
            for shown in (step.clean, step.latents):
                assert torch.equal(shown[[0, 2]], target.segment.latents[[0, 2]])


@pytest.mark.parametrize("solver", SOLVERS)
def test_together_is_alone_also_when_one_is_cancelled(solver: str) -> None:
    given, settings = targets("t2i", "image_edit", "i2v"), replace(GUIDED, solver=solver)

    def stop_the_second(step: Step) -> bool:
        return (step.order, step.number) != (1, 3)

    found = denoise_together(network(), given, settings, stop_the_second)
    assert isinstance(found[1], Cancelled)
    for index in (0, 2):
        alone = denoise(network(), given[index].sample, settings, given[index].noise)
        torch.testing.assert_close(found[index], alone, atol=ATOL, rtol=0)


def test_the_solvers_differ() -> None:
    [target] = targets("t2i")
    ends = [denoise(network(), target.sample, replace(GUIDED, solver=s), target.noise) for s in SOLVERS]
    for one, other in combinations(ends, 2):
        assert float((one - other).abs().max()) > 100 * ATOL


def test_an_unknown_solver_is_named() -> None:
    with pytest.raises(InputError, match=r"solver must be one of euler, ab2, dpm\+\+2m, unipc, not 'heun'"):
        SamplingConfig(solver="heun")
