"""Groups: several targets of one prompt in one pass, and what a learner keeps of making them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from openlance.config import SamplingConfig
from openlance.errors import InputError
from openlance.flow.guidance import guide, guided_now
from openlance.flow.solver import Transition
from openlance.sequence.pack import PackedBatch, pack
from openlance.sequence.positions import mape_positions
from openlance.sequence.segment import Kind, Role, Sample, without
from openlance.train.losses import Objective
from openlance.train.parallel import Ranks, pattern_of


@dataclass(frozen=True, eq=False)
class Prompt:
    """What is to be made: the user's words, the sequence up to its target, and what the rewards need to know.

    lane: which of a step's groups this is. name: for messages.
    """

    words: str
    sample: Sample
    metadata: Mapping[str, Any] = field(default_factory=dict)
    lane: int = 0
    name: str = ""

    @property
    def samples(self) -> list[Sample]:
        return [self.sample]

    @property
    def ids(self) -> list[str]:
        return [self.name or self.words]


class PromptFeed(Protocol):
    """Where the prompts of a step come from; otherwise as `openlance.train.loop.Feed`."""

    def packs(self, step: int) -> Iterator[Prompt]:
        """The prompts of this process, in the order of their lanes."""
        ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, states: Mapping[str, Any]) -> None: ...


class Targets:
    """Members of a group behind one context, as one sequence for each guidance branch.

    members: which of the group. A noisy segment sees its context and itself alone, so the targets share the
    context's run and do not know of each other. States are [members, moving, channels] float32, of the tokens
    that are not fixed.
    """

    def __init__(
        self, objective: Objective, sample: Sample, members: range, sampling: SamplingConfig, ranks: Ranks
    ):
        self.objective, self.sampling, self.ranks = objective, sampling, ranks
        self.members, self.target = members, sample[-1]
        assert self.target.kind is Kind.NOISY, "the last segment is the target"
        if sampling.released_cached_sampler:
            raise InputError("released_cached_sampler is for comparison, not for learning")
        self.branches = [sample]
        if sampling.guidance != 1.0 or sampling.visual_guidance is not None:
            self.branches.append(without(sample, Role.USER))
        if sampling.visual_guidance is not None:
            self.branches.append(without(sample, Role.USER, Role.SOURCE, Role.REFERENCE))
        self.moving = int((~self.target.fixed_tokens()).sum())
        self._batches: dict[bool, PackedBatch] = {}

    def sampled(self, sampling: SamplingConfig) -> Targets:
        """The same members, guided in another way."""
        return Targets(self.objective, self.branches[0], self.members, sampling, self.ranks)

    @property
    def tokens(self) -> int:
        """Of the pass of all branches."""
        return self._batch(len(self.branches) > 1).tokens

    @property
    def channels(self) -> int:
        return self.objective.model.config.vae.channels

    def draw(self, generator: torch.Generator) -> Tensor:
        """Noise of the shape of a state; drawn on the CPU, so that it is the same on every device."""
        noise = torch.randn(len(self.members), self.moving, self.channels, generator=generator)
        return noise.to(self.ranks.device)

    def velocity(self, state: Tensor, t: float) -> Tensor:
        """Guided velocity of every target, [members, moving, channels]: the policy, differentiable."""
        guided = len(self.branches) > 1 and guided_now(self.sampling, t)
        batch = self._batch(guided)
        rows = batch.denoised.nonzero().flatten()
        given = state.repeat(len(self.branches) if guided else 1, 1, 1).flatten(0, 1)
        latents = batch.latents.index_copy(0, rows, given)
        found = self.objective.velocity(batch, latents, batch.times * t, pattern_of(batch, self.ranks))
        parts = found[rows].view(-1, *state.shape)
        if not guided:
            return parts[0]
        return torch.stack([guide(of[0], of[1], self.sampling, *of[2:]) for of in parts.unbind(1)])

    def latents(self, state: Tensor) -> Tensor:
        """[members, frames, rows, columns, channels]: what is fixed included."""
        batch = self._batch(False)
        rows = batch.denoised.nonzero().flatten()
        whole = batch.latents.index_copy(0, rows, state.flatten(0, 1))
        assert self.target.grid is not None
        return whole[batch.visibility.noisy[batch.und :]].view(len(self.members), *self.target.grid, -1)

    def _batch(self, guided: bool) -> PackedBatch:
        if guided not in self._batches:
            model = self.objective.model.config
            samples, positions = [], []
            for sample in self.branches if guided else self.branches[:1]:
                placed = mape_positions(sample, model.mape)
                samples.append([*sample[:-1], *[self.target] * len(self.members)])
                positions.append([*placed[:-1], *[placed[-1]] * len(self.members)])
            dense = self.ranks.device.type != "cuda"
            batch = pack(samples, model, positions=positions, dense=dense)
            self._batches[guided] = batch.to(self.ranks.device)
        return self._batches[guided]


@dataclass(frozen=True, eq=False)
class Visit:
    """A state that is learnt from, for all targets of a pass; tensors are [members, moving, channels].

    velocity: of the policy that made the targets, there. goal: what the algorithm compares with. reference:
    the velocity of the frozen policy, where a divergence from it is wanted.
    """

    targets: Targets
    step: Transition
    state: Tensor
    velocity: Tensor
    goal: Tensor
    reference: Tensor | None = None

    @property
    def members(self) -> range:
        return self.targets.members

    @property
    def tokens(self) -> int:
        return self.targets.tokens


def as_learnt(targets: Targets, state: Tensor, t: float) -> Tensor:
    """The policy's velocity without its graph, and yet to the bit what an update will compute there.

    On the CPU attention runs another way where no gradient is wanted, so one is, and is not used.
    """
    with torch.enable_grad():
        return targets.velocity(state, t).detach()
