"""From frames to what the two visual encoders take: bucket resize, VAE pixels, ViT patches.

A frame is cropped to the aspect ratio of the nearest bucket, resized to the bucket (bicubic with
antialiasing, on 8-bit values, as Pillow does it), then cropped to a multiple of what the encoder divides by:
16 for the VAE, 28 for the ViT (patch 14, merged 2x2). All crops are centred; of an odd excess the far side
loses one pixel more.
"""

from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from openlance.data.frames import Frames
from openlance.errors import InputError

ASPECTS = ((21, 9), (16, 9), (4, 3), (1, 1), (3, 4), (9, 16))
"""Aspect ratios (width, height) of the buckets, widest first."""

VAE_DIVISOR = 16
VIT_DIVISOR = 28
VIT_MEAN = (0.48145466, 0.4578275, 0.40821073)
VIT_STD = (0.26862954, 0.26130258, 0.27577711)


class Crop(NamedTuple):
    """A rectangle of the source, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Buckets:
    """The six sizes of about resolution² pixels that sources are brought to, sides multiples of `stride`.

    Raises InputError where the resolution is smaller than the stride.
    """

    resolution: int
    stride: int = 16

    def __post_init__(self) -> None:
        if self.stride < 1 or self.resolution < self.stride:
            raise InputError(f"resolution {self.resolution} is smaller than the bucket stride {self.stride}")

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every bucket, in the order of `ASPECTS`.

        The short side is rounded first and the long side follows from it, so the area may be a little off.
        """
        return [self._size(width, height) for width, height in ASPECTS]

    def _size(self, width: int, height: int) -> tuple[int, int]:
        ratio = max(width, height) / min(width, height)
        short = round(self.resolution / sqrt(ratio) / self.stride) * self.stride
        long = round(short * ratio / self.stride) * self.stride
        return (short, long) if width >= height else (long, short)

    def nearest(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the bucket whose width/height is nearest to the source's."""
        return min(self.sizes, key=lambda size: abs(size[1] / size[0] - width / height))

    def crop(self, height: int, width: int) -> Crop:
        """The largest centred rectangle of the source with the aspect ratio of its bucket."""
        bucket_height, bucket_width = self.nearest(height, width)
        if width / height > bucket_width / bucket_height:
            inner = height, round(height * bucket_width / bucket_height)
        else:
            inner = round(width * bucket_height / bucket_width), width
        return _centred(height, width, *inner)

    def out_size(self, height: int, width: int, divisor: int) -> tuple[int, int]:
        """(height, width) that a source of this size ends at: its bucket, cut down to multiples of `divisor`.

        Raises InputError where the bucket is smaller than the divisor.
        """
        bucket = self.nearest(height, width)
        out = bucket[0] // divisor * divisor, bucket[1] // divisor * divisor
        if 0 in out:
            raise InputError(
                f"resolution {self.resolution} gives a bucket of {bucket[1]}x{bucket[0]} pixels, "
                f"smaller than {divisor}: use a higher resolution"
            )
        return out


def resize_to_bucket(frames: Frames, resolution: int, divisor: int, stride: int = 16) -> Frames:
    """Bring frames uint8 [T, H, W, 3] to their bucket: uint8 [T, H', W', 3], sides multiples of `divisor`.

    The bucket follows from the frames' own aspect ratio, see `Buckets`. This is the released preprocessing,
    except that of an odd excess the same pixel goes every time.
    Raises InputError for anything but uint8 RGB frames and for a resolution that is too small.
    """
    frames = _check_frames(frames)
    height, width = frames.shape[1:3]
    buckets = Buckets(resolution, stride)
    source, bucket = buckets.crop(height, width), buckets.nearest(height, width)
    out = _centred(*bucket, *buckets.out_size(height, width, divisor))
    resized = np.empty((len(frames), *bucket, 3), dtype=np.uint8)
    for target, frame in zip(resized, _cut(frames, source), strict=True):
        image = Image.fromarray(np.ascontiguousarray(frame))
        target[:] = np.asarray(image.resize((bucket[1], bucket[0]), Image.Resampling.BICUBIC))
    return np.ascontiguousarray(_cut(resized, out))


def to_vae_pixels(frames: Frames) -> Tensor:
    """Frames uint8 [T, H, W, 3] as the VAE takes them: float32 [3, T, H, W] in [-1, 1]."""
    pixels = torch.from_numpy(_check_frames(frames).copy()).permute(3, 0, 1, 2)
    return (pixels.float().div_(255) - 0.5).div_(0.5).contiguous()


def from_vae_pixels(pixels: Tensor) -> Frames:
    """The inverse of `to_vae_pixels`: [3, T, H, W] in [-1, 1] (clamped, rounded) to uint8 [T, H, W, 3]."""
    if pixels.ndim != 4 or pixels.shape[0] != 3:
        raise ValueError(f"expected pixels [3, T, H, W], got {list(pixels.shape)}")
    levels = (pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    return levels.round().to(torch.uint8).permute(1, 2, 3, 0).contiguous().numpy()


def to_vit_patches(
    frames: Frames,
    patch: int = 14,
    temporal_patch: int = 2,
    merge: int = 2,
    mean: tuple[float, float, float] = VIT_MEAN,
    std: tuple[float, float, float] = VIT_STD,
) -> tuple[Tensor, tuple[int, int, int]]:
    """Frames uint8 [T, H, W, 3] as Qwen2.5-VL's vision tower takes them.

    Gives (patches, grid): patches float32 [t*h*w, 3*temporal_patch*patch*patch], each value
    (u8/255 - mean)/std, and the grid (t, h, w) they were cut on. The last frame repeats until T is a multiple
    of `temporal_patch`, so an image counts as two equal frames. Patches run over time, then over
    merge x merge blocks in reading order, then inside the block in reading order; inside a patch the order is
    channel, time, row, column.
    Raises InputError for anything but uint8 RGB frames with sides that are multiples of patch*merge.
    """
    frames = _check_frames(frames)
    if frames.shape[1] % (patch * merge) or frames.shape[2] % (patch * merge):
        raise InputError(
            f"frames of {frames.shape[1]}x{frames.shape[2]} cannot be cut into patches: both sides must be "
            f"multiples of {patch * merge}; resize them first (resize_to_bucket with this divisor)"
        )
    missing = -len(frames) % temporal_patch
    frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    grid = len(frames) // temporal_patch, frames.shape[1] // patch, frames.shape[2] // patch
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2).float().div_(255)
    pixels.sub_(torch.tensor(mean).view(3, 1, 1, 1)).div_(torch.tensor(std).view(3, 1, 1, 1))
    t, h, w = grid
    cut = pixels.reshape(3, t, temporal_patch, h // merge, merge, patch, w // merge, merge, patch)
    ordered = cut.permute(1, 3, 6, 4, 7, 0, 2, 5, 8)
    return ordered.reshape(t * h * w, 3 * temporal_patch * patch * patch), grid


def _centred(height: int, width: int, inner_height: int, inner_width: int) -> Crop:
    return Crop((height - inner_height) // 2, (width - inner_width) // 2, inner_height, inner_width)


def _cut(frames: Frames, crop: Crop) -> Frames:
    return frames[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]


def _check_frames(frames: Frames) -> Frames:
    if not isinstance(frames, np.ndarray):
        raise InputError(f"expected frames as a uint8 array [T, H, W, 3], got {type(frames).__name__}")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise InputError(f"expected frames as uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    if frames.size == 0:
        raise InputError(f"the frames are empty: {list(frames.shape)}")
    return frames
