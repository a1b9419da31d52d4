"""Media and sizes as a user gives them, into what the model takes."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from openlance.config import ModelConfig, Sizes
from openlance.data.fields import select_frames
from openlance.data.media import (
    VAE_DIVISOR,
    Buckets,
    Frames,
    Media,
    Source,
    Video,
    as_frames,
    load_media,
    resize_to_bucket,
    to_vae_pixels,
)
from openlance.data.tasks import Resolutions, View, semantic_view
from openlance.errors import InputError
from openlance.model.vae import VAE

log = logging.getLogger("openlance")

Size = tuple[int, int]
"""(height, width) in pixels."""


def load(source: Source, sizes: Sizes) -> Media:
    """Any picture or clip; of a clip only the frames that the model will see are kept."""
    select = select_frames(sizes)
    if isinstance(source, Video):
        return Video(source.frames[select(len(source.frames), source.fps)], sizes.fps)
    return load_media(source, select)


@torch.inference_mode()
def encode_latents(
    frames: Frames, resolution: int, vae: VAE, *, posterior: torch.Generator | None = None
) -> Tensor:
    """Latents [T', H', W', channels] float32 on the CPU, of frames uint8 [T, H, W, 3].

    The frames are resized to their bucket; the latents are the mean of the posterior, or a draw from it
    where a generator is given.
    """
    pixels = to_vae_pixels(resize_to_bucket(frames, resolution, VAE_DIVISOR))
    return vae.encode(pixels[None].to(vae.dtype), sample=posterior)[0].float().cpu()


def view(
    media: Media, resolutions: Resolutions, config: ModelConfig, vae: VAE | None, *,
    semantic: bool = True, posterior: torch.Generator | None = None,
) -> View:  # fmt: skip
    """A picture or clip as the model sees it: the ViT's patches, and latents where a VAE is given."""
    frames = as_frames(media)
    seen = semantic_view(frames, resolutions.vit, config) if semantic else View()
    if vae is None:
        return seen
    latents = encode_latents(frames, resolutions.vae, vae, posterior=posterior)
    return View(seen.grid, seen.patches, latents=latents)


def sizes_of(source: Source, config: ModelConfig) -> dict[str, int]:
    """The sizes by default of requests as large as what is made of a picture or clip, edited or animated.

    Fields of `Sizes`: squares with the area of its buckets, and the frames that are taken of a clip. Only the
    first one is decoded. Raises InputError for what cannot be read.
    """
    taken: list[int] = []

    def first(count: int, fps: float) -> list[int]:
        taken.extend(select_frames(config.sizes)(count, fps))
        return [0]

    media = load_media(source, first)
    height, width = as_frames(media).shape[1:3]
    found = {"frames": len(taken)} if isinstance(media, Video) else {}
    for name, video in (("image", False), ("video", True)):
        buckets = Buckets(Resolutions.of(config.sizes, video=video).vae)
        found[name] = square_side(buckets.out_size(height, width, VAE_DIVISOR), config)
    return found


def square_side(size: Size, config: ModelConfig) -> int:
    """Of the least square of whole latent cells that is as large as a rectangle, in pixels."""
    stride = config.vae.spatial_stride
    return math.ceil(math.prod(size) ** 0.5 / stride) * stride


def target_size(size: Size | int | None, default: Size, config: ModelConfig) -> Size:
    """A size that the model can generate: multiples of 16; what had to be rounded is said in the log.

    Raises InputError for a size below 16 pixels or beyond the latent position table.
    """
    height, width = default if size is None else (size, size) if isinstance(size, int) else size
    stride = config.vae.spatial_stride
    most = config.max_latent_side * stride
    if min(height, width) < stride or max(height, width) > most:
        raise InputError(f"size {height}x{width}: each side must lie between {stride} and {most} pixels")
    rounded = (round(height / stride) * stride, round(width / stride) * stride)
    if rounded != (height, width):
        log.warning(
            "size %dx%d is not a multiple of %d: made %dx%d (height x width)", height, width, stride, *rounded
        )
    return rounded


def target_frames(frames: int, config: ModelConfig) -> int:
    """A clip length that the VAE can decode, 4 k + 1; rounding down is said in the log.

    Raises InputError for none, or more than the model's limit.
    """
    if not 1 <= frames <= config.max_frames:
        raise InputError(f"{frames} frames: the model generates 1 to {config.max_frames}")
    stride = config.vae.temporal_stride
    fitting = (frames - 1) // stride * stride + 1
    if fitting != frames:
        log.warning("%d frames is not %d k + 1: made %d", frames, stride, fitting)
    return fitting
