"""Rewards that need nothing but what they are given: the world's judge, and exact answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from openlance.errors import InputError
from openlance.rl.rewards.base import Media, Metadata
from openlance.world import check, kept


def composition(
    prompts: Sequence[str], media: Sequence[Media], metadata: Sequence[Metadata]
) -> Sequence[float]:
    """Share of the kinds of claim (color, place, count, …) that the judge of the world finds true.

    metadata: "claims" of `openlance.world.describe`.
    """
    found = []
    for prompt, shown, data in zip(prompts, media, metadata, strict=True):
        claimed = check(_need(data, "claims", prompt), _shown(shown)).claimed
        found.append(float(np.mean(list(claimed.values()))))
    return found


def everything(
    prompts: Sequence[str], media: Sequence[Media], metadata: Sequence[Metadata]
) -> Sequence[float]:
    """1 where all claims are true, else 0; metadata as of `composition`."""
    return [float(share == 1) for share in composition(prompts, media, metadata)]


def motion(prompts: Sequence[str], media: Sequence[Media], metadata: Sequence[Metadata]) -> Sequence[float]:
    """1 where the things of a clip move as claimed, else 0; metadata as of `composition`."""
    found = []
    for prompt, shown, data in zip(prompts, media, metadata, strict=True):
        moved = check(_need(data, "claims", prompt), _frames(shown)).motion
        if moved is None:
            raise InputError(f"the prompt {prompt!r} claims no motion")
        found.append(float(moved))
    return found


def edited(prompts: Sequence[str], media: Sequence[Media], metadata: Sequence[Metadata]) -> Sequence[float]:
    """A half for the change made, a half for everything else kept.

    metadata: "before" and "after", scenes of the world.
    """
    found = []
    for prompt, shown, data in zip(prompts, media, metadata, strict=True):
        verdict = kept(_need(data, "before", prompt), _need(data, "after", prompt), _shown(shown))
        found.append((verdict.made + verdict.kept) / 2)
    return found


def exact_match(
    prompts: Sequence[str], media: Sequence[Media], metadata: Sequence[Metadata]
) -> Sequence[float]:
    """1 where the words are the "answer" of the metadata, blanks around them and case aside."""
    found = []
    for prompt, said, data in zip(prompts, media, metadata, strict=True):
        if not isinstance(said, str):
            raise InputError(f"exact_match compares words, and {prompt!r} has a picture")
        found.append(float(said.strip().lower() == str(_need(data, "answer", prompt)).strip().lower()))
    return found


def _need(data: Metadata, name: str, prompt: str) -> Any:
    if name not in data:
        raise InputError(f"the prompt {prompt!r} has no {name!r} in its metadata")
    return data[name]


def _frames(shown: Media) -> np.ndarray:
    if isinstance(shown, str):
        raise InputError("the judge looks at pictures and clips, not words")
    return shown


def _shown(shown: Media) -> np.ndarray:
    """As the judge takes it: a clip [T, H, W, 3], a picture [H, W, 3]."""
    frames = _frames(shown)
    return frames if len(frames) > 1 else frames[0]
