"""Rewards by the names that the command line knows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from openlance.errors import InputError
from openlance.rl.rewards import simple
from openlance.rl.rewards.base import Reward, Rewards

CLIP = "clip:"
JUDGE = {
    "composition": simple.composition,
    "everything": simple.everything,
    "edited": simple.edited,
    "motion": simple.motion,
    "exact_match": simple.exact_match,
}
NAMES = (*JUDGE, "ocr", CLIP + "MODEL", "http://…")


def named_reward(name: str) -> Reward:
    """A reward by name, see `NAMES`. Raises InputError for an unknown one, or one that is not installed."""
    if name in JUDGE:
        return JUDGE[name]
    if name == "ocr":
        from openlance.rl.rewards.ocr import OCR

        return OCR()
    if name.startswith(CLIP):
        from openlance.rl.rewards.clip import CLIPScore

        return CLIPScore(name.removeprefix(CLIP))
    if name.startswith(("http://", "https://")):
        from openlance.rl.rewards.remote import Remote

        return Remote(name)
    raise InputError(f"unknown reward {name!r}: choose one of {', '.join(NAMES)}")


def parse_rewards(specs: Sequence[str]) -> Rewards:
    """Rewards of the command line, each NAME or NAME=WEIGHT."""
    functions, weights = {}, {}
    for spec in specs:
        name, equals, weight = spec.rpartition("=")
        number = _number(weight) if equals else None
        if number is None:  # no weight, or an address with a "=" of its own
            name, number = spec, 1.0
        functions[name], weights[name] = named_reward(name), number
    return Rewards(functions, weights)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
