"""Compare what is seen with what was said: claims of a sentence, or the scene that an edit should lead to."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
from scipy.optimize import linear_sum_assignment

from openlance.errors import InputError
from openlance.world.judge.sight import Seen, SeenText, SeenThing, look
from openlance.world.judge.watch import watch
from openlance.world.language import Claims, TextClaim, ThingClaim, claims_of
from openlance.world.scene import Scene

ASIDE = 0.1  # how far apart, in fractions of the picture, two things must be to stand left of or above
# Which claims decide what thing is meant; a sum of these is the cost of a match.
WEIGHTS = {"shape": 1.0, "color": 1.0, "place": 1.0, "size": 0.5, "motion": 0.25, "when": 0.25}


Moves = list[tuple[str | None, str | None]]
"""(motion, when) of each thing."""


@dataclass(frozen=True)
class Verdict:
    """For each kind of claim whether all of that kind are true; None where nothing was claimed."""

    color: bool | None = None
    shape: bool | None = None
    size: bool | None = None
    place: bool | None = None
    count: bool | None = None
    relation: bool | None = None
    ground: bool | None = None
    texture: bool | None = None
    motion: bool | None = None
    when: bool | None = None
    text: bool | None = None

    @property
    def all(self) -> bool:
        """Whether everything that was claimed is true."""
        return all(self.claimed.values())

    @property
    def claimed(self) -> dict[str, bool]:
        """The kinds that were claimed, each with whether it is true."""
        verdicts = ((field.name, self[field.name]) for field in fields(self))
        return {name: true for name, true in verdicts if true is not None}

    def __getitem__(self, name: str) -> bool | None:
        return getattr(self, name)


@dataclass(frozen=True)
class Kept:
    """An edit judged: `made`, what should change has changed; `kept`, everything else is as it was."""

    made: bool
    kept: bool

    @property
    def all(self) -> bool:
        return self.made and self.kept


@dataclass(frozen=True)
class Match:
    """A claim, the thing it is taken to mean, its motion and when it moves; None where there is no thing."""

    claim: ThingClaim
    thing: SeenThing | None
    motion: str | None
    when: str | None

    def holds(self, name: str) -> bool:
        claimed = getattr(self.claim, name)
        return claimed is None or (self.thing is not None and claimed == self.seen(name))

    def seen(self, name: str) -> str | None:
        return getattr(self if name in ("motion", "when") else self.thing, name)

    @property
    def right(self) -> bool:
        return self.thing is not None and all(map(self.holds, WEIGHTS))


def perceive(shown: np.ndarray) -> tuple[Seen, Moves]:
    """(what is seen, how each thing moves) of a clip [T, H, W, 3]; None for a picture [H, W, 3]."""
    if isinstance(shown, np.ndarray) and shown.ndim == 4:
        watched = watch(shown)
        return watched.first, list(zip(watched.motions, watched.times, strict=True))
    seen = look(shown)
    return seen, [(None, None)] * len(seen.things)


def match(claims: tuple[ThingClaim, ...], seen: Seen, moves: Moves) -> list[Match]:
    """For each claim the thing it most likely means, no thing twice: the match with the least mistakes."""
    pairs = list(zip(seen.things, moves, strict=True))
    found = [[Match(claim, thing, *move) for thing, move in pairs] for claim in claims]
    cost = np.array([[sum(w for n, w in WEIGHTS.items() if not m.holds(n)) for m in row] for row in found])
    best = linear_sum_assignment(cost.reshape(len(claims), len(seen.things)))
    meant = dict(zip(*map(np.ndarray.tolist, best), strict=True))
    return [
        found[index][meant[index]] if index in meant else Match(claim, None, None, None)
        for index, claim in enumerate(claims)
    ]


def check(claims: Claims, shown: np.ndarray) -> Verdict:
    """Whether a picture, uint8 [H, W, 3], or clip, uint8 [T, H, W, 3], shows what is claimed.

    In a clip, shape, color and motion are read from all frames, everything else from the first. A count is
    right only where no word stands that was not claimed. Raises InputError where a motion is claimed of a
    picture.
    """
    if any(thing.motion or thing.when for thing in claims.things) and np.ndim(shown) == 3:
        raise InputError("the claims speak of a motion: give the judge a clip [frames, height, width, 3]")
    seen, moves = perceive(shown)
    matches = match(claims.things, seen, moves)

    def every(name: str) -> bool | None:
        claimed = [m for m in matches if getattr(m.claim, name) is not None]
        return all(m.holds(name) for m in claimed) if claimed else None

    counted = len(seen.things) == claims.count and (claims.text is not None or not seen.words)
    return Verdict(
        **{name: every(name) for name in WEIGHTS},
        count=None if claims.count is None else counted,
        relation=None if claims.relation is None else is_related(claims.relation, *matches[:2]),
        ground=None if claims.ground is None else claims.ground == seen.ground,
        texture=None if claims.texture is None else claims.texture == seen.texture,
        text=None if claims.text is None else is_written(claims.text, seen.words),
    )


def is_related(relation: str, a: Match, b: Match) -> bool:
    if a.thing is None or b.thing is None:
        return False
    (ax, ay), (bx, by) = a.thing.center, b.thing.center
    return {"left": bx - ax, "right": ax - bx, "above": by - ay, "below": ay - by}[relation] > ASIDE


def is_written(claim: TextClaim, words: tuple[SeenText, ...]) -> bool:
    """Whether the word is the only one, and has the color and place that are claimed."""
    if len(words) != 1 or words[0].word != claim.word:
        return False
    return claim.color in (None, words[0].color) and claim.place in (None, words[0].place)


def kept(before: Scene, after: Scene, shown: np.ndarray) -> Kept:
    """Whether what is shown, a picture or a clip, is `before` edited into `after`.

    made: the things, ground, texture and text that differ are seen as in `after`, and nothing is left where a
    thing had to go. kept: all others are seen as they were, and nothing else has come.
    """
    seen, moves = perceive(shown)
    claims = claims_of(after, clip=np.ndim(shown) == 4)
    matches = match(claims.things, seen, moves)
    right = [thing for thing, m in zip(after.things, matches, strict=True) if m.right]
    matched = [m.thing for m in matches]
    left_places = {thing.place for thing in before.things if thing not in after.things}
    extra = [thing for thing in seen.things if not any(thing is other for other in matched)]
    written = not seen.words if claims.text is None else is_written(claims.text, seen.words)
    whole = (
        (before.ground == after.ground, after.ground == seen.ground),
        (before.texture == after.texture, after.texture == seen.texture),
        (before.text == after.text, written),
    )

    def true(facts: Iterable[tuple[bool, bool]], *, same: bool) -> bool:
        return all(holds for stays, holds in facts if stays == same)

    things = [(thing in before.things, thing in right) for thing in after.things]
    left = any(thing.place in left_places for thing in extra)
    come = any(thing.place not in left_places for thing in extra)
    facts = [*things, *whole]
    return Kept(made=true(facts, same=False) and not left, kept=true(facts, same=True) and not come)
