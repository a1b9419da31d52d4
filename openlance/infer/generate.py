"""Latents by denoising on top of contexts; several requests in one pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from openlance.config import SamplingConfig
from openlance.flow.guidance import guide, guided_now
from openlance.flow.multistep import SOLVERS
from openlance.flow.path import time_grid
from openlance.infer.context import Context, encode
from openlance.infer.step_cache import StepCache
from openlance.model.cache import Workspace
from openlance.model.lance import Halves, Lance, Stack, Through
from openlance.sequence.pack import pack
from openlance.sequence.positions import mape_positions
from openlance.sequence.segment import Kind, Role, Sample, Segment


class Cancelled(Exception):
    """The progress callback asked to stop."""


@dataclass(frozen=True, eq=False)
class Step:
    """One denoising step done: its number from 1, of how many, and the latents so far
    [frames, rows, columns, channels]. clean: where they lead, straight on to t = 0; of the same shape.
    order: which of the requests that were given together, from 0."""

    number: int
    total: int
    latents: Tensor
    clean: Tensor
    order: int = 0


OnStep = Callable[[Step], bool | None]
"""Called after each step; returning False cancels."""


@dataclass(frozen=True, eq=False)
class Target:
    """What is to be denoised: the last segment of a sample.

    noise: [frames, rows, columns, channels]; fixed frames are taken from the target's latents instead.
    negative: the sample that guidance moves away from; default this one without the user's words.
    """

    sample: Sample
    noise: Tensor
    negative: Sample | None = None
    reuse: Context | None = None

    @property
    def segment(self) -> Segment:
        return self.sample[-1]

    def start(self) -> Tensor:
        """[n, channels] float32: the noise, and what is given of the fixed frames."""
        noise, given = self.noise.flatten(0, 2).float(), self.segment.latents
        if not self.segment.fixed_frames:
            return noise
        assert given is not None
        return torch.where(self.segment.fixed_tokens()[:, None], given.flatten(0, 2).to(noise), noise)


@dataclass(frozen=True, eq=False)
class Branch:
    """One guidance branch of a target: its context, and where the target then stands.

    number: of the target. kind: 0 conditional, 1 what guidance moves away from, 2 that without what is shown.
    """

    number: int
    kind: int
    context: Context
    segment: Segment
    positions: Tensor


def _branches(model: Lance, number: int, target: Target, config: SamplingConfig) -> list[Branch]:
    """The conditional branch and, where guidance can act, what it moves away from.

    They share the context that they have in common.
    """

    def branch(sample: Sample, reuse: Context | None, positions: list[Tensor] | None = None) -> Branch:
        assert sample[-1].kind is Kind.NOISY, "the last segment is the target"
        placed = mape_positions(sample, model.config.mape)
        context = encode(model, sample[:-1], (positions or placed)[:-1], reuse)
        return Branch(number, len(made), context, sample[-1], placed[-1])

    sample, made = target.sample, []
    made.append(branch(sample, target.reuse))
    if config.guidance == 1.0 and config.visual_guidance is None:
        return made
    kept = [i for i, segment in enumerate(sample) if segment.role is not Role.USER]
    uncond = [sample[i] for i in kept] if target.negative is None else target.negative
    positions = None
    if config.released_cached_sampler and target.negative is None:
        placed = mape_positions(sample, model.config.mape)
        positions = [placed[i] for i in kept]
    made.append(branch(uncond, made[0].context, positions))
    if config.visual_guidance is not None:
        neither = [s for s in uncond if s.role not in (Role.USER, Role.SOURCE, Role.REFERENCE)]
        made.append(branch(neither, made[0].context))
    return made


class Pass:
    """One forward for several branches, with everything of it that no step changes.

    streams: of the workspace, one a branch. rows: [g] where the branches' latents stand in the state.
    """

    def __init__(
        self, model: Lance, space: Workspace, streams: list[int], branches: list[Branch], rows: Tensor
    ):
        positions = [[branch.positions] for branch in branches]
        targets = [[branch.segment] for branch in branches]
        batch = pack(targets, model.config, positions=positions, dense=False)
        self.model, self.branches, self.rows = model, branches, rows.to(model.device)
        self._space, self._streams, self._owner = space, streams, batch.visibility.sample
        self.cache, self.pattern = space.over(streams, self._owner)
        self.batch = batch.to(model.device, model.dtype)
        self.prepared = model.prepare(self.batch)

    def velocities(self, state: Tensor, t: float, through: Through = Stack.run) -> dict[int, list[Tensor]]:
        """For each target its branches' velocities [n, C] float32, from the state of all latents."""
        out = self.model(
            self.batch,
            self.cache,
            pattern=self.pattern,
            prepared=self.prepared,
            latents=state[self.rows].to(self.model.dtype),
            times=self.batch.times * t,
            through=through,
        )
        found: dict[int, list[Tensor]] = defaultdict(list)
        parts = out.velocity.float().split([branch.segment.inner for branch in self.branches])
        for branch, velocity in zip(self.branches, parts, strict=True):
            found[branch.number].append(velocity)
        return found

    def part(self, stack: Stack, halves: Halves, chosen: list[int]) -> tuple[Stack, Halves]:
        """The stack and the tokens of some of the branches, given by their places among them."""
        number = torch.full((len(self.branches),), -1)
        number[chosen] = torch.arange(len(chosen))
        owner = number[self._owner]
        rows = torch.nonzero(owner >= 0).flatten()
        streams = [self._streams[place] for place in chosen]
        cache, pattern = self._space.over(streams, owner[rows])
        und, gen = rows[rows < self.batch.und], rows[rows >= self.batch.und] - self.batch.und
        some = {name: halves[name][at.to(self.rows.device)] for name, at in (("und", und), ("gen", gen))}
        cos, sin = (x[rows.to(self.rows.device)] for x in stack.table)
        return replace(stack, table=(cos, sin), pattern=pattern, cache=cache), some


class Denoising:
    """Targets on their way from noise together: one forward a step for all their guidance branches.

    The state is [all latent tokens, channels] float32, target after target; `start` is the first.
    running: the targets that still take steps. reuse: what is kept between steps, where that is wanted.
    """

    def __init__(self, model: Lance, targets: Sequence[Target], config: SamplingConfig):
        self.model, self.targets, self.config = model, targets, config
        branches: list[Branch] = []
        before: Context | None = None  # requests begin alike, or differ in their noise alone
        for number, target in enumerate(targets):
            made = _branches(model, number, replace(target, reuse=target.reuse or before), config)
            branches += made
            before = made[0].context
        # Streams of one shape lie side by side: attention takes them in one call.
        self.branches = sorted(branches, key=lambda b: (b.kind, b.context.cache.length, len(b.segment)))
        caches = [branch.context.cache for branch in self.branches]
        self.space = Workspace(caches, [len(branch.segment) for branch in self.branches])
        self.start = torch.cat([target.start() for target in targets]).to(model.device)
        self.running = list(range(len(targets)))
        self.reuse = StepCache(config.reuse, config.reuse_order) if config.reuse else None
        self._rows = torch.arange(len(self.start)).split([target.segment.inner for target in targets])
        free = [torch.nonzero(~target.segment.fixed_tokens()).flatten() for target in targets]
        self._free = [moving.to(model.device) for moving in free]
        self._moving = [rows[moving].to(model.device) for rows, moving in zip(self._rows, free, strict=True)]
        self._passes: dict[bool, Pass] = {}
        self._seen = (self.start, self.start, 0.0)  # state, velocity and time of the last evaluation

    def drop(self, number: int) -> None:
        """Take no more steps for a target; the others go on."""
        self.running = [other for other in self.running if other != number]
        self._passes.clear()

    def latents(self, state: Tensor) -> list[Tensor]:
        """Of each target, [frames, rows, columns, channels]."""
        parts = state.split([target.segment.inner for target in self.targets])
        return [part.view(target.noise.shape) for part, target in zip(parts, self.targets, strict=True)]

    def clean(self) -> list[Tensor]:
        """Where the last velocity leads, straight on to t = 0; as `latents`."""
        state, velocity, t = self._seen
        return self.latents(state - velocity * t)

    def velocity(self, state: Tensor, t: float) -> Tensor:
        """Guided, of the state's shape; 0 where nothing moves."""
        velocity = torch.zeros_like(state)
        now = self._pass(guided_now(self.config, t))
        through = Stack.run if self.reuse is None else partial(self.reuse.through, now=now, t=t)
        for number, found in now.velocities(state, t, through).items():
            free = self._free[number]
            whole = len(found) > 1 and self.config.released_cached_sampler
            found = found if whole else [v[free] for v in found]
            one = found[0] if len(found) == 1 else guide(found[0], found[1], self.config, *found[2:])
            velocity.index_copy_(0, self._moving[number], one[free] if whole else one)
        self._seen = (state, velocity, t)
        return velocity

    def _chosen(self, guided: bool) -> dict[int, Branch]:
        """Of the targets that run: all their branches, or the conditional ones, by stream."""
        return {
            stream: branch
            for stream, branch in enumerate(self.branches)
            if branch.number in self.running and (guided or branch.kind == 0)
        }

    def _pass(self, guided: bool) -> Pass:
        if guided not in self._passes:
            chosen = self._chosen(guided)
            rows = torch.cat([self._rows[branch.number] for branch in chosen.values()])
            self._passes[guided] = Pass(self.model, self.space, list(chosen), list(chosen.values()), rows)
        return self._passes[guided]


@torch.inference_mode()
def denoise_together(
    model: Lance, targets: Sequence[Target], config: SamplingConfig, on_step: OnStep | None = None
) -> list[Tensor | Cancelled]:
    """Denoise several targets of any shapes and tasks, each → [frames, rows, columns, channels] float32.

    Each gives what it gives alone, up to the rounding of sums. `on_step` is called after each step for each
    target; where it returns False, that target alone is dropped, and its result is a `Cancelled`.
    """
    return walk(Denoising(model, targets, config), on_step)


def walk(work: Denoising, on_step: OnStep | None) -> list[Tensor | Cancelled]:
    """All the way from noise, as `denoise_together`."""
    config = work.config
    cancelled: dict[int, Cancelled] = {}
    states = SOLVERS[config.solver](work.velocity, work.start, time_grid(config.steps, config.shift))
    for number, state in enumerate(states, start=1):
        latents = work.latents(state)
        clean = work.clean() if number < config.steps else latents
        for index in work.running:
            step = Step(number, config.steps, latents[index], clean[index], index)
            if on_step is not None and on_step(step) is False:
                cancelled[index] = Cancelled(f"stopped after step {number} of {config.steps}")
                work.drop(index)
        if not work.running:
            break
    return [cancelled.get(index, found) for index, found in enumerate(latents)]


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
    """One target alone, see `Target`. Raises Cancelled when `on_step` returns False."""
    [found] = denoise_together(model, [Target(sample, noise, negative, reuse)], config, on_step)
    if isinstance(found, Cancelled):
        raise found
    return found
