"""Generation on top of contexts: words one by one, latents by denoising."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from openlance.config import SamplingConfig, TextConfig
from openlance.flow.guidance import guide, guided_now
from openlance.flow.path import time_grid
from openlance.flow.solver import euler
from openlance.infer.context import Context, encode
from openlance.model.attention import CausalTail, Full
from openlance.model.lance import Lance
from openlance.sequence.pack import PackedBatch, pack
from openlance.sequence.positions import mape_positions
from openlance.sequence.segment import Kind, Role, Sample, Segment


class Cancelled(Exception):
    """The progress callback asked to stop."""


@dataclass(frozen=True, eq=False)
class Step:
    """One denoising step done: its number from 1, of how many, and the latents so far
    [frames, rows, columns, channels]."""

    number: int
    total: int
    latents: Tensor


OnStep = Callable[[Step], bool | None]
"""Called after each step; returning False cancels."""


class Branch:
    """One guidance branch: its context laid out once, and everything of a step that does not change."""

    def __init__(
        self,
        model: Lance,
        sample: Sample,
        positions: list[Tensor] | None = None,
        reuse: Context | None = None,
    ):
        target = sample[-1]
        assert target.kind is Kind.NOISY, "the last segment is the target"
        placed = mape_positions(sample, model.config.mape)
        self.model = model
        self.context = encode(model, sample[:-1], (positions or placed)[:-1], reuse)
        batch = pack([[target]], model.config, positions=[[placed[-1]]], dense=False)
        self.batch: PackedBatch = batch.to(model.device, model.dtype)
        self.cache = self.context.cache.frozen(room=self.batch.tokens)
        self.prepared = model.prepare(self.batch)

    def velocity(self, latents: Tensor, times: Tensor) -> Tensor:
        """[g, C] float32 of all target tokens, from latents [g, C] and times [g]."""
        out = self.model(
            self.batch, self.cache, pattern=Full(), prepared=self.prepared, latents=latents, times=times
        )
        return out.velocity.float()


@torch.inference_mode()
def denoise(
    model: Lance,
    sample: Sample,
    config: SamplingConfig,
    noise: Tensor,
    *,
    negative: Sample | None = None,
    reuse: Context | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Denoise the target of a sample (its last segment) → [frames, rows, columns, channels] float32.

    noise: like the result; fixed frames are taken from the target's latents instead. negative: the
    sample that guidance moves away from; default this one without the user's words. Raises Cancelled
    when `on_step` returns False.
    """
    target = sample[-1]
    branches = _branches(model, sample, config, negative, reuse)
    active = torch.nonzero(branches[0].batch.denoised).flatten()
    device, channels = model.device, noise.shape[-1]
    full = noise.reshape(-1, channels).to(device, torch.float32)
    if target.fixed_frames:
        assert target.latents is not None and target.grid is not None
        given = target.latents.reshape(-1, channels).to(full)
        fixed = target.fixed_tokens().to(device)[:, None]
        full = torch.where(fixed, given, full)
    moving = branches[0].batch.denoised.float()
    clock = time_grid(config.steps, config.shift)
    times_of = dict(zip(clock.tolist(), (moving * t for t in clock.to(device)), strict=True))

    def velocity(state: Tensor, t: float) -> Tensor:
        latents = full.index_copy(0, active, state).to(model.dtype)
        run = branches if guided_now(config, t) else branches[:1]
        found = [branch.velocity(latents, times_of[t]) for branch in run]
        if len(found) > 1 and config.released_cached_sampler:
            return guide(found[0], found[1], config, *found[2:])[active]
        found = [v[active] for v in found]
        return found[0] if len(found) == 1 else guide(found[0], found[1], config, *found[2:])

    for number, state in enumerate(euler(velocity, full[active], clock), start=1):
        latents = full.index_copy(0, active, state).view(noise.shape)
        if on_step is not None and on_step(Step(number, config.steps, latents)) is False:
            raise Cancelled(f"stopped after step {number} of {config.steps}")
    return latents


def _branches(
    model: Lance, sample: Sample, config: SamplingConfig, negative: Sample | None, reuse: Context | None
) -> list[Branch]:
    """The conditional branch and, where guidance can act, what it moves away from.

    They share the context that they have in common.
    """
    cond = Branch(model, sample, reuse=reuse)
    if config.guidance == 1.0 and config.visual_guidance is None:
        return [cond]
    kept = [i for i, segment in enumerate(sample) if segment.role is not Role.USER]
    uncond = [sample[i] for i in kept] if negative is None else negative
    positions = None
    if config.released_cached_sampler and negative is None:
        placed = mape_positions(sample, model.config.mape)
        positions = [placed[i] for i in kept]
    branches = [cond, Branch(model, uncond, positions, cond.context)]
    if config.visual_guidance is not None:
        neither = [s for s in uncond if s.role not in (Role.USER, Role.SOURCE, Role.REFERENCE)]
        branches.append(Branch(model, neither, reuse=cond.context))
    return branches


@torch.inference_mode()
def speak(
    model: Lance,
    sample: Sample,
    config: TextConfig,
    *,
    allowed: int,
    stop: Collection[int],
    generator: torch.Generator | None = None,
    reuse: Context | None = None,
) -> Iterator[int]:
    """Continue a sample that ends in an open assistant turn; yields token ids, a stopping one included.

    allowed: ids at or above are never drawn (the vocabulary is padded). stop: ids that end the answer.
    """
    context = encode(model, sample, reuse=reuse)
    assert context.last_hidden is not None
    hidden, cache = context.last_hidden, context.cache.frozen(room=config.max_tokens)
    position = int(context.positions[-1].max()) + 1
    spoken: list[int] = []
    while True:
        logits = model.head(hidden)[:allowed].float()
        spoken.append(_choose(logits, spoken, config, generator))
        yield spoken[-1]
        if spoken[-1] in stop or len(spoken) == config.max_tokens:
            return
        word = Segment(Kind.TEXT, Role.ANSWER, torch.tensor(spoken[-1:]))
        batch = pack([[word]], model.config, positions=[[torch.full((3, 1), position)]], dense=False)
        hidden = model(batch.to(model.device, model.dtype), cache, pattern=CausalTail()).hidden[-1]
        cache.keep(1)
        position += 1


def _choose(logits: Tensor, spoken: list[int], config: TextConfig, generator: torch.Generator | None) -> int:
    """One id from logits [allowed]: repetition penalty, then greedy, or temperature, top-k and top-p."""
    if config.repetition_penalty != 1.0 and spoken:
        seen = torch.tensor(sorted(set(spoken)), device=logits.device)
        value = logits[seen]
        factor = config.repetition_penalty
        logits = logits.index_copy(0, seen, torch.where(value > 0, value / factor, value * factor))
    if config.temperature == 0:
        return int(logits.argmax())
    probability, order = (logits / config.temperature).softmax(-1).sort(descending=True)
    if config.top_k:
        probability[config.top_k :] = 0
    before = probability.cumsum(-1) - probability
    probability[before >= config.top_p] = 0
    drawn = torch.multinomial(probability.cpu(), 1, generator=generator)
    return int(order[int(drawn)])
