"""The vision tower and the VAE alone, on inputs that need no files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_case import assert_near

from openlance.data.buckets import from_vae_pixels, to_vae_pixels
from openlance.infer.pipeline import LancePipeline

pytestmark = pytest.mark.usefixtures("no_gradients")


def patches_of(count: int, width: int) -> torch.Tensor:
    """The input that MEANING.md gives for the vision tower."""
    i, j = torch.arange(count)[:, None], torch.arange(width)[None]
    return ((37 * i + 11 * j + (i * j) % 17) % 61 - 30) / 10


@pytest.mark.parametrize("case", ["image", "video", "mixed"])
def test_vision(case: str, golden_tensors: Any, pipeline: LancePipeline) -> None:
    numbers, shape = golden_tensors("modules/modules.safetensors"), pipeline.config.vision
    grid = numbers[f"vit_{case}_grid"]
    width = 3 * shape.temporal_patch * shape.patch**2
    found = pipeline.model.vision(patches_of(int(grid.prod(dim=1).sum()), width), grid)
    assert_near(found, numbers[f"vit_{case}_out"])


@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_vae(frames: int, golden_tensors: Any, pipeline: LancePipeline) -> None:
    numbers, vae = golden_tensors("modules/modules.safetensors"), pipeline.vae
    given = numbers[f"vae_{frames}_in_u8"].permute(1, 2, 3, 0).numpy()
    pixels = to_vae_pixels(given)[None]
    assert (from_vae_pixels(pixels[0]) == given).all()
    latents = numbers[f"vae_{frames}_mu_czthw"].permute(1, 2, 3, 0)[None]
    assert_near(vae.encode(pixels), latents)
    assert_near(vae.posterior(pixels)[1][0], numbers[f"vae_{frames}_logvar_czthw"])
    decoded = vae.decode(latents, clamp=False)[0][:, numbers[f"vae_{frames}_decoded_frames"]]
    assert_near(decoded, numbers[f"vae_{frames}_decoded_unclamped"])


def test_normalisation_of_latents(golden_tensors: Any, pipeline: LancePipeline) -> None:
    numbers, shape = golden_tensors("modules/modules.safetensors"), pipeline.config.vae
    assert_near(torch.tensor(shape.mean), numbers["vae_scale_mean"])
    assert_near(1 / torch.tensor(shape.std), numbers["vae_scale_inv_std"])
