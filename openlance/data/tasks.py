"""Rows of data into samples, by the same builder as inference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openlance.config import ModelConfig, Sizes
from openlance.data.buckets import (
    VAE_DIVISOR,
    VIT_DIVISOR,
    resize_to_bucket,
    to_vae_pixels,
    to_vit_patches,
)
from openlance.data.example import Example, Turn
from openlance.data.frames import Frames, Video
from openlance.data.media import Media, as_frames
from openlance.errors import InputError
from openlance.sequence.segment import Kind, Role, Sample, Segment
from openlance.sequence.template import Encode, Message, Task, compose, system_prompt

if TYPE_CHECKING:  # data is read without loading the VAE's library
    from openlance.model.vae import VAE

VAE_FRAMES = 4
"""Frames of each latent frame but the first, which is one frame."""

BATCH_PIXELS = 2**23
"""Pixels that the VAE encodes at once, counted over the frames that it takes at a time."""


@dataclass(frozen=True)
class Resolutions:
    """Bucket resolutions of the two streams, in pixels of a square's side."""

    vae: int
    vit: int

    @classmethod
    def of(cls, sizes: Sizes, *, video: bool) -> Resolutions:
        return cls(sizes.video, sizes.vit_video) if video else cls(sizes.image, sizes.vit_image)


@dataclass(frozen=True, eq=False)
class View:
    """One picture or clip as the model sees it.

    grid: (frames, rows, columns) of the merged ViT tokens, with their patches or features (see `Segment`).
    latents: [frames, rows, columns, channels]; pixels: uint8 [T, H, W, 3] at the VAE's bucket, of which
    they are still to be made.
    """

    grid: tuple[int, int, int] | None = None
    patches: Tensor | None = None
    features: Tensor | None = None
    latents: Tensor | None = None
    pixels: Frames | None = None

    @property
    def latent_grid(self) -> tuple[int, int, int] | None:
        """(frames, rows, columns) of the latents, whether they are made or still to be made."""
        if self.latents is not None:
            frames, rows, columns = self.latents.shape[:3]
            return frames, rows, columns
        if self.pixels is None:
            return None
        frames, height, width = self.pixels.shape[:3]
        return (frames - 1) // VAE_FRAMES + 1, height // VAE_DIVISOR, width // VAE_DIVISOR

    @property
    def encoded(self) -> bool:
        """Whether there is nothing left for the VAE to do."""
        return self.pixels is None or self.latents is not None

    def segments(self, role: Role, *, semantic: bool = True, pixels: bool = True) -> list[Segment]:
        """The ViT segment, then the clean latents, as far as wanted and known."""
        found = []
        if semantic and self.grid is not None:
            found.append(
                Segment(Kind.VIT, role, grid=self.grid, patches=self.patches, features=self.features)
            )
        if pixels and self.latent_grid is not None:
            found.append(Segment(Kind.CLEAN, role, grid=self.latent_grid, latents=self.latents))
        return found


@dataclass(frozen=True, eq=False)
class Past:
    """An earlier turn: what the user showed and said, and what came back."""

    prompt: str
    reply: str | View
    sources: tuple[View, ...] = ()


@dataclass(frozen=True, eq=False)
class Row:
    """One row of training data.

    prompt: the user's words ("" for a plain caption). answer: words to learn, of an understanding task.
    sources: what the user shows. target: what to generate; its latent frames `fixed_frames` are given
    (image-to-video). history: earlier turns, oldest first.
    """

    id: str
    task: Task
    prompt: str
    answer: str | None = None
    sources: tuple[View, ...] = ()
    target: View | None = None
    fixed_frames: tuple[int, ...] = ()
    history: tuple[Past, ...] = ()

    def views(self) -> Iterator[View]:
        """Every picture and clip of the row."""
        for turn in self.history:
            yield from turn.sources
            if isinstance(turn.reply, View):
                yield turn.reply
        yield from self.sources
        if self.target is not None:
            yield self.target

    def map_views(self, change: Callable[[View], View]) -> Row:
        """The row with every picture and clip changed."""
        history = tuple(
            Past(
                turn.prompt,
                change(turn.reply) if isinstance(turn.reply, View) else turn.reply,
                tuple(map(change, turn.sources)),
            )
            for turn in self.history
        )
        target = None if self.target is None else change(self.target)
        return replace(self, history=history, sources=tuple(map(change, self.sources)), target=target)


def semantic_view(frames: Frames, resolution: int, config: ModelConfig) -> View:
    """What the ViT takes of frames uint8 [T, H, W, 3]."""
    vision = config.vision
    resized = resize_to_bucket(frames, resolution, VIT_DIVISOR)
    patches, (t, h, w) = to_vit_patches(resized, vision.patch, vision.temporal_patch, vision.merge)
    return View(grid=(t, h // vision.merge, w // vision.merge), patches=patches)


def to_row(example: Example, config: ModelConfig, sizes: Sizes | None = None) -> Row:
    """The example with its media brought to the model's buckets; nothing is encoded yet.

    sizes: resolutions of this stage of training; default the checkpoint's own. As at inference, what a task
    that generates shows takes the resolution of what it generates, and what is asked about its own.
    Raises InputError for a clip that is not 4 k + 1 frames long, and for a resolution that is too small.
    """
    sizes = config.sizes if sizes is None else sizes
    task = example.task

    def see(media: Media, *, semantic: bool = True) -> View:
        frames = as_frames(media)
        at = Resolutions.of(sizes, video=task.video if task.generates else isinstance(media, Video))
        seen = semantic_view(frames, at.vit, config) if semantic else View()
        return replace(seen, pixels=_vae_frames(frames, at.vae)) if task.generates else seen

    def recall(turn: Turn) -> Past:
        reply = turn.reply if isinstance(turn.reply, str) else see(turn.reply)
        return Past(turn.prompt, reply, tuple(map(see, turn.sources)))

    return Row(
        example.id,
        task,
        example.prompt,
        answer=example.answer,
        sources=tuple(map(see, example.sources)),
        target=None if example.target is None else see(example.target, semantic=False),
        fixed_frames=example.fixed_frames,
        history=tuple(map(recall, example.history)),
    )


def _vae_frames(frames: Frames, resolution: int) -> Frames:
    if (len(frames) - 1) % VAE_FRAMES:
        raise InputError(f"a clip of {len(frames)} frames: their number must be {VAE_FRAMES} k + 1")
    return resize_to_bucket(frames, resolution, VAE_DIVISOR)


@torch.no_grad()  # not inference mode: gradients are taken through what reads the latents
def encode_rows(rows: Sequence[Row], vae: VAE, generator: torch.Generator | None = None) -> list[Row]:
    """The rows with the latents [frames, rows, columns, channels] of all their pixels, float32.

    Views of one shape are encoded together. The latents are the mean of the posterior, or a draw from it
    where a generator is given; they are on the VAE's device, and those that were known already move there.
    """
    weight = next(vae.parameters())
    open_views = {id(view): view for row in rows for view in row.views() if not view.encoded}
    latents: dict[int, Tensor] = {}
    for shape, alike in groupby(sorted(open_views.values(), key=_shape), _shape):
        views = list(alike)
        together = max(1, BATCH_PIXELS // (min(shape[0], VAE_FRAMES) * shape[1] * shape[2]))
        for start in range(0, len(views), together):
            batch = views[start : start + together]
            pixels = torch.stack([to_vae_pixels(view.pixels) for view in batch])  # type: ignore[arg-type]
            found = vae.encode(pixels.to(weight), sample=generator).float()
            latents |= {id(view): made for view, made in zip(batch, found, strict=True)}

    def encoded(view: View) -> View:
        known = latents.get(id(view), view.latents)
        return view if known is None else replace(view, latents=known.to(weight.device), pixels=None)

    return [row.map_views(encoded) for row in rows]


def _shape(view: View) -> tuple[int, int, int]:
    assert view.pixels is not None
    frames, height, width = view.pixels.shape[:3]
    return frames, height, width


def to_sample(row: Row, encode: Encode, config: ModelConfig) -> Sample:
    """The row as a training sample, its target clean (the loop mixes noise in).

    Segments of views that are still pixels have their grid and no latents, so that tokens can be counted.
    """
    subject = row.task in (Task.SUBJECT_IMAGE, Task.SUBJECT_VIDEO)
    role = Role.REFERENCE if subject else Role.SOURCE
    parts = _said(row.prompt, row.sources, role, row.task)
    ending: str | Segment
    if row.task.generates:
        assert row.target is not None, f"row {row.id} has no target"
        ending = Segment(
            Kind.NOISY,
            Role.TARGET,
            grid=row.target.latent_grid,
            latents=row.target.latents,
            fixed_frames=row.fixed_frames,
        )
    else:
        assert row.answer is not None, f"row {row.id} has no answer"
        ending = row.answer
    history: list[Message] = []
    for turn in row.history:
        reply = turn.reply
        shown = [reply] if isinstance(reply, str) else _said("", (reply,), Role.SOURCE, row.task)
        history += [
            Message("user", tuple(_said(turn.prompt, turn.sources, role, row.task)), past=True),
            Message("assistant", tuple(shown), past=True),
        ]
    system = system_prompt(row.task, config.system_prompts, caption=not row.prompt)
    return compose(parts, encode, system=system, ending=ending, history=history)


def _said(prompt: str, views: Sequence[View], role: Role, task: Task) -> list[str | Segment]:
    """A turn's views, then its words."""
    parts: list[str | Segment] = []
    for view in views:
        parts += view.segments(role, pixels=task.generates)
    return [*parts, prompt] if prompt else parts
