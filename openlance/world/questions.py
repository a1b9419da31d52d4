"""Questions about a scene, with their exact answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from openlance.errors import InputError
from openlance.world.language import GROUND_NOUNS, NUMBERS, at_place, caption, refer, with_article
from openlance.world.scene import (
    COLORS,
    HELD_OUT,
    PLACES,
    SHAPES,
    WORDS,
    Scene,
    Thing,
    cell,
    is_held_out,
    known,
    pick,
)

MOTION_ANSWERS = {
    "still": "stays still", "left": "moves left", "right": "moves right", "up": "moves up",
    "down": "moves down", "grow": "grows", "shrink": "shrinks",
}  # fmt: skip


@dataclass(frozen=True)
class QA:
    """A question, its only right answer (a few words, lower case), its kind."""

    question: str
    answer: str
    kind: str


Rng = np.random.Generator
Asked = tuple[str, str] | None  # (question, answer); None where the scene does not allow the kind


def stays(thing: Thing) -> bool:
    """Whether the thing has one place for the whole clip."""
    return thing.motion in ("still", "grow", "shrink")


def ask_color(scene: Scene, rng: Rng) -> Asked:
    shapes = [thing.shape for thing in scene.things]
    options = [(f"the {t.shape}", t.color) for t in scene.things if shapes.count(t.shape) == 1]
    options += [(f"the shape {at_place(t.place, rng)}", t.color) for t in scene.things if stays(t)]
    if not options:
        return None
    what, answer = pick(rng, options)
    return f"what color is {what}?", answer


def ask_shape(scene: Scene, rng: Rng) -> Asked:
    colors = [thing.color for thing in scene.things]
    options = [(f"is {t.color}", t.shape) for t in scene.things if colors.count(t.color) == 1]
    options += [(f"is {at_place(t.place, rng)}", t.shape) for t in scene.things if stays(t)]
    if not options:
        return None
    what, answer = pick(rng, options)
    return f"what shape {what}?", answer


def ask_size(scene: Scene, rng: Rng) -> Asked:
    options = [thing for thing in scene.things if thing.motion not in ("grow", "shrink")]
    if not options:
        return None
    thing = pick(rng, options)
    what = refer(thing, scene, rng)
    return pick(rng, (f"what size is {what}?", f"is {what} small or large?")), thing.size


def ask_place(scene: Scene, rng: Rng) -> Asked:
    options = [thing for thing in scene.things if stays(thing)]
    if not options:
        return None
    thing = pick(rng, options)
    return f"where is {refer(thing, scene, rng)}?", thing.place


def ask_count(scene: Scene, rng: Rng) -> Asked:
    things = scene.things
    which = rng.random()
    if which < 0.5:
        return "how many shapes are there?", NUMBERS[len(things)]
    if which < 0.75:
        shape = pick(rng, [thing.shape for thing in things] + [pick(rng, SHAPES)])
        plural = shape + ("es" if shape == "cross" else "s")
        return f"how many {plural} are there?", NUMBERS[sum(thing.shape == shape for thing in things)]
    color = pick(rng, [thing.color for thing in things] + [pick(rng, list(COLORS))])
    return f"how many {color} shapes are there?", NUMBERS[sum(thing.color == color for thing in things)]


def ask_relation(scene: Scene, rng: Rng) -> Asked:
    options = []
    for a in filter(stays, scene.things):
        for b in filter(stays, scene.things):
            (ax, ay), (bx, by) = cell(a.place), cell(b.place)
            if ax != bx:
                options.append((a, b, "left or right of", "left" if ax < bx else "right"))
            if ay != by:
                options.append((a, b, "above or below", "above" if ay < by else "below"))
    if not options:
        return None
    a, b, words, answer = pick(rng, options)
    return f"is {refer(a, scene, rng)} {words} {refer(b, scene, rng)}?", answer


def ask_exists(scene: Scene, rng: Rng) -> Asked:
    """Yes and no are equally likely; a "no" never speaks of a held-out pair in a scene for training."""
    yes, form = rng.random() < 0.5, rng.integers(3)
    pairs = {(thing.shape, thing.color) for thing in scene.things}
    if form == 0:
        shapes = {shape for shape, _ in pairs}
        options = sorted(shapes) if yes else [shape for shape in SHAPES if shape not in shapes]
        words = [with_article(shape) for shape in options]
    elif form == 1 and all(map(stays, scene.things)):
        places = {thing.place for thing in scene.things}
        options = sorted(places) if yes else [place for place in PLACES if place not in places]
        words = [f"a shape {at_place(place, rng)}" for place in options]
    elif yes:
        words = [with_article(f"{color} {shape}") for shape, color in sorted(pairs)]
    else:  # one of the two words is true of some thing, so that both have to be looked at
        avoid = pairs if is_held_out(scene) else pairs | HELD_OUT
        near = [
            (shape, color)
            for shape in SHAPES
            for color in COLORS
            if (shape, color) not in avoid and any(shape == s or color == c for s, c in pairs)
        ]
        words = [with_article(f"{color} {shape}") for shape, color in near]
    return (f"is there {pick(rng, words)}?", "yes" if yes else "no") if words else None


def ask_ground(scene: Scene, rng: Rng) -> Asked:
    return f"what color is the {pick(rng, GROUND_NOUNS)}?", scene.ground


def ask_text(scene: Scene, rng: Rng) -> Asked:
    if not scene.text:
        return None
    return pick(rng, ("what does the text say?", "which word is written?")), scene.text.word.lower()


def ask_motion(scene: Scene, rng: Rng) -> Asked:
    if all(thing.motion == "still" for thing in scene.things):
        return None
    thing = pick(rng, scene.things)
    return f"what does {refer(thing, scene, rng)} do?", MOTION_ANSWERS[thing.motion]


def ask_order(scene: Scene, rng: Rng) -> Asked:
    """What comes first in a clip: one thing has done its motion when the other begins."""
    early = [thing for thing in scene.things if thing.when == "early"]
    late = [thing for thing in scene.things if thing.when == "late"]
    if not early or not late:
        return None
    first, other = (refer(pick(rng, things), scene, rng) for things in (early, late))
    a, b = (first, other) if rng.random() < 0.5 else (other, first)
    return f"which starts first, {a} or {b}?", first.removeprefix("the ")


def ask_row(scene: Scene, rng: Rng) -> Asked:
    """Every shape by name, in the order in which they stand."""
    options = []
    for axis, words in ((0, "from left to right"), (1, "from top to bottom")):
        at = {cell(thing.place)[axis]: thing.shape for thing in scene.things}
        if len(at) == len(scene.things) > 1 and all(map(stays, scene.things)):
            options.append((words, ", ".join(at[index] for index in sorted(at))))
    if not options:
        return None
    words, answer = pick(rng, options)
    return f"name the shapes {words}", answer


def ask_lettering(scene: Scene, rng: Rng) -> Asked:
    """What the written word looks like, where it stands, or whether it is this one."""
    text = scene.text
    if text is None:
        return None
    yes = rng.random() < 0.5
    word = text.word if yes else pick(rng, [word for word in WORDS if word != text.word])
    return pick(
        rng,
        (
            (f"what color is the {pick(rng, ('text', 'word'))}?", text.color),
            (f"where is the {pick(rng, ('text', 'word'))}?", text.place),
            (f'is the word "{word.lower()}" there?', "yes" if yes else "no"),
        ),
    )


ASKERS: dict[str, Callable[[Scene, Rng], Asked]] = {
    "color": ask_color, "shape": ask_shape, "size": ask_size, "place": ask_place, "count": ask_count,
    "relation": ask_relation, "exists": ask_exists, "ground": ask_ground, "text": ask_text,
    "motion": ask_motion,
}  # fmt: skip
QUESTION_KINDS = tuple(ASKERS)
# Asked only where they are named: whoever asks of QUESTION_KINDS draws the same questions as ever.
WIDE_ASKERS: dict[str, Callable[[Scene, Rng], Asked]] = {
    "order": ask_order, "row": ask_row, "lettering": ask_lettering,
}  # fmt: skip
WIDE_QUESTION_KINDS = tuple(WIDE_ASKERS)


def question(scene: Scene, rng: Rng, kinds: Sequence[str] = QUESTION_KINDS) -> QA:
    """A question of one of `kinds`, each equally likely among those that the scene allows.

    Place, size and relation are asked only of what keeps them for the whole clip. Raises InputError where the
    scene allows none of the kinds.
    """
    askers = ASKERS | WIDE_ASKERS
    for index in rng.permutation(len(kinds)):
        known("kind of question", kinds[index], askers)
        asked = askers[kinds[index]](scene, rng)
        if asked:
            return QA(*asked, kinds[index])
    raise InputError(f"the scene allows no question of the kinds {', '.join(kinds)}: {caption(scene)}")
