"""Solvers from noise (t=1) to data (t=0): the ODE dx/dt = velocity, and SDEs with the same marginals.

The SDE is that of Flow-GRPO (arXiv 2505.05470): it adds noise of level σ(t) to the path and corrects the
drift for it, so that every state has the distribution that the ODE gives it, while each step becomes a
Gaussian whose density is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
"""(state [..., C], time in (0, 1]) → velocity [..., C]."""


def euler(velocity: Velocity, noise: Tensor, times: Tensor) -> Iterator[Tensor]:
    """Yield the state [n, C] after each step along `times` [steps + 1], falling from 1 to 0.

    x ← x − v Δt. The times are read on the host once, before the first step.
    """
    grid = times.tolist()
    deltas = (times[:-1] - times[1:]).tolist()
    state = noise
    for t, delta in zip(grid[:-1], deltas, strict=True):
        state = state - velocity(state, t) * delta
        yield state


@dataclass(frozen=True)
class Transition:
    """One step from time t to t − delta: x′ = keep · x − pull · v + std · z with standard normal z.

    sigma: noise level; at 0 the step is Euler's, to the bit.
    """

    t: float
    delta: float
    sigma: float = 0.0

    @property
    def stochastic(self) -> bool:
        return self.sigma > 0

    @property
    def keep(self) -> float:
        return 1 - self.sigma**2 * self.delta / (2 * self.t)

    @property
    def pull(self) -> float:
        return (1 + self.sigma**2 * (1 - self.t) / (2 * self.t)) * self.delta

    @property
    def std(self) -> float:
        return self.sigma * math.sqrt(self.delta)

    def mean(self, state: Tensor, velocity: Tensor) -> Tensor:
        """Where the step leads without its noise, all [..., C]."""
        return state * self.keep - velocity * self.pull

    def log_probability(self, state: Tensor, velocity: Tensor, reached: Tensor) -> Tensor:
        """[batch] log-density of `reached` [batch, n, C], a mean (not a sum) over n and C.

        The gradient goes to the velocity and the state, not to `reached`. Of stochastic steps only.
        """
        error = reached.detach() - self.mean(state, velocity)
        density = -error.square() / (2 * self.std**2) - math.log(self.std) - 0.5 * math.log(2 * math.pi)
        return density.flatten(1).mean(1)

    def divergence(self, velocity: Tensor, reference: Tensor) -> Tensor:
        """[batch] KL divergence of the step with one velocity [batch, n, C] from that with another.

        Exact, since both are Gaussians of one width; a mean over n and C like the log-density.
        """
        factor = self.pull**2 / (2 * self.std**2)
        return factor * (velocity - reference).square().flatten(1).mean(1)


def transitions(times: Tensor, window: range = range(0), noise: float = 0.7) -> list[Transition]:
    """The steps along `times` [steps + 1], falling from 1 to 0; those whose number (from 0) is in `window`
    are stochastic.

    Their level is σ = noise · √(t / (1 − t)), with the end of the step in place of 1 − t where t is 1.
    """
    grid = times.tolist()
    deltas = (times[:-1] - times[1:]).tolist()
    found = []
    for number, ((t, following), delta) in enumerate(zip(pairwise(grid), deltas, strict=True)):
        rest = 1 - (following if t == 1 else t)
        found.append(Transition(t, delta, noise * math.sqrt(t / rest) if number in window else 0.0))
    return found


@dataclass(frozen=True, eq=False)
class Move:
    """A step that was taken: the state before it, the velocity there, and the state after it, [..., C]."""

    step: Transition
    before: Tensor
    velocity: Tensor
    after: Tensor


def walk(
    velocity: Velocity, start: Tensor, steps: Sequence[Transition], draw: Callable[[Tensor], Tensor]
) -> Iterator[Move]:
    """Yield each step taken from `start`.

    draw: standard normal noise like a tensor; called for stochastic steps alone.
    """
    state = start
    for step in steps:
        found = velocity(state, step.t)
        after = step.mean(state, found)
        if step.stochastic:
            after = after + step.std * draw(after)
        yield Move(step, state, found, after)
        state = after
