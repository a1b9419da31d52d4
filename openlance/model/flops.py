"""Floating point operations of what the network and its encoders compute, from shapes and lengths alone.

Only matrix products, convolutions and attention count, a multiplication and an addition as two: the count of
`torch.utils.flop_counter`, and the customary one of "model FLOPs" (PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import pairwise

from openlance.config import BackboneConfig, ModelConfig, VAEConfig, VisionConfig
from openlance.model.embed import TIME_FEATURES
from openlance.model.vae import PIXEL_PATCH
from openlance.sequence.segment import Kind, Role, Sample


@dataclass(frozen=True)
class Work:
    """What of a step decides its operations.

    und, gen: tokens that each expert serves. pairs: (query, key) that see each other. answers: tokens whose
    logits are computed.
    """

    und: int = 0
    gen: int = 0
    pairs: int = 0
    answers: int = 0

    @property
    def tokens(self) -> int:
        return self.und + self.gen

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def work_of(samples: Iterable[Sample]) -> Work:
    """The work of a batch, each sample attending to itself alone (the rule of `openlance.sequence.mask`)."""
    total = Work()
    for sample in samples:
        seen = 0  # tokens so far that later segments see
        for segment in sample:
            length = len(segment)
            gen = segment.inner if segment.generative else 0
            own = length * length if segment.visual else length * (length + 1) // 2
            answers = length if segment.role is Role.ANSWER and not segment.visual else 0
            total += Work(length - gen, gen, length * seen + own, answers)
            if segment.kind is not Kind.NOISY:
                seen += length
    return total


def forward_flops(config: ModelConfig, work: Work) -> int:
    """Of one pass of the backbone with its embeddings and heads; the frozen encoders are not in it."""
    return linear_flops(config, work.und, work.gen, work.answers) + attention_flops(config, work)


def layers_flops(config: ModelConfig, work: Work) -> int:
    """The share of `forward_flops` that lies in the layers."""
    body = config.backbone
    return work.tokens * 2 * layer_weights(body) * body.layers + attention_flops(config, work)


def layer_weights(body: BackboneConfig) -> int:
    """Values in the matrices of one expert's share of one layer: q, k, v, o, gate, up, down."""
    kv = body.kv_heads * body.head_dim
    return 2 * body.hidden * (body.hidden + kv) + 3 * body.hidden * body.mlp


def linear_flops(config: ModelConfig, und: int, gen: int, answers: int) -> int:
    """Every matrix product with weights: two operations for each weight and token."""
    body = config.backbone
    ends = 2 * config.vae.channels * body.hidden + TIME_FEATURES * body.hidden + body.hidden**2
    layers = (und + gen) * layer_weights(body) * body.layers
    return 2 * (layers + gen * ends + answers * body.hidden * body.vocab)


def attention_flops(config: ModelConfig, work: Work) -> int:
    """Attention: a score and a weighted value for each pair, head and layer."""
    return 4 * config.backbone.hidden * config.backbone.layers * work.pairs


def vision_flops(config: VisionConfig, frames: int, rows: int, columns: int) -> int:
    """The vision tower on a grid of patches; frames are those of patches (two of the clip's).

    Layers attend within windows of `window` pixels a side, a few of them within the whole frame.
    """
    patches, hidden = frames * rows * columns, config.hidden
    values, merged = 3 * config.temporal_patch * config.patch**2, hidden * config.merge**2
    layer = 4 * hidden**2 + 3 * hidden * config.mlp
    merger = merged * (merged + config.out_hidden)
    linear = patches * (values * hidden + config.depth * layer) + patches // config.merge**2 * merger
    side = config.window // config.patch
    windows = frames * _window_pairs(rows, columns, side)
    whole = frames * (rows * columns) ** 2
    full = len(config.full_attention_layers)
    return 2 * linear + 4 * hidden * ((config.depth - full) * windows + full * whole)


def _window_pairs(rows: int, columns: int, side: int) -> int:
    """Pairs of patches that share a window; those at the far edges are cut off."""
    pieces = [[min(side, length - start) for start in range(0, length, side)] for length in (rows, columns)]
    return sum(height**2 for height in pieces[0]) * sum(width**2 for width in pieces[1])


def vae_encode_flops(config: VAEConfig, frames: int, rows: int, columns: int) -> int:
    """The VAE's encoder for a clip of this many latent frames, rows and columns.

    The first latent frame is one picture, with kernels of one frame; later ones `temporal_stride` each.
    """
    first = _encode_chunk(config, 1, 1, rows, columns)
    later = _encode_chunk(config, config.temporal_stride, 3, rows, columns)
    return first + (frames - 1) * later


def _encode_chunk(config: VAEConfig, count: int, reach: int, rows: int, columns: int) -> int:
    """One latent frame from `count` pictures; reach: frames that a kernel meets."""
    widths = [config.base * factor for factor in (1, *config.multipliers)]
    height, width = (side * config.spatial_stride // PIXEL_PATCH for side in (rows, columns))
    total = _conv(3 * PIXEL_PATCH**2, widths[0], 9 * reach) * count * height * width
    for stage, (before, after) in enumerate(pairwise(widths)):
        others = (config.residual_blocks - 1) * _residual(after, after, reach)
        total += (_residual(before, after, reach) + others) * count * height * width
        if stage == len(widths) - 2:
            break
        height, width = height // 2, width // 2
        total += _conv(after, after, 9) * count * height * width
        if config.temporal_downsample[stage] and reach > 1:
            count //= 2
            total += _conv(after, after, 3) * count * height * width
    cells, last, out = height * width, widths[-1], 2 * config.channels
    attention = _conv(last, 4 * last, 1) + 4 * last * cells  # one head
    ends = _conv(last, out, 9 * reach) + _conv(out, out, 1)
    return total + cells * (2 * _residual(last, last, reach) + attention + ends)


def _conv(before: int, after: int, taps: int) -> int:
    return 2 * before * after * taps


def _residual(before: int, after: int, reach: int) -> int:
    shortcut = _conv(before, after, 1) if before != after else 0
    return _conv(before, after, 9 * reach) + _conv(after, after, 9 * reach) + shortcut
