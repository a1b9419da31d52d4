"""Rotary positions: multimodal RoPE over the whole sequence, then MaPE's offsets on the temporal axis."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from openlance.config import MaPEConfig
from openlance.sequence.segment import Kind, Role, Sample, generates_media

TEMPORAL_STEP = 2  # positions a latent or merged ViT frame: tokens_per_second 2, one second a frame


@lru_cache(maxsize=256)
def _visual(grid: tuple[int, int, int]) -> Tensor:
    """[3, inner + 2] from 0: start marker, inner grid from 1, end marker after the largest value used."""
    frames, rows, columns = grid
    t, h, w = torch.meshgrid(
        torch.arange(frames) * TEMPORAL_STEP, torch.arange(rows), torch.arange(columns), indexing="ij"
    )
    inner = torch.stack([t, h, w]).flatten(1) + 1
    end = inner.max() + 1
    return torch.cat([torch.zeros(3, 1, dtype=torch.long), inner, end.expand(3, 1)], dim=1)


def rope_positions(sample: Sample) -> list[Tensor]:
    """Multimodal RoPE as in Qwen2.5-VL (arXiv 2502.13923), before MaPE: [3, len] for each segment."""
    placed, start = [], 0
    for segment in sample:
        if segment.grid is not None:
            position = _visual(segment.grid) + start
        else:
            position = torch.arange(start, start + len(segment)).expand(3, -1)
        placed.append(position)
        if position.numel():
            start = int(position.max()) + 1
    return placed


def mape_positions(sample: Sample, mape: MaPEConfig) -> list[Tensor]:
    """Positions [3, len(segment)] (time, height, width) that the network uses, for each segment.

    One temporal offset moves all ViT segments so that the first starts at `mape.vit`; another moves all
    reference latents to `mape.reference`. In editing, the target takes all three axes of the last source
    latents that have as many tokens (arXiv 2605.18678). Text and plain targets stay.
    """
    placed = rope_positions(sample)
    shift_vit = mape.shift_understanding or generates_media(sample)
    groups = (
        (mape.vit, lambda s: s.kind is Kind.VIT and shift_vit),
        (mape.reference, lambda s: s.kind is Kind.CLEAN and s.role is Role.REFERENCE),
    )
    moved = list(placed)
    for origin, belongs in groups:
        members = [i for i, segment in enumerate(sample) if belongs(segment)]
        for i in members:
            offset = torch.tensor([origin - int(placed[members[0]][0, 0]), 0, 0])
            moved[i] = placed[i] + offset[:, None]
    return [_aligned(sample, moved, i) for i in range(len(sample))]


def _aligned(sample: Sample, placed: list[Tensor], i: int) -> Tensor:
    if sample[i].role is Role.TARGET and sample[i].kind is Kind.NOISY:
        for j in reversed(range(i)):
            source = sample[j]
            if source.kind is Kind.CLEAN and source.role is Role.SOURCE and len(source) == len(sample[i]):
                return placed[j]
    return placed[i]
