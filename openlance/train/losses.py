"""The two losses: cross-entropy on words, squared error on velocities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from openlance.config import TrainConfig
from openlance.flow.path import interpolate
from openlance.model.lance import Lance
from openlance.sequence.pack import PackedBatch


@dataclass(frozen=True, eq=False)
class Losses:
    """total: what is minimised. ce [answers] and mse [denoised] a token; empty where there is none."""

    total: Tensor
    ce: Tensor
    mse: Tensor


def losses(
    model: Lance, batch: PackedBatch, config: TrainConfig, noise: Tensor, *, vocabulary: int | None = None
) -> Losses:
    """Losses of a batch whose latents are clean and whose times say how much noise each token gets.

    noise: [g, channels], of all latent tokens; at time 0 it leaves a token as it is. vocabulary: ids at or
    above are not in the softmax (the table is padded); default all. Cross-entropy is summed over
    the answers' tokens and divided by their count; the squared error is averaged over channels, summed
    over denoised tokens and divided by their count (arXiv 2605.18678).
    """
    noisy, velocity = interpolate(batch.latents, noise, batch.times.to(batch.latents))
    out = model(batch, latents=noisy)
    ce = mse = torch.zeros(0, device=noise.device)
    total = torch.zeros((), device=noise.device)
    if len(batch.answer_index):
        logits = model.head(out.hidden[batch.answer_index]).float()[:, :vocabulary]
        ce = F.cross_entropy(logits, batch.answer_labels, reduction="none")
        total = total + config.ce_weight * ce.mean()
    if batch.denoised.any():
        error = (out.velocity - velocity)[batch.denoised].float()
        mse = error.square().mean(-1)
        total = total + config.mse_weight * mse.mean()
    return Losses(total, ce, mse)
