"""Questions and edits about a scene, with their exact answers and results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from openlance.errors import InputError
from openlance.world.language import GROUND_NOUNS, NUMBERS, at_place, caption, with_article
from openlance.world.scene import (
    COLORS,
    GROUNDS,
    HELD_OUT,
    MOTIONS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    WORDS,
    Scene,
    Thing,
    WorldConfig,
    cell,
    is_clear,
    is_held_out,
    known,
    pick,
    sample_scene,
    sample_thing,
)

MOTION_ANSWERS = {
    "still": "stays still", "left": "moves left", "right": "moves right", "up": "moves up",
    "down": "moves down", "grow": "grows", "shrink": "shrinks",
}  # fmt: skip


@dataclass(frozen=True)
class QA:
    """A question, its only right answer (one or two words, lower case), its kind (of QUESTION_KINDS)."""

    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Edit:
    """An instruction, the scene that it leads to, its kind (of EDIT_KINDS)."""

    instruction: str
    after: Scene
    kind: str


Rng = np.random.Generator
Asked = tuple[str, str] | None  # (question, answer); None where the scene does not allow the kind


def stays(thing: Thing) -> bool:
    """Whether the thing has one place for the whole clip."""
    return thing.motion in ("still", "grow", "shrink")


def refer(thing: Thing, scene: Scene, rng: Rng) -> str:
    """Say "the circle" where there is one circle, else, and sometimes anyway, "the red circle"."""
    alone = sum(other.shape == thing.shape for other in scene.things) == 1
    return f"the {thing.shape}" if alone and rng.random() < 0.6 else f"the {thing.color} {thing.shape}"


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


ASKERS: dict[str, Callable[[Scene, Rng], Asked]] = {
    "color": ask_color, "shape": ask_shape, "size": ask_size, "place": ask_place, "count": ask_count,
    "relation": ask_relation, "exists": ask_exists, "ground": ask_ground, "text": ask_text,
    "motion": ask_motion,
}  # fmt: skip
QUESTION_KINDS = tuple(ASKERS)


def question(scene: Scene, rng: Rng, kinds: Sequence[str] = QUESTION_KINDS) -> QA:
    """A question of one of `kinds`, each equally likely among those that the scene allows.

    Place, size and relation are asked only of what keeps them for the whole clip. Raises InputError where the
    scene allows none of the kinds.
    """
    for index in rng.permutation(len(kinds)):
        known("kind of question", kinds[index], QUESTION_KINDS)
        asked = ASKERS[kinds[index]](scene, rng)
        if asked:
            return QA(*asked, kinds[index])
    raise InputError(f"the scene allows no question of the kinds {', '.join(kinds)}: {caption(scene)}")


def edit_recolor(scene: Scene, rng: Rng) -> tuple[str, Scene] | None:
    index = int(rng.integers(len(scene.things)))
    thing, color = scene.things[index], pick(rng, list(COLORS))
    if color == thing.color:
        return None
    what = refer(thing, scene, rng)
    words = pick(rng, (f"make {what} {color}", f"change {what} to {color}", f"paint {what} {color}"))
    return words, swap(scene, index, replace(thing, color=color))


def edit_reshape(scene: Scene, rng: Rng) -> tuple[str, Scene] | None:
    index = int(rng.integers(len(scene.things)))
    thing, shape = scene.things[index], pick(rng, SHAPES)
    if shape == thing.shape:
        return None
    what, into = refer(thing, scene, rng), with_article(shape)
    words = pick(rng, (f"turn {what} into {into}", f"change {what} into {into}", f"make {what} {into}"))
    return words, swap(scene, index, replace(thing, shape=shape))


def edit_move(scene: Scene, rng: Rng) -> tuple[str, Scene] | None:
    index = int(rng.integers(len(scene.things)))
    thing, place = scene.things[index], pick(rng, PLACES)
    if place == thing.place or thing.motion != "still":
        return None
    verb = pick(rng, ("move", "shift"))
    words = f"{verb} {refer(thing, scene, rng)} to the {place}"
    return words, swap(scene, index, replace(thing, place=place))


def edit_add(scene: Scene, rng: Rng) -> tuple[str, Scene] | None:
    if len(scene.things) == 4:
        return None
    new = sample_thing(rng)
    what = with_article(f"{new.size} {new.color} {new.shape}")
    words = f"{pick(rng, ('add', 'put', 'draw'))} {what} {at_place(new.place, rng)}"
    return words, replace(scene, things=(*scene.things, new))


def edit_remove(scene: Scene, rng: Rng) -> tuple[str, Scene] | None:
    index = int(rng.integers(len(scene.things)))
    verb = pick(rng, ("remove", "delete", "take away"))
    words = f"{verb} {refer(scene.things[index], scene, rng)}"
    return words, replace(scene, things=scene.things[:index] + scene.things[index + 1 :])


def edit_ground(scene: Scene, rng: Rng) -> tuple[str, Scene] | None:
    ground, noun = pick(rng, list(GROUNDS)), pick(rng, GROUND_NOUNS)
    if ground == scene.ground:
        return None
    words = pick(rng, (f"change the {noun} to {ground}", f"make the {noun} {ground}"))
    return words, replace(scene, ground=ground)


def swap(scene: Scene, index: int, thing: Thing) -> Scene:
    return replace(scene, things=(*scene.things[:index], thing, *scene.things[index + 1 :]))


EDITORS: dict[str, Callable[[Scene, Rng], tuple[str, Scene] | None]] = {
    "recolor": edit_recolor, "reshape": edit_reshape, "move": edit_move, "add": edit_add,
    "remove": edit_remove, "ground": edit_ground,
}  # fmt: skip
EDIT_KINDS = tuple(EDITORS)


def edit(scene: Scene, rng: Rng, kinds: Sequence[str] = EDIT_KINDS) -> Edit:
    """An edit of one of `kinds`, each equally likely. The result is clear; it shows a held-out pair only if
    the scene does. Needs at least one thing; raises InputError where no edit of the kinds is found.
    """
    for kind in kinds:
        known("kind of edit", kind, EDIT_KINDS)
    if not scene.things:
        raise InputError("an edit needs a scene with at least one thing")
    for index in rng.permutation(len(kinds)):
        for _ in range(40):  # redraw what collides, repeats or is held out
            try:
                edited = EDITORS[kinds[index]](scene, rng)
            except InputError:
                continue
            if edited and is_clear(edited[1]) and (is_held_out(scene) or not is_held_out(edited[1])):
                return Edit(*edited, kinds[index])
    raise InputError(f"the scene allows no edit of the kinds {', '.join(kinds)}: {caption(scene)}")


def vocabulary_texts() -> list[str]:
    """Captions, questions, answers and instructions with every word of the world, to train a tokenizer on."""
    rng = np.random.default_rng(0)
    moving = WorldConfig(max_things=3, textures=TEXTURES, words=WORDS, motions=MOTIONS)
    texts = [" ".join(words) for words in (SHAPES, COLORS, GROUNDS, PLACES, SIZES, NUMBERS)]
    texts += [word.lower() for word in WORDS]
    for config in (WorldConfig(), moving):
        for _ in range(400):
            scene = sample_scene(rng, config)
            asked = question(scene, rng)
            texts += [caption(scene, rng), asked.question, asked.answer, edit(scene, rng).instruction]
    return texts
