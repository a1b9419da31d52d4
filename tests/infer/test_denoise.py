"""Denoising over a cached context, against whole uncached forwards of the same sequence."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tiny import CHANNELS, GENERATING, compose_task, config, network, noise, samples
from torch import Tensor

from openlance.config import SamplingConfig
from openlance.flow.guidance import guide, guided_now
from openlance.flow.path import time_grid
from openlance.infer.context import encode
from openlance.infer.generate import Cancelled, Step, denoise
from openlance.sequence.pack import pack
from openlance.sequence.segment import Role, Sample, without
from openlance.sequence.template import Task

ATOL = 1e-5  # float32 over several steps, other order of operations; measured worst case 2e-6
GUIDED = SamplingConfig(steps=3, shift=2.0, guidance=3.0, guidance_interval=(0.4, 1.0))


def noise_for(sample: Sample, seed: int = 0) -> Tensor:
    return noise(*sample[-2].grid, CHANNELS, seed=seed)


@torch.no_grad()
def whole(branches: list[Sample], settings: SamplingConfig, start: Tensor) -> Tensor:
    """The sampler written out with one dense forward a branch and step. branches: conditional first."""
    batches = [pack([sample], config()) for sample in branches]
    moving = [batch.denoised for batch in batches]
    target = branches[0][-2]
    free = ~target.fixed_tokens()
    state = torch.where(free[:, None], start.flatten(0, 2), target.latents.flatten(0, 2))
    clock = time_grid(settings.steps, settings.shift).tolist()
    for t, following in pairwise(clock):
        found = []
        for batch, mask in zip(batches, moving, strict=True):
            latents = torch.cat([batch.latents[: -len(state)], state])
            found.append(network()(batch, latents=latents, times=batch.times * t).velocity[mask])
        velocity = found[0]
        if guided_now(settings, t):
            velocity = guide(found[0], found[1], settings, *found[2:])
        state = state.clone()
        state[free] -= velocity * (t - following)
    return state.view_as(start)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", GENERATING)
def test_cached_is_uncached(name: str) -> None:
    sample = samples()[name]
    found = denoise(network(), sample[:-1], GUIDED, noise_for(sample))
    branches = [sample, without(sample, Role.USER)]
    assert_near(found, whole(branches, GUIDED, noise_for(sample)))


@pytest.mark.parametrize("renorm", ["none", "channel"])
def test_other_renormalisations(renorm: str) -> None:
    sample, settings = samples()["i2v"], replace(GUIDED, renorm=renorm)
    found = denoise(network(), sample[:-1], settings, noise_for(sample))
    assert_near(found, whole([sample, without(sample, Role.USER)], settings, noise_for(sample)))


def test_fixed_frames_stay() -> None:
    sample = samples()["first_and_last"]
    steps: list[Step] = []
    found = denoise(network(), sample[:-1], GUIDED, noise_for(sample), on_step=steps.append)
    for latents in (found, *(step.latents for step in steps)):
        assert torch.equal(latents[[0, 2]], sample[-2].latents[[0, 2]])
    assert not torch.equal(found[1], noise_for(sample)[1])


def test_a_negative_prompt_is_what_guidance_moves_away_from() -> None:
    sample = samples()["t2i"]
    away = compose_task(Task.T2I, ["Blurry."], sample[-2])
    found = denoise(network(), sample[:-1], GUIDED, noise_for(sample), negative=away[:-1])
    assert_near(found, whole([sample, away], GUIDED, noise_for(sample)))
    plain = denoise(network(), sample[:-1], GUIDED, noise_for(sample))
    assert float((found - plain).abs().max()) > 100 * ATOL


@pytest.mark.parametrize("name", ["image_edit", "subject"])
def test_visual_guidance(name: str) -> None:
    """The third branch has neither words nor visual condition."""
    sample, settings = samples()[name], replace(GUIDED, visual_guidance=1.6)
    branches = [sample, without(sample, Role.USER), without(sample, Role.USER, Role.SOURCE, Role.REFERENCE)]
    found = denoise(network(), sample[:-1], settings, noise_for(sample))
    assert_near(found, whole(branches, settings, noise_for(sample)))


def test_visual_guidance_of_one_is_plain() -> None:
    sample = samples()["image_edit"]
    plain = denoise(network(), sample[:-1], GUIDED, noise_for(sample))
    visual = denoise(network(), sample[:-1], replace(GUIDED, visual_guidance=1.0), noise_for(sample))
    assert_near(visual, plain)


def test_no_guidance_runs_one_branch() -> None:
    """At scale 1, and outside the interval, only the conditional branch is run; both take one forward."""
    sample, passes = samples()["t2i"], []
    hook = network().register_forward_pre_hook(lambda module, given: passes.append(given[0].tokens))
    target = len(sample[-2])
    try:
        for settings, expected in (
            (replace(GUIDED, guidance=1.0), [1, 1, 1]),
            (replace(GUIDED, guidance_interval=(0.0, 1.0)), [2, 2, 2]),
            (replace(GUIDED, guidance_interval=(0.9, 1.0)), [2, 1, 1]),  # only at t = 1
        ):
            passes.clear()
            denoise(network(), sample[:-1], settings, noise_for(sample))
            assert passes[-3:] == [target * branches for branches in expected]
    finally:
        hook.remove()


def test_the_context_is_run_once() -> None:
    """Each step runs the target alone, whatever the number of steps."""
    sample, passes = samples()["image_edit"], []
    hook = network().register_forward_pre_hook(lambda module, given: passes.append(given[0].tokens))
    counts = []
    try:
        for steps in (2, 5):
            passes.clear()
            denoise(network(), sample[:-1], replace(GUIDED, steps=steps, guidance=1.0), noise_for(sample))
            assert passes[-steps:] == [len(sample[-2])] * steps
            counts.append(sum(passes[:-steps]))
    finally:
        hook.remove()
    assert counts[0] == counts[1] == sum(map(len, sample[:-2]))


def test_an_encoded_context_can_be_given() -> None:
    sample = samples()["edit_again"]
    context = encode(network(), sample[:-2])
    found = denoise(network(), sample[:-1], GUIDED, noise_for(sample), reuse=context)
    assert torch.equal(found, denoise(network(), sample[:-1], GUIDED, noise_for(sample)))
    assert context.cache.length == sum(map(len, sample[:-2]))


def test_each_step_is_reported() -> None:
    sample = samples()["t2v"]
    steps: list[Step] = []
    found = denoise(network(), sample[:-1], GUIDED, noise_for(sample), on_step=steps.append)
    assert [(step.number, step.total) for step in steps] == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(steps[-1].latents, found) and found.dtype == torch.float32
    assert not torch.equal(steps[0].latents, steps[1].latents)


def test_the_callback_can_stop() -> None:
    sample, numbers = samples()["t2i"], []

    def stop_after_two(step: Step) -> bool:
        numbers.append(step.number)
        return step.number < 2

    with pytest.raises(Cancelled, match="after step 2 of 3"):
        denoise(network(), sample[:-1], GUIDED, noise_for(sample), on_step=stop_after_two)
    assert numbers == [1, 2]


def test_noise_decides() -> None:
    sample = samples()["t2i"]
    first, same, other = (denoise(network(), sample[:-1], GUIDED, noise_for(sample, s)) for s in (1, 1, 2))
    assert torch.equal(first, same) and not torch.allclose(first, other)


def test_the_released_cached_sampler_differs() -> None:
    """Its unconditional context keeps the conditional positions, so its numbers are others."""
    sample = samples()["t2i"]
    released = replace(GUIDED, released_cached_sampler=True)
    found, plain = (denoise(network(), sample[:-1], c, noise_for(sample)) for c in (released, GUIDED))
    assert float((found - plain).abs().max()) > 100 * ATOL
