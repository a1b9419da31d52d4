"""Media and sizes as a user gives them, into what the model takes."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tiny import config, vae

from openlance.data.frames import Video
from openlance.errors import InputError
from openlance.infer.prepare import Resolutions, load, target_frames, target_size, view

AT = Resolutions(vae=64, vit=56)


def test_a_picture_is_seen_twice(picture: Any) -> None:
    seen = view(load(picture, config().sizes), AT, config(), vae())
    assert seen.grid == (1, 1, 2)  # 48x64 at 56 is a bucket of 48x64, cut to 28x56
    assert seen.patches.shape == (4 * 2, 3 * 2 * 14 * 14)
    assert seen.latents.shape == (1, 3, 4, 48) and seen.latents.dtype == torch.float32
    assert view(load(picture, config().sizes), AT, config(), None).latents is None
    pixels = view(load(picture, config().sizes), AT, config(), vae(), semantic=False)
    assert pixels.patches is None and torch.equal(pixels.latents, seen.latents)


def test_a_clip_keeps_the_frames_that_the_model_sees(clip: Any) -> None:
    """8 frames at 4 a second are 2 seconds; the checkpoint sees 4 a second, as 4 k + 1 frames."""
    found = load(Video(clip, 4.0), config().sizes)
    assert len(found) == 5 and found.fps == config().sizes.fps
    seen = view(found, AT, config(), vae())
    assert seen.grid[0] == 3 and seen.latents.shape[0] == 2


def test_one_frame_is_a_clip_too(clip: Any) -> None:
    found = load(Video(clip[:1], 4.0), config().sizes)
    assert view(found, AT, config(), vae()).latents.shape[0] == 1


def test_latents_are_the_mean_or_a_draw(picture: Any) -> None:
    def latents(seed: int | None) -> torch.Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return view(load(picture, config().sizes), AT, config(), vae(), posterior=generator).latents

    mean, draw, same, other = (latents(seed) for seed in (None, 1, 1, 2))
    assert torch.equal(draw, same)
    assert not torch.equal(draw, other) and not torch.equal(draw, mean)
    assert torch.equal(mean, latents(None))


def test_resolutions_of_pictures_and_clips() -> None:
    sizes = config().sizes
    assert Resolutions.of(sizes, video=False) == Resolutions(sizes.image, sizes.vit_image)
    assert Resolutions.of(sizes, video=True) == Resolutions(sizes.video, sizes.vit_video)


@pytest.mark.parametrize(
    "asked, made",
    [(None, (64, 48)), (32, (32, 32)), ((128, 16), (128, 16)), ((30, 41), (32, 48)), ((23, 25), (16, 32))],
)
def test_sizes_fit_the_latents(asked: Any, made: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert target_size(asked, (64, 48), config()) == made
    assert bool(caplog.text) == (asked not in (None, 32, made))


def test_lengths_fit_the_latents(caplog: pytest.LogCaptureFixture) -> None:
    assert [target_frames(n, config()) for n in (1, 2, 4, 5, 8, 9, 17)] == [1, 1, 1, 5, 5, 9, 17]
    assert caplog.text.count("made") == 3
    with pytest.raises(InputError, match="18 frames"):
        target_frames(18, config())
