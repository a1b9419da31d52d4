"""Numbers of every generation case, from the source media: encoders, velocities, sampling, pixels."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from golden_case import Case, assert_near, whole_hidden
from torch import Tensor

from openlance.config import SamplingConfig
from openlance.flow.guidance import guide, guided_now
from openlance.flow.path import time_grid
from openlance.infer.generate import denoise
from openlance.sequence.pack import PackedBatch, pack
from openlance.sequence.positions import mape_positions
from openlance.sequence.segment import Kind, Role, without

pytestmark = pytest.mark.usefixtures("no_gradients")


def clean_and(batch: PackedBatch, state: Tensor) -> Tensor:
    """Latents [g, C] of all gen tokens: the given clean ones, and `state` where they are denoised."""
    return batch.latents.index_copy(0, torch.nonzero(batch.denoised).flatten(), state)


def states(case: Case, config: SamplingConfig) -> list[Tensor]:
    """The latents of the target before each step and after the last, [tokens, C], as `denoise` gives them."""
    sample, found = case.sample[:-1], []
    target = sample[-1]
    noise = case.numbers["x_init"][-target.inner :].view(*target.grid, -1)
    final = denoise(case.pipeline.model, sample, config, noise, on_step=lambda s: found.append(s.latents))
    assert len(found) == config.steps
    assert torch.equal(found[-1], final)
    return [state.flatten(0, 2) for state in (noise, *found)]


def moving(case: Case) -> Tensor:
    """[tokens] bool: which of the target's tokens are denoised."""
    return ~case.sample[-2].fixed_tokens()


def test_vision_and_clean_latents(generation: Case) -> None:
    seen = generation.pipeline.model.see(generation.batch)
    if seen is not None or "vit_embed" in generation.numbers:
        assert_near(seen, generation.numbers["vit_embed"])
    clean = [s.latents for s in generation.sample if s.kind is Kind.CLEAN]
    if generation.sample[-2].fixed_frames:
        clean.append(generation.sample[-2].latents[:1])
    wanted = sorted(name for name in generation.numbers if name.startswith("cond_latent_"))
    assert len(wanted) == len(clean)
    for latents, name in zip(clean, wanted, strict=True):
        assert_near(latents, generation.numbers[name])


def test_hidden_states_of_the_whole_sequence(generation: Case) -> None:
    numbers, batch = generation.numbers, generation.batch
    latents = clean_and(batch, numbers["x_t"][0])
    hidden = whole_hidden(generation.pipeline.model, batch, latents=latents)
    assert_near(hidden, numbers["hidden_cond_step0"])


def test_velocities_of_each_step(generation: Case) -> None:
    """Whole uncached forwards at the released states: with words, without them, and guided."""
    numbers, config, model = generation.numbers, generation.sampling, generation.pipeline.model
    branches = [generation.batch, pack([without(generation.sample, Role.USER)], model.config)]
    for step, t in enumerate(time_grid(config.steps, config.shift)[:-1]):
        velocities = []
        for batch in branches:
            latents = clean_and(batch, numbers["x_t"][step])
            velocities.append(model(batch, latents=latents, times=batch.times * t).velocity[batch.denoised])
        cond, uncond = velocities
        assert_near(cond, numbers["v_cond"][step])
        acts = guided_now(config, float(t))
        assert acts == bool(numbers["v_uncond"][step].isfinite().all())
        if acts:
            assert_near(uncond, numbers["v_uncond"][step])
        assert_near(guide(cond, uncond, config) if acts else cond, numbers["v_guided"][step])


def test_times(generation: Case) -> None:
    config = generation.sampling
    grid = time_grid(config.steps, config.shift)
    assert torch.equal(grid[:-1], generation.numbers["timesteps"])
    assert torch.equal(grid[:-1] - grid[1:], generation.numbers["dts"])


def test_sampling(generation: Case) -> None:
    """The cached sampler, state by state, to the decoded pixels."""
    numbers, active = generation.numbers, moving(generation)
    found = states(generation, generation.sampling)
    for state, expected in zip(found[:-1], numbers["x_t"], strict=True):
        assert_near(state[active], expected)
    assert_near(found[-1], numbers["x_final"][-len(active) :])
    latents = found[-1].view_as(numbers["latent_final_thwc"])
    assert_near(latents, numbers["latent_final_thwc"])
    pixels = generation.pipeline.vae.decode(latents[None])[0]
    assert list(pixels.shape) == generation.facts["pixel_full_shape"]
    assert_near(pixels[:, generation.facts["pixel_frames_saved"]], numbers["pixels_cthw"])


def test_released_cached_sampler(generation: Case) -> None:
    """The compatibility option: what the released cached sampler computes, which is another function.

    Its unconditional context stands at the conditional positions, its target at those of a sequence
    without the words.
    """
    numbers, active = generation.cached_numbers, moving(generation)
    config = replace(generation.sampling, released_cached_sampler=True)
    found = states(generation, config)
    assert_near(found[-1], numbers["x_final"][-len(active) :])
    model, sample = generation.pipeline.model, generation.sample[:-1]
    short = without(sample, Role.USER)
    placed = zip(sample, mape_positions(sample, model.config.mape), strict=True)
    context = [at for segment, at in placed if segment.role is not Role.USER][:-1]
    batch = pack([short], model.config, positions=[[*context, mape_positions(short, model.config.mape)[-1]]])
    clock = time_grid(config.steps, config.shift)
    for step, (before, after) in enumerate(pairwise(found)):
        t, delta = clock[step], clock[step] - clock[step + 1]
        guided = numbers["v_guided"][step]
        rows = active if len(guided) == len(active) else slice(None)
        assert_near(((before - after) / delta)[active], guided[rows])
        if guided_now(config, float(t)):
            latents = clean_and(batch, before[active])
            velocity = model(batch, latents=latents, times=batch.times * t).velocity[-len(active) :]
            expected = numbers["v_uncond"][step]
            assert_near(velocity if len(expected) == len(active) else velocity[active], expected)


def test_guidance_variants(variant: Case) -> None:
    """Other scales, intervals and renormalisations over the same sequence."""
    numbers, config = variant.numbers, variant.sampling
    assert torch.equal(time_grid(config.steps, config.shift)[:-1], numbers["timesteps"])
    found = states(variant, config)
    assert_near(found[-1], numbers["x_final"])
    for step, delta in enumerate(numbers["dts"]):
        assert_near((found[step] - found[step + 1]) / delta, numbers["v_guided"][step])
