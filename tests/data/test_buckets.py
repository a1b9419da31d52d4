"""Resizing, VAE pixels and ViT patches, against what the released preprocessing gave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from openlance.data.buckets import (
    VAE_DIVISOR,
    VIT_DIVISOR,
    VIT_MEAN,
    VIT_STD,
    Buckets,
    from_vae_pixels,
    resize_to_bucket,
    to_vae_pixels,
    to_vit_patches,
)
from openlance.data.media import as_frames, load_media, sample_frames
from openlance.errors import InputError

GoldenFile = Callable[[str], Path]
PIXEL_CASES = [
    "t2i",
    "t2v",
    "i2v",
    "image_edit",
    "video_edit",
    "idip_image",
    "idip_image_2ref",
    "x2t_image",
    "x2t_video",
]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_bucket_tables_and_crops_are_the_released_ones(golden_file: GoldenFile) -> None:
    for preset in json.loads(golden_file("modules/resize_table.json").read_text()):
        buckets = Buckets(preset["resolution"], preset["bucket_stride"])
        assert buckets.sizes == [tuple(size) for size in preset["buckets_hw"]], preset["preset"]
        for row in preset["rows"]:
            height, width = row["h"], row["w"]
            assert buckets.nearest(height, width) == tuple(row["bucket_hw"]), row
            assert buckets.crop(height, width) == tuple(row["crop_top_left_h_w"]), row
            assert buckets.out_size(height, width, preset["crop_divisor"]) == tuple(row["out_hw"]), row


@pytest.mark.parametrize("case", PIXEL_CASES)
def test_pixels_are_the_released_ones_bit_for_bit(case: str, golden_file: GoldenFile) -> None:
    """From the source file over frame sampling, crop and resize: every level equal, no tolerance."""
    given = json.loads(golden_file(f"{case}/input.json").read_text())
    tensors = load_file(golden_file(f"{case}/sequence.safetensors"))
    pixels_of = {"idip_image": "image_edit", "x2t_video": "video_edit"}  # stored once for both
    if case in pixels_of:
        tensors |= load_file(golden_file(f"{pixels_of[case]}/sequence.safetensors"))
    compared = 0
    for index, name in enumerate(_media_names(given)):
        frames = as_frames(load_media(golden_file(name), select=sample_frames))
        for stream, divisor in (("vae", VAE_DIVISOR), ("vit", VIT_DIVISOR)):
            key = f"{stream}_pixels_u8_{index}_cthw"
            if key not in tensors or (stream == "vae" and case.startswith("x2t")):
                continue
            ours = resize_to_bucket(frames, given[f"resolution_{stream}"], divisor)
            if stream == "vit" and len(ours) % 2:
                ours = np.concatenate([ours, ours[-1:]])
            np.testing.assert_array_equal(ours.transpose(3, 0, 1, 2), tensors[key])
            compared += 1
    assert compared or not _media_names(given)


def _media_names(given: dict) -> list[str]:
    names = []
    for item in given["items"].values():
        if isinstance(item, dict):
            pairs = zip(item["interleave_array"], item["element_dtype_array"], strict=True)
            names += [element for element, kind in pairs if kind != "text"]
    return names


def test_patches_are_in_the_released_order(golden_file: GoldenFile) -> None:
    tensors = load_file(golden_file("modules/modules.safetensors"))
    frames = np.ascontiguousarray(tensors["patchify_in_u8"].transpose(1, 2, 3, 0))
    patches, grid = to_vit_patches(frames, mean=(0, 0, 0), std=(1, 1, 1))
    assert grid == (1, 2, 4)
    np.testing.assert_array_equal((patches * 255).round().numpy(), tensors["patchify_out_u8"])


def test_every_patch_holds_the_pixels_of_its_place() -> None:
    frames = noise(4, 56, 84, 3)
    patches, (t, h, w) = to_vit_patches(frames)
    assert (t, h, w) == (2, 4, 6) and patches.shape == (48, 1176) and patches.dtype == torch.float32
    seen = iter(patches.reshape(-1, 3, 2, 14, 14))
    for time in range(t):
        for top, left in [(y, x) for y in range(0, h, 2) for x in range(0, w, 2)]:
            for row, column in [(top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)]:
                place = frames[
                    2 * time : 2 * time + 2, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14
                ]
                expected = (place / 255 - VIT_MEAN) / VIT_STD  # [time, row, column, channel]
                np.testing.assert_allclose(next(seen), expected.transpose(3, 0, 1, 2), atol=1e-6)  # fp32


@pytest.mark.parametrize("count", [1, 3])
def test_an_odd_clip_repeats_its_last_frame(count: int) -> None:
    frames = noise(count, 28, 28, 3)
    padded = np.concatenate([frames, frames[-1:]])
    assert torch.equal(to_vit_patches(frames)[0], to_vit_patches(padded)[0])
    assert to_vit_patches(frames)[1] == ((count + 1) // 2, 2, 2)


def test_frames_stay_as_they_were_given() -> None:
    frames = noise(2, 56, 56, 3)
    before = frames.copy()
    to_vit_patches(frames), to_vae_pixels(frames).add_(1), resize_to_bucket(frames, 56, 28)
    np.testing.assert_array_equal(frames, before)


def test_vae_pixels_and_back() -> None:
    frames = np.arange(256, dtype=np.uint8).repeat(3).reshape(2, 16, 8, 3)
    pixels = to_vae_pixels(frames)
    assert pixels.shape == (3, 2, 16, 8) and pixels.dtype == torch.float32
    assert pixels.min() == -1 and pixels.max() == 1
    np.testing.assert_array_equal(from_vae_pixels(pixels), frames)
    np.testing.assert_array_equal(from_vae_pixels(pixels * 3).max(), 255)


def test_each_frame_of_a_clip_is_resized_like_a_picture_alone() -> None:
    frames = noise(3, 70, 110, 3)
    together = resize_to_bucket(frames, 64, 16)
    alone = [resize_to_bucket(frame[None], 64, 16)[0] for frame in frames]
    np.testing.assert_array_equal(together, np.stack(alone))


def test_a_picture_of_bucket_size_is_not_touched() -> None:
    frames = noise(1, 256, 256, 3)
    np.testing.assert_array_equal(resize_to_bucket(frames, 256, 16), frames)


def test_every_small_size_has_a_crop_inside_it() -> None:
    buckets = Buckets(256)
    for height in range(1, 40):
        for width in range(1, 40):
            top, left, inner_height, inner_width = buckets.crop(height, width)
            assert top >= 0 and left >= 0 and inner_height >= 1 and inner_width >= 1
            assert top + inner_height <= height and left + inner_width <= width


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (7, 5)])
def test_extreme_shapes_are_resized(shape: tuple[int, int]) -> None:
    out = resize_to_bucket(noise(1, *shape, 3), 112, 28)
    assert out.shape[1] % 28 == 0 and out.shape[2] % 28 == 0 and out.size > 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Buckets(8), "resolution 8"),
        (lambda: resize_to_bucket(noise(1, 90, 210, 3), 30, 28), "smaller than 28: use a higher resolution"),
        (lambda: resize_to_bucket(np.zeros((1, 8, 8, 3)), 64, 16), "float64"),
        (lambda: resize_to_bucket(noise(8, 8, 3), 64, 16), r"uint8 \[T, H, W, 3\]"),
        (lambda: to_vae_pixels(noise(0, 8, 8, 3)), "empty"),
        (lambda: to_vae_pixels([1, 2]), "got list"),  # type: ignore[arg-type]
        (lambda: to_vit_patches(noise(1, 30, 28, 3)), "multiples of 28"),
    ],
)
def test_what_cannot_be_resized_is_refused(call: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        call()
