"""What a step learns from: samples with conditions dropped, times, and noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openlance.config import ModelConfig
from openlance.flow.path import draw_times
from openlance.sequence.pack import PackedBatch, pack
from openlance.sequence.segment import Kind, Role, Sample, Segment, without
from openlance.train.settings import TrainConfig

CONDITIONS = (Role.USER, Role.SOURCE, Role.REFERENCE)


def generator_of(config: TrainConfig, step: int, lane: int) -> torch.Generator:
    """Of a lane at a step: the same on any number of processes."""
    return torch.Generator().manual_seed((config.seed * 1_000_003 + step) * 1_009 + lane)


def draw_batch(
    samples: Sequence[Sample],
    model: ModelConfig,
    config: TrainConfig,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> tuple[PackedBatch, Tensor]:
    """Condition dropout, a time for each sample, and noise [g, channels] for its latents."""
    dropped = [_drop(sample, config, generator) for sample in samples]
    times = draw_times(len(samples), config.time_shift, generator).tolist()
    filler = _filler(dropped, model, config)
    dense = torch.device(device).type != "cuda"
    batch = pack([*dropped, *filler], model, times=[*times, *[0.0] * len(filler)], dense=dense)
    noise = torch.randn(batch.latents.shape, generator=generator)
    return batch.to(device), noise.to(device)


def _drop(sample: Sample, config: TrainConfig, generator: torch.Generator) -> Sample:
    """Words lose nothing; a sample that generates loses its conditions now and then, for guidance."""
    if any(segment.role is Role.ANSWER for segment in sample):
        return sample
    chance = float(torch.rand((), generator=generator))
    if chance < config.drop_all:
        return without(sample, *CONDITIONS)
    return without(sample, Role.USER) if chance < config.drop_all + config.drop_text else sample


def _filler(samples: Sequence[Sample], model: ModelConfig, config: TrainConfig) -> list[Sample]:
    """A sample of one token for each part that learns and that no sample uses: it carries no loss (see
    Objective)."""
    kinds = {segment.kind for sample in samples for segment in sample}
    filler: Sample = []
    if "vision" in config.trains and Kind.VIT not in kinds:
        width = 3 * model.vision.temporal_patch * model.vision.patch**2
        patches = torch.zeros(model.vision.merge**2, width)
        filler.append(Segment(Kind.VIT, Role.SOURCE, grid=(1, 1, 1), patches=patches))
    if not kinds & {Kind.CLEAN, Kind.NOISY}:
        filler.append(
            Segment(Kind.CLEAN, Role.SOURCE, grid=(1, 1, 1), latents=torch.zeros(1, 1, 1, model.vae.channels))
        )
    return [filler] if filler else []
