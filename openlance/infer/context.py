"""The context of a request: its segments run once, appended one at a time to the KV cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from openlance.model.attention import CausalTail, Full
from openlance.model.cache import KVCache
from openlance.model.lance import Lance
from openlance.sequence.pack import pack
from openlance.sequence.positions import mape_positions
from openlance.sequence.segment import Kind, Sample, Segment


@dataclass(eq=False)
class Context:
    """Segments that have been run, their positions, and one cache chunk each.

    last_hidden: [hidden] final-normed state of the last text token run, from which the next word follows.
    """

    segments: Sample = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    cache: KVCache = field(default_factory=KVCache)
    last_hidden: Tensor | None = None


def encode(
    model: Lance, sample: Sample, positions: list[Tensor] | None = None, reuse: Context | None = None
) -> Context:
    """Run the segments of a sample (none of them noisy) into a context.

    positions: of each segment, [3, len]; default those of this sample alone. What `sample` has in common
    with the head of `reuse` is shared with it, not run again. No mask is materialised: text is causal
    behind the cache, visual segments see all of it and themselves.
    """
    positions = mape_positions(sample, model.config.mape) if positions is None else positions
    kept = 0 if reuse is None else _common(reuse, sample, positions)
    if reuse is not None and kept == len(sample) == len(reuse.segments):
        return reuse
    kept = min(kept, len(sample) - 1)  # the last one is run again, for its hidden state
    context = Context()
    if reuse is not None and kept:
        context = Context(reuse.segments[:kept], reuse.positions[:kept], reuse.cache.prefix(kept))
    for segment, position in zip(sample[kept:], positions[kept:], strict=True):
        _append(model, context, segment, position)
    return context


@torch.inference_mode()
def _append(model: Lance, context: Context, segment: Segment, position: Tensor) -> None:
    assert segment.kind is not Kind.NOISY, "noisy segments are never cached"
    batch = pack([[segment]], model.config, positions=[[position]], dense=False)
    batch = batch.to(model.device, model.dtype)
    out = model(batch, context.cache, pattern=Full() if segment.visual else CausalTail())
    context.segments.append(segment)
    context.positions.append(position)
    if not segment.visual:
        context.last_hidden = out.hidden[-1]


def _common(reuse: Context, sample: Sample, positions: list[Tensor]) -> int:
    """How many leading segments are the same, at the same positions."""
    count = 0
    for old, new, old_at, new_at in zip(reuse.segments, sample, reuse.positions, positions, strict=False):
        same = old is new or (not old.visual and not new.visual and torch.equal(old.ids, new.ids))
        if not (same and torch.equal(old_at, new_at)):
            break
        count += 1
    return count
