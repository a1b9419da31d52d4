"""A judge that reads pictures and clips from their pixels and compares them with what was said.

`python -m openlance.world.judge` measures how often it is right on pictures whose scene is known.
"""

from openlance.world.judge.boxes import overlap, read_boxes, well_placed
from openlance.world.judge.sight import Seen, SeenText, SeenThing, look
from openlance.world.judge.verdict import Kept, Verdict, check, kept
from openlance.world.judge.watch import Watched, watch

__all__ = [
    "Kept",
    "Seen",
    "SeenText",
    "SeenThing",
    "Verdict",
    "Watched",
    "check",
    "kept",
    "look",
    "overlap",
    "read_boxes",
    "watch",
    "well_placed",
]
