"""Read boxes from an answer, and say how well they lie."""

import re
from collections.abc import Sequence

Corners = tuple[float, float, float, float]  # left, top, right, bottom

NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
BOX = re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]")


def read_boxes(words: str) -> tuple[Corners, ...]:
    """Every "[left, top, right, bottom]" in an answer, alone or inside JSON with keys of its own."""
    return tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in BOX.findall(words))


def overlap(a: Corners, b: Corners) -> float:
    """Shared area over joint area of two boxes, in [0, 1]; 0 where one of them has no area."""
    shared = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    return shared / (_area(a) + _area(b) - shared) if shared else 0.0


def well_placed(words: str, boxes: Sequence[Corners]) -> float:
    """How well an answer's boxes lie on the right ones, in [0, 1].

    Each right box takes the free box of the answer that overlaps it most; what is missing and what is too
    much count as 0, so that the best score needs as many boxes as there are.
    """
    given = list(read_boxes(words))
    most = max(len(given), len(boxes))
    total = 0.0
    for box in boxes:
        if given:
            best = max(given, key=lambda other: overlap(box, other))
            total += overlap(box, best)
            given.remove(best)
    return total / most if most else 1.0


def _area(box: Corners) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
