"""GenEval's six kinds of prompt, said of shapes: short, and open about all that they do not say."""

from __future__ import annotations

import numpy as np

from openlance.world.language import NUMBERS, RELATION_WORDS, Claims, ThingClaim, relation, with_article
from openlance.world.scene import SHAPES, WorldConfig, sample_scene

TAGS = ("single object", "two objects", "counting", "colors", "position", "color attribution")
ONE = WorldConfig(max_things=1)
TWO = WorldConfig(max_things=2, count_weights=(0.0, 1.0, 0.0, 0.0))
Rng = np.random.Generator


def say_tag(tag: str, rng: Rng) -> tuple[str, Claims]:
    """(prompt, what it claims) of one of `TAGS`."""
    if tag == "counting":
        shape, count = SHAPES[rng.integers(len(SHAPES))], int(rng.integers(2, 5))
        plural = shape + ("es" if shape == "cross" else "s")
        return f"{NUMBERS[count]} {plural}", Claims((ThingClaim(shape),) * count, count)
    if tag in ("single object", "colors"):
        (thing,) = sample_scene(rng, ONE).things
        claim = ThingClaim(thing.shape, thing.color if tag == "colors" else None)
        return _phrase(claim), Claims((claim,))
    while True:  # two things of different shapes that stand clearly side by side
        a, b = sample_scene(rng, TWO).things
        related = relation(a, b)
        if a.shape != b.shape and related is not None:
            break
    colored = tag == "color attribution"
    first, second = (ThingClaim(thing.shape, thing.color if colored else None) for thing in (a, b))
    where = related if tag == "position" else None
    joined = RELATION_WORDS[where][0] if where else "and"
    return f"{_phrase(first)} {joined} {_phrase(second)}", Claims((first, second), relation=where)


def _phrase(claim: ThingClaim) -> str:
    return with_article(" ".join(filter(None, (claim.color, claim.shape))))
