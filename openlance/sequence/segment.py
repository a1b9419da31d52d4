"""The one noun of the model: a sample is an ordered list of segments.

A text segment is a run of token ids. A visual segment is `<|vision_start|>`, one token per grid cell and
`<|vision_end|>`; its two markers are text tokens, but belong to the segment for attention and positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor


class Kind(StrEnum):
    """What a segment's inner tokens are."""

    TEXT = "text"  # und expert, causal
    VIT = "vit"  # und expert, semantic view, both ways
    CLEAN = "clean"  # gen expert at time 0, condition, both ways
    NOISY = "noisy"  # gen expert at time t, both ways, seen by nobody else


class Role(StrEnum):
    """What a segment is for: guidance and condition dropout remove segments by role."""

    TEMPLATE = "template"  # system prompt and turn markers
    USER = "user"  # the user's own words
    ANSWER = "answer"  # the model's words: these carry cross-entropy
    SOURCE = "source"  # what is edited, and what an answer looks at
    REFERENCE = "reference"  # a subject to be drawn again
    TARGET = "target"  # what is generated


@dataclass(frozen=True, eq=False)
class Segment:
    """One segment of a sample.

    ids: [n] int64, of a text segment (empty otherwise).
    grid: (frames, rows, columns) of a visual segment's inner tokens.
    patches: [4 · n, 3 · 2 · patch²] pixels of a ViT segment, in the tower's order (n inner tokens);
        features: [n, hidden] what the tower makes of them, where that is known already.
    latents: [frames, rows, columns, channels] of a latent segment; a noisy one may be without (inference).
    fixed_frames: latent frames of a noisy segment that are given and stay at time 0 (image-to-video).
    """

    kind: Kind
    role: Role
    ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    grid: tuple[int, int, int] | None = None
    patches: Tensor | None = None
    features: Tensor | None = None
    latents: Tensor | None = None
    fixed_frames: tuple[int, ...] = ()

    @property
    def visual(self) -> bool:
        return self.kind is not Kind.TEXT

    @property
    def inner(self) -> int:
        """Tokens between the markers; 0 for text."""
        if self.grid is None:
            return 0
        frames, rows, columns = self.grid
        return frames * rows * columns

    @property
    def generative(self) -> bool:
        """Whether the gen expert serves the inner tokens."""
        return self.kind in (Kind.CLEAN, Kind.NOISY)

    def __len__(self) -> int:
        return self.inner + 2 if self.visual else len(self.ids)

    def fixed_tokens(self) -> Tensor:
        """[inner] bool: inner tokens that lie in a fixed frame."""
        assert self.grid is not None
        fixed = torch.zeros(self.grid, dtype=torch.bool)
        for frame in self.fixed_frames:
            fixed[frame] = True
        return fixed.flatten()


Sample = list[Segment]


def without(sample: Sample, *roles: Role) -> Sample:
    """The sample less the segments of these roles: the sequence for guidance, or for condition dropout."""
    return [s for s in sample if s.role not in roles]


def generates_media(sample: Sample) -> bool:
    """Whether a noisy segment stands in the sample."""
    return any(s.kind is Kind.NOISY for s in sample)
