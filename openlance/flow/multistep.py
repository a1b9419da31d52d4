"""Solvers of second order in one evaluation a step: they also look at the evaluation before.

`ab2` takes the velocity to go on changing evenly in time. The others look at the guess of the data that each
evaluation gives, clean = x − t v. A step from time t to s then goes straight towards a goal,
x ← x + (t − s) / t · (goal − x); where that is the last guess, the step is Euler's. They take the guess to
move evenly in λ = ln((1 − t) / t), half the logarithm of the signal-to-noise ratio. λ is infinite at both
ends of the path, where the goal is the last guess; so where the last step is long (a high time shift), they
gain little.

Written so, what does not move (v = 0) stays to the bit. The numbers are those of diffusers' schedulers, which
are not used here: one takes no grid of times, the other none that begins at 1, and their coefficients go to
the device one by one at every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from openlance.flow.solver import Velocity, euler

Solver = Callable[[Velocity, Tensor, Tensor], Iterator[Tensor]]
"""(velocity, noise [n, C], times [steps + 1] from 1 to 0) → the state after each step."""


def ab2(velocity: Velocity, noise: Tensor, times: Tensor) -> Iterator[Tensor]:
    """Adams and Bashforth's method of two steps, of steps of any length. Yields as `euler` does."""
    state, before, last_delta = noise, None, 0.0
    for t, end in pairwise(times.tolist()):
        found, delta = velocity(state, t), t - end
        middle = found if before is None else found + (found - before) * (delta / (2 * last_delta))
        state, before, last_delta = state - middle * delta, found, delta
        yield state


def dpm_2m(velocity: Velocity, noise: Tensor, times: Tensor) -> Iterator[Tensor]:
    """DPM-Solver++ (2M), arXiv 2211.01095, algorithm 2, on the straight path. Yields as `euler` does."""
    state, last = noise, None
    for t, end in pairwise(times.tolist()):
        before, last = last, Guess.at(state, velocity(state, t), t)
        state = _step(state, _ahead(last, before, end), t, end)
        yield state


def unipc(velocity: Velocity, noise: Tensor, times: Tensor) -> Iterator[Tensor]:
    """UniPC of order 2 with B₂(h) = e^h − 1, arXiv 2302.04867. Yields as `euler` does.

    Its predictor is the step of `dpm_2m`. The evaluation where that led then corrects it, and the next step
    is taken from the corrected state; nothing corrects the last one.
    """
    state = start = noise
    before, last = None, None
    for t, end in pairwise(times.tolist()):
        found = Guess.at(state, velocity(state, t), t)
        if last is not None:
            start = _step(start, _between(found, last, before), last.t, t)
        before, last = last, found
        state = _step(start, _ahead(last, before, end), t, end)
        yield state


@dataclass(frozen=True, eq=False)
class Guess:
    """Of the data, [n, C]: where the velocity at time t leads."""

    t: float
    clean: Tensor

    @classmethod
    def at(cls, state: Tensor, velocity: Tensor, t: float) -> Guess:
        return cls(t, state - velocity * t)


def _step(state: Tensor, goal: Tensor, t: float, end: float) -> Tensor:
    """Straight towards the goal, from time t to an earlier one."""
    return torch.lerp(state, goal, (t - end) / t)


def _ahead(last: Guess, before: Guess | None, end: float) -> Tensor:
    """The goal of a step that begins at the last guess: what the guesses come to in its middle, in λ."""
    if before is None or before.t == 1 or end == 0:
        return last.clean
    reach = _apart(last.t, end) / (2 * _apart(before.t, last.t))
    return torch.lerp(before.clean, last.clean, 1 + reach)


def _between(found: Guess, last: Guess, before: Guess | None) -> Tensor:
    """The goal that a step from the last guess should have had, now that the one at its end is known.

    The weights solve the two equations of UniC-2 (section 3.2 of the paper).
    """
    if before is None:
        return torch.lerp(last.clean, found.clean, 0.5)
    h = _apart(last.t, found.t)
    whole = -math.expm1(-h)
    first = 1 / whole - 1 / h
    second = 2 * (1 / whole * 0.5 - first / h)
    r = -_apart(before.t, last.t) / h
    old = (first - second) / (1 - r)
    goal = torch.lerp(last.clean, found.clean, first - old)
    return goal + (before.clean - last.clean) * (old / r)


def _apart(t: float, end: float) -> float:
    """From one time to an earlier one in λ."""
    return _log_ratio(end) - _log_ratio(t)


def _log_ratio(t: float) -> float:
    """λ = ln((1 − t) / t), for t in (0, 1]."""
    return math.log((1 - t) / t) if t < 1 else -math.inf


SOLVERS: dict[str, Solver] = {"euler": euler, "ab2": ab2, "dpm++2m": dpm_2m, "unipc": unipc}
"""By the names of `SamplingConfig.solver`."""
