"""GenEval's six kinds of prompt, said of shapes: short, and open about all that they do not say."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import numpy as np

from openlance.errors import InputError
from openlance.world.language import NUMBERS, RELATION_WORDS, Claims, ThingClaim, relation, with_article
from openlance.world.scene import (
    GROUNDS,
    SHAPES,
    Scene,
    WorldConfig,
    is_clear,
    is_held_out,
    pick,
    sample_scene,
    sample_thing,
)

TAGS = ("single object", "two objects", "counting", "colors", "position", "color attribution")
ONE = WorldConfig(max_things=1)
TWO = WorldConfig(max_things=2, count_weights=(0.0, 1.0, 0.0, 0.0))
Rng = np.random.Generator


def say_tag(tag: str, rng: Rng) -> tuple[str, Claims]:
    """(prompt, what it claims) of one of `TAGS`."""
    if tag == "counting":
        return _say_count(*_draw_count(rng))
    return _say_things(tag, _draw_things(tag, rng))


def show_tag(tag: str, rng: Rng) -> tuple[str, Scene]:
    """(prompt, a scene of which it is true) of one of `TAGS`: the scene decides all that is left open."""
    if tag == "counting":
        shape, count = _draw_count(rng)
        return _say_count(shape, count)[0], _alike(rng, shape, count)
    scene = _draw_things(tag, rng)
    return _say_things(tag, scene)[0], scene


def _draw_count(rng: Rng) -> tuple[str, int]:
    return SHAPES[rng.integers(len(SHAPES))], int(rng.integers(2, 5))


def _say_count(shape: str, count: int) -> tuple[str, Claims]:
    plural = shape + ("es" if shape == "cross" else "s")
    return f"{NUMBERS[count]} {plural}", Claims((ThingClaim(shape),) * count, count)


def _alike(rng: Rng, shape: str, count: int) -> Scene:
    """A scene of so many things of one shape and nothing else."""
    scene = Scene(pick(rng, list(GROUNDS)))
    while len(scene.things) < count:
        with suppress(InputError):  # the new thing stands on another: draw again
            wider = replace(scene, things=(*scene.things, replace(sample_thing(rng), shape=shape)))
            scene = wider if is_clear(wider) and not is_held_out(wider) else scene
    return scene


def _draw_things(tag: str, rng: Rng) -> Scene:
    """One thing; or two of different shapes that stand clearly side by side."""
    if tag in ("single object", "colors"):
        return sample_scene(rng, ONE)
    while True:
        scene = sample_scene(rng, TWO)
        a, b = scene.things
        if a.shape != b.shape and relation(a, b) is not None:
            return scene


def _say_things(tag: str, scene: Scene) -> tuple[str, Claims]:
    if tag in ("single object", "colors"):
        (thing,) = scene.things
        claim = ThingClaim(thing.shape, thing.color if tag == "colors" else None)
        return _phrase(claim), Claims((claim,))
    a, b = scene.things
    colored = tag == "color attribution"
    first, second = (ThingClaim(thing.shape, thing.color if colored else None) for thing in (a, b))
    where = relation(a, b) if tag == "position" else None
    joined = RELATION_WORDS[where][0] if where else "and"
    return f"{_phrase(first)} {joined} {_phrase(second)}", Claims((first, second), relation=where)


def _phrase(claim: ThingClaim) -> str:
    return with_article(" ".join(filter(None, (claim.color, claim.shape))))
