"""Grounding: ask where a thing is, answer with a box of whole pixels.

A box is written "[left, top, right, bottom]": Qwen2.5-VL's absolute coordinates, in pixels of the picture as
the vision tower sees it, without the JSON around them, which costs a small tokenizer three times the tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from openlance.errors import InputError
from openlance.world.language import refer
from openlance.world.render import Box, Size, box
from openlance.world.scene import Scene, pick


@dataclass(frozen=True)
class Located:
    """A question about where things are, its answer in words, and the boxes that the answer spells."""

    question: str
    answer: str
    boxes: tuple[Box, ...]


def say_boxes(boxes: Sequence[Box]) -> str:
    """Boxes in words: "[12, 30, 44, 62]", several parted by commas."""
    return ", ".join(f"[{', '.join(map(str, corners))}]" for corners in boxes)


def locate(scene: Scene, rng: np.random.Generator, size: Size = 112) -> Located:
    """Where one thing is, or all of a shape or color, from left to right, in a picture of `size`.

    In a clip, where it is in the first frame. Raises InputError for a scene without things.
    """
    if not scene.things:
        raise InputError("there is nothing to locate: the scene has no things")
    thing = pick(rng, scene.things)
    meant = [thing]
    what = refer(thing, scene, rng)
    if len(scene.things) > 1 and rng.random() < 0.25:
        name = pick(rng, ("shape", "color"))
        value = getattr(thing, name)
        meant = [other for other in scene.things if getattr(other, name) == value]
        what = f"every {value}" if name == "shape" else f"every {value} shape"
    boxes = tuple(sorted(box(other, size) for other in meant))
    return Located(pick(rng, (f"locate {what}", f"draw a box around {what}")), say_boxes(boxes), boxes)
