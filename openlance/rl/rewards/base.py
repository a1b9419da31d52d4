"""What a reward is, and several of them as one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from openlance.data.frames import Frames
from openlance.errors import InputError

Media = Frames | str
"""What was made: frames uint8 [T, H, W, 3] (of a picture T is 1), or words."""

Metadata = Mapping[str, Any]

Reward = Callable[[Sequence[str], Sequence[Media], Sequence[Metadata]], Sequence[float]]
"""(prompts, media, metadata), equally many of each → a number in [0, 1] for each."""


class RewardError(InputError):
    """A reward failed, or gave what is no reward; the message names it. Never taken for 0."""


@dataclass(frozen=True, eq=False)
class Rewards:
    """Several rewards by name, and the weight of each in their mean (default 1)."""

    functions: Mapping[str, Reward]
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.functions:
            raise InputError("no reward: give at least one")
        strange = sorted(set(self.weights) - set(self.functions))
        if strange:
            raise InputError(f"a weight for {', '.join(strange)}, which is no reward here")
        for name, weight in self.weights.items():
            if not (math.isfinite(weight) and weight > 0):
                raise InputError(f"the weight of the reward {name} must be above 0, not {weight}")

    def __call__(
        self, prompts: Sequence[str], media: Sequence[Media], metadata: Sequence[Metadata]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(weighted mean [n], each reward [n] by name), float64.

        Raises RewardError for one that raises, gives another count, a NaN or a number outside [0, 1].
        """
        each = {
            name: _checked(name, function, prompts, media, metadata)
            for name, function in self.functions.items()
        }
        weights = {name: self.weights.get(name, 1.0) for name in each}
        total = sum(weight * each[name] for name, weight in weights.items())
        return np.asarray(total) / sum(weights.values()), each


def _checked(
    name: str,
    function: Reward,
    prompts: Sequence[str],
    media: Sequence[Media],
    metadata: Sequence[Metadata],
) -> np.ndarray:
    try:
        found = np.asarray(function(prompts, media, metadata), dtype=np.float64)
    except Exception as error:  # whatever a user's function raises; it goes on, under the reward's name
        raise RewardError(f"the reward {name} failed: {type(error).__name__}: {error}") from error
    if found.shape != (len(prompts),):
        raise RewardError(
            f"the reward {name} must give one number for each of {len(prompts)}, not shape {found.shape}"
        )
    wrong = np.flatnonzero(~((found >= 0) & (found <= 1)))  # NaN included
    if len(wrong):
        first = int(wrong[0])
        raise RewardError(
            f"the reward {name} gave {found[first]} for {prompts[first]!r}: it must lie in [0, 1]"
        )
    return found
