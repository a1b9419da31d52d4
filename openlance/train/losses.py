"""The two losses: cross-entropy on words, squared error on velocities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openlance.flow.path import interpolate
from openlance.model.attention import Pattern
from openlance.model.lance import Lance, Output
from openlance.sequence.pack import PackedBatch
from openlance.train.settings import TrainConfig


@dataclass(frozen=True)
class Counts:
    """How many tokens carry each loss, in everything that one update learns from: all packs of all
    processes."""

    answers: float
    denoised: float

    @classmethod
    def of(cls, *batches: PackedBatch) -> Counts:
        return cls(
            sum(len(batch.answer_index) for batch in batches),
            sum(int(batch.denoised.sum()) for batch in batches),
        )


@dataclass(frozen=True, eq=False)
class Losses:
    """total: what is minimised. ce [answers] and mse [denoised] a token; empty where there is none."""

    total: Tensor
    ce: Tensor
    mse: Tensor
    output: Output


def losses(
    model: Lance,
    batch: PackedBatch,
    config: TrainConfig,
    noise: Tensor,
    *,
    counts: Counts | None = None,
    vocabulary: int | None = None,
    pattern: Pattern | None = None,
) -> Losses:
    """Losses of a batch whose latents are clean and whose times say how much noise each token gets.

    noise: [g, channels], of all latent tokens, float32 like the latents; at time 0 it leaves a token as it
    is. vocabulary: ids at or above are not in the softmax (the table is padded); default all. Cross-entropy
    is summed over the answers' tokens and divided by their count; the squared error is averaged over
    channels, summed over denoised tokens and divided by their count (arXiv 2605.18678). counts: of the whole
    update; default this batch's own.
    """
    counts = Counts.of(batch) if counts is None else counts
    noisy, velocity = interpolate(batch.latents, noise, batch.times.to(batch.latents))
    out = model(batch, pattern=pattern, latents=noisy.to(model.dtype))
    ce = mse = torch.zeros(0, device=noise.device)
    total = torch.zeros((), device=noise.device)
    if len(batch.answer_index):
        logits = model.head(out.hidden[batch.answer_index]).float()[:, :vocabulary]
        ce = F.cross_entropy(logits, batch.answer_labels, reduction="none")
        total = total + config.ce_weight * ce.sum() / counts.answers
    if batch.denoised.any():
        error = (out.velocity.float() - velocity)[batch.denoised]
        mse = error.square().mean(-1)
        total = total + config.mse_weight * mse.sum() / counts.denoised
    return Losses(total, ce, mse, out)


class Objective(nn.Module):
    """The network with its losses as one module: what is sharded over processes, and differentiated.

    Every trained parameter has a gradient after every backward pass, zero where a pack has no use for it:
    processes that exchange gradients must exchange the same ones.
    """

    def __init__(self, model: Lance, config: TrainConfig, vocabulary: int | None = None):
        super().__init__()
        self.model = model
        self.config = config
        self.vocabulary = vocabulary

    def forward(self, batch: PackedBatch, noise: Tensor, counts: Counts, pattern: Pattern | None) -> Losses:
        found = losses(
            self.model, batch, self.config, noise,
            counts=counts, vocabulary=self.vocabulary, pattern=pattern,
        )  # fmt: skip
        out = found.output
        unused = out.hidden.sum() + out.velocity.sum() + self.model.head(out.hidden[:1]).sum()
        return Losses(found.total + 0 * unused.float(), found.ce, found.mse, out)

    def velocity(self, batch: PackedBatch, latents: Tensor, times: Tensor, pattern: Pattern) -> Tensor:
        """Velocities [g, C] float32 of all latent tokens, from their latents [g, C] and times [g]: for what
        learns otherwise than by `losses`."""
        out = self.model(batch, pattern=pattern, latents=latents.to(self.model.dtype), times=times)
        return out.velocity.float() + 0 * (out.hidden.sum() + self.model.head(out.hidden[:1]).sum()).float()

    def logits(self, batch: PackedBatch, pattern: Pattern) -> Tensor:
        """Logits [answers, vocabulary] float32 of the batch's answers, for the same purpose."""
        out = self.model(batch, pattern=pattern)
        return self.model.head(out.hidden[batch.answer_index]).float() + 0 * out.velocity.sum().float()
