"""Samples into one `PackedBatch`: tokens sorted by expert once, [all und tokens | all gen tokens].

Every token keeps its sample, segment and order, so the mask predicate reads order, not place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from openlance.config import ModelConfig
from openlance.sequence.mask import Visibility, visible
from openlance.sequence.positions import mape_positions
from openlance.sequence.segment import Kind, Role, Sample, Segment

GROUP_RATIO = 0.75


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A batch as the network reads it. N tokens, the first `und` of them served by the und expert.

    text_ids [n], text_index [n]: text tokens and where they stand. patches, vit_grid [m, 3] (in patches),
    vit_index: ViT inputs, and where the merged features stand; features [v, hidden] where the samples
    bring them, then without patches. latents [g, C], times [g], latent_grid
    [3, g] (frame, row, column): the gen tokens, in order; their places are und … N-1. positions [3, N].
    rows: for each group of samples of like length, their tokens in order [samples, longest], padded with
    `N`; masks: who sees whom, [samples, longest, longest] for each group. Empty when attention needs none.
    answer_index, answer_labels: tokens whose next token carries cross-entropy, and that token.
    denoised [g] bool: gen tokens that are to be denoised and carry velocity loss.
    """

    und: int
    text_ids: Tensor
    text_index: Tensor
    patches: Tensor | None
    vit_grid: Tensor | None
    features: Tensor | None
    vit_index: Tensor
    latents: Tensor
    times: Tensor
    latent_grid: Tensor
    denoised: Tensor
    positions: Tensor
    visibility: Visibility
    place: Tensor  # [N] index of each sorted token in the samples laid end to end
    answer_index: Tensor
    answer_labels: Tensor
    rows: tuple[Tensor, ...] = ()
    masks: tuple[Tensor, ...] = ()

    @property
    def tokens(self) -> int:
        return self.positions.shape[1]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PackedBatch:
        """The batch on a device; `dtype` is given to pixels and latents (times stay float32)."""
        moved: dict[str, object] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                cast = dtype if name in ("patches", "features", "latents") else None
                moved[name] = value.to(device, cast) if cast else value.to(device)
            elif isinstance(value, Visibility):
                moved[name] = value.to(device)
            elif isinstance(value, tuple):
                moved[name] = tuple(tensor.to(device) for tensor in value)
        return replace(self, **moved)  # type: ignore[arg-type]


def _token_ids(segment: Segment, config: ModelConfig) -> Tensor:
    """[len] ids: a visual segment holds its markers and placeholders."""
    if not segment.visual:
        return segment.ids
    ids = torch.full((len(segment),), config.tokens.video_pad)
    ids[0], ids[-1] = config.tokens.vision_start, config.tokens.vision_end
    return ids


def token_ids(sample: Sample, config: ModelConfig) -> Tensor:
    """[L] ids of the whole sample, placeholders where vision stands."""
    return torch.cat([_token_ids(segment, config) for segment in sample])


@lru_cache(maxsize=256)
def _grid_index(grid: tuple[int, int, int]) -> Tensor:
    """[3, frames · rows · columns] (frame, row, column) of each inner token."""
    axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    return torch.stack(axes).flatten(1)


class _Columns:
    """Per-token columns of the samples laid end to end, before sorting."""

    def __init__(self, samples: list[Sample], placed: list[list[Tensor]], config: ModelConfig):
        ids, positions, sample_no, segment_no, visual, noisy, inner_kind, answers = ([] for _ in range(8))
        number = 0
        for index, sample in enumerate(samples):
            for segment, position in zip(sample, placed[index], strict=True):
                n = len(segment)
                ids.append(_token_ids(segment, config))
                positions.append(position)
                sample_no.append(torch.full((n,), index))
                segment_no.append(torch.full((n,), number))
                visual.append(torch.full((n,), segment.visual))
                noisy.append(torch.full((n,), segment.kind is Kind.NOISY))
                inner = torch.zeros(n, dtype=torch.long)  # 0 text and markers, 1 ViT, 2 latent
                if segment.visual:
                    inner[1:-1] = 2 if segment.generative else 1
                inner_kind.append(inner)
                answers.append(torch.full((n,), segment.role is Role.ANSWER and not segment.visual))
                number += 1
        self.ids, self.sample, self.segment = torch.cat(ids), torch.cat(sample_no), torch.cat(segment_no)
        self.positions = torch.cat(positions, dim=1)
        self.visual, self.noisy = torch.cat(visual), torch.cat(noisy)
        self.inner, self.answer = torch.cat(inner_kind), torch.cat(answers)


def pack(
    samples: list[Sample],
    config: ModelConfig,
    *,
    times: list[float] | None = None,
    positions: list[list[Tensor]] | None = None,
    dense: bool = True,
) -> PackedBatch:
    """Lay samples out as one batch.

    times: one time in [0, 1] a sample, for its noisy tokens (fixed frames stay at 0); default 1.
    positions: [3, len(segment)] of each segment of each sample, where the samples are pieces of a longer
        sequence; default what `mape_positions` gives.
    dense: also build the padded rows and their mask, for attention that needs one.
    Noisy latents are placed as given (a caller mixes noise in beforehand); absent ones are zero.
    """
    if positions is None:
        positions = [mape_positions(sample, config.mape) for sample in samples]
    c = _Columns(samples, positions, config)
    und_place = torch.nonzero(c.inner < 2).flatten()
    gen_place = torch.nonzero(c.inner == 2).flatten()
    place = torch.cat([und_place, gen_place])
    rank = torch.empty_like(place)
    rank[place] = torch.arange(len(place))

    visibility = Visibility(
        sample=c.sample[place],
        segment=c.segment[place],
        order=place,
        visual=c.visual[place],
        noisy=c.noisy[place],
    )
    target = torch.nonzero(c.answer).flatten()
    patches, vit_grid, features = _vit_inputs(samples)
    latents, token_times, grid, denoised = _latent_inputs(samples, config, times)
    rows, masks = _dense_rows(c.sample, rank, visibility) if dense else ((), ())
    is_text, is_vit = c.inner[und_place] == 0, c.inner[und_place] == 1
    return PackedBatch(
        und=len(und_place),
        text_ids=c.ids[und_place][is_text],
        text_index=torch.nonzero(is_text).flatten(),
        patches=patches,
        vit_grid=vit_grid,
        features=features,
        vit_index=torch.nonzero(is_vit).flatten(),
        latents=latents,
        times=token_times,
        latent_grid=grid,
        denoised=denoised,
        positions=c.positions[:, place],
        visibility=visibility,
        place=place,
        answer_index=rank[target - 1],
        answer_labels=c.ids[target],
        rows=rows,
        masks=masks,
    )


def _vit_inputs(samples: list[Sample]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(patches, grids in patches, features): features where all views bring theirs, else patches."""
    views = [s for sample in samples for s in sample if s.kind is Kind.VIT]
    if not views:
        return None, None, None
    features = [view.features for view in views if view.features is not None]
    if len(features) == len(views):
        return None, None, torch.cat(features)
    patches = [view.patches for view in views if view.patches is not None]
    assert len(patches) == len(views), "each ViT segment needs patches, or each features"
    grids = torch.tensor([view.grid for view in views]) * torch.tensor([1, 2, 2])
    return torch.cat(patches), grids, None


def _latent_inputs(
    samples: list[Sample], config: ModelConfig, times: list[float] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(latents [g, C], times [g], grid [3, g], denoised [g]) of all latent segments in order."""
    channels = config.vae.channels
    latents, token_times, grids, denoised = [], [], [], []
    for index, sample in enumerate(samples):
        for segment in sample:
            if not segment.generative:
                continue
            assert segment.grid is not None
            n = segment.inner
            given = segment.latents
            latents.append(torch.zeros(n, channels) if given is None else given.reshape(n, channels))
            grids.append(_grid_index(segment.grid))
            noisy = segment.kind is Kind.NOISY
            active = ~segment.fixed_tokens() if noisy else torch.zeros(n, dtype=torch.bool)
            denoised.append(active)
            token_times.append(active * (1.0 if times is None else times[index]))
    if not latents:
        empty = torch.empty(0)
        return (torch.empty(0, channels), empty, torch.empty(3, 0, dtype=torch.long), empty.bool())
    return torch.cat(latents), torch.cat(token_times), torch.cat(grids, dim=1), torch.cat(denoised)


def _dense_rows(
    sample: Tensor, rank: Tensor, visibility: Visibility
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Rows and masks of `PackedBatch`. Padding sees itself alone, so that no softmax is empty."""
    lengths = torch.bincount(sample)
    starts = lengths.cumsum(0) - lengths
    all_rows, masks = [], []
    for members in _alike(lengths.tolist()):
        longest = int(lengths[members].max())
        column = torch.arange(longest)
        real = column < lengths[members][:, None]
        rows = torch.where(
            real, rank[(starts[members][:, None] + column).clamp(max=len(rank) - 1)], len(rank)
        )
        safe = rows.clamp(max=len(rank) - 1)
        mask = visible(safe[:, :, None], safe[:, None, :], visibility)
        mask &= real[:, :, None] & real[:, None, :]
        all_rows.append(rows)
        masks.append(mask | torch.eye(longest, dtype=torch.bool))
    return tuple(all_rows), tuple(masks)


def _alike(lengths: list[int]) -> list[list[int]]:
    """Samples grouped so that within a group none is padded by more than a quarter of the longest."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[i] >= GROUP_RATIO * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
