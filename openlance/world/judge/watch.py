"""Follow the things of a clip from frame to frame, and say how each one moves."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from openlance.errors import InputError
from openlance.world.judge.sight import UNKNOWN, Seen, SeenThing, look

# Up to the first a thing stands still or keeps its size; from the second it moves or changes.
MOVED = (0.08, 0.16)  # way, in fractions of the picture; a whole motion is 0.33
EARLY, LATE = 0.75, 0.25  # share of the way at half time: all of it, none of it, or half of it
GROWN = (1.15, 1.3)  # ratio of radii; a whole growth is 1.65
LOST = 0.45  # cost beyond which two sightings are not the same thing


@dataclass(frozen=True)
class Watched:
    """A clip as seen. `first` is the first frame, where shape and color are what most frames show of a thing.

    motions: one for each of `first.things`, "unknown" where the thing is lost or its way is unclear.
    times: likewise, when it moves: of TIMES, "always" for what stands still.
    """

    frames: tuple[Seen, ...]
    first: Seen
    motions: tuple[str, ...]
    times: tuple[str, ...]


def watch(clip: np.ndarray) -> Watched:
    """What a clip, uint8 [T, H, W, 3] of at least two frames, shows; anything else is an InputError."""
    if not isinstance(clip, np.ndarray) or clip.ndim != 4 or len(clip) < 2:
        raise InputError("the judge watches a clip of shape [frames, height, width, 3], two frames or more")
    frames = tuple(look(frame) for frame in clip)
    tracks = follow(frames)
    things = tuple(
        replace(thing, shape=most(t.shape for t in track if t), color=most(t.color for t in track if t))
        for thing, track in zip(frames[0].things, tracks, strict=True)
    )
    motions = tuple(map(see_motion, tracks))
    return Watched(frames, replace(frames[0], things=things), motions, tuple(map(see_time, tracks, motions)))


def most(values: Iterable[str]) -> str:
    return Counter(values).most_common(1)[0][0]


def follow(frames: tuple[Seen, ...]) -> list[list[SeenThing | None]]:
    """For each thing of the first frame its sighting in every frame, None where it is not found."""
    tracks: list[list[SeenThing | None]] = [[thing] for thing in frames[0].things]
    last = list(frames[0].things)
    for frame in frames[1:]:
        cost = np.array([[apart(a, b) for b in frame.things] for a in last])
        pairs = linear_sum_assignment(cost.reshape(len(last), len(frame.things)))
        other_of = dict(zip(*map(np.ndarray.tolist, pairs), strict=True))
        for index, track in enumerate(tracks):
            other = other_of.get(index)
            found = frame.things[other] if other is not None and cost[index, other] < LOST else None
            track.append(found)
            last[index] = found or last[index]
    return tracks


def apart(a: SeenThing, b: SeenThing) -> float:
    """How unlikely two sightings are one thing: their distance, and more for another color or shape."""
    way = float(np.hypot(a.center[0] - b.center[0], a.center[1] - b.center[1]))
    return way + 0.2 * (a.color != b.color) + 0.1 * (a.shape != b.shape)


def see_motion(track: list[SeenThing | None]) -> str:
    """The motion between the ends of a track: one direction, or one change of size, or neither."""
    first, last = track[0], track[-1]
    if first is None or last is None:
        return UNKNOWN
    x, y = last.center[0] - first.center[0], last.center[1] - first.center[1]
    far, near = max(abs(x), abs(y)), min(abs(x), abs(y))
    ratio = last.radius / first.radius
    change = max(ratio, 1 / ratio)
    if far < MOVED[0]:
        if change < GROWN[0]:
            return "still"
        if change > GROWN[1]:
            return "grow" if ratio > 1 else "shrink"
    elif far > MOVED[1] and near < far / 2 and change < GROWN[1]:
        if abs(x) > abs(y):
            return "right" if x > 0 else "left"
        return "down" if y > 0 else "up"
    return UNKNOWN


def see_time(track: list[SeenThing | None], motion: str) -> str:
    """When a track moves, by how much of its way it has behind it at half time."""
    if motion in ("still", UNKNOWN):
        return "always" if motion == "still" else UNKNOWN
    middle = [thing for thing in (track[(len(track) - 1) // 2], track[len(track) // 2]) if thing]
    if not middle:
        return UNKNOWN
    first, last = (_measure(thing, motion) for thing in (track[0], track[-1]) if thing)
    done = (sum(_measure(thing, motion) for thing in middle) / len(middle) - first) / (last - first)
    if done > EARLY:
        return "early"
    return "late" if done < LATE else "always"


def _measure(thing: SeenThing, motion: str) -> float:
    """What changes in a motion."""
    if motion in ("grow", "shrink"):
        return thing.radius
    return thing.center[0 if motion in ("left", "right") else 1]
