"""Edits of a scene, with their exact results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from openlance.errors import InputError
from openlance.world.language import GROUND_NOUNS, TEXTURE_WORDS, at_place, caption, refer, with_article
from openlance.world.scene import (
    COLORS,
    GROUNDS,
    PLACES,
    SHAPES,
    TEXT_PLACES,
    TEXTURES,
    WORDS,
    Scene,
    Text,
    Thing,
    is_clear,
    is_held_out,
    known,
    pick,
    sample_thing,
)


@dataclass(frozen=True)
class Edit:
    """An instruction, the scene that it leads to, its kind."""

    instruction: str
    after: Scene
    kind: str


Rng = np.random.Generator
Edited = tuple[str, Scene] | None  # (instruction, after); None where this draw changes nothing


def edit_recolor(scene: Scene, rng: Rng) -> Edited:
    index = int(rng.integers(len(scene.things)))
    thing, color = scene.things[index], pick(rng, list(COLORS))
    if color == thing.color:
        return None
    what = refer(thing, scene, rng)
    words = pick(rng, (f"make {what} {color}", f"change {what} to {color}", f"paint {what} {color}"))
    return words, swap(scene, index, replace(thing, color=color))


def edit_reshape(scene: Scene, rng: Rng) -> Edited:
    index = int(rng.integers(len(scene.things)))
    thing, shape = scene.things[index], pick(rng, SHAPES)
    if shape == thing.shape:
        return None
    what, into = refer(thing, scene, rng), with_article(shape)
    words = pick(rng, (f"turn {what} into {into}", f"change {what} into {into}", f"make {what} {into}"))
    return words, swap(scene, index, replace(thing, shape=shape))


def edit_move(scene: Scene, rng: Rng) -> Edited:
    index = int(rng.integers(len(scene.things)))
    thing, place = scene.things[index], pick(rng, PLACES)
    if place == thing.place or thing.motion != "still":
        return None
    verb = pick(rng, ("move", "shift"))
    words = f"{verb} {refer(thing, scene, rng)} to the {place}"
    return words, swap(scene, index, replace(thing, place=place))


def edit_add(scene: Scene, rng: Rng) -> Edited:
    if len(scene.things) == 4:
        return None
    new = sample_thing(rng)
    what = with_article(f"{new.size} {new.color} {new.shape}")
    words = f"{pick(rng, ('add', 'put', 'draw'))} {what} {at_place(new.place, rng)}"
    return words, replace(scene, things=(*scene.things, new))


def edit_remove(scene: Scene, rng: Rng) -> Edited:
    index = int(rng.integers(len(scene.things)))
    verb = pick(rng, ("remove", "delete", "take away"))
    words = f"{verb} {refer(scene.things[index], scene, rng)}"
    return words, replace(scene, things=scene.things[:index] + scene.things[index + 1 :])


def edit_ground(scene: Scene, rng: Rng) -> Edited:
    ground, noun = pick(rng, list(GROUNDS)), pick(rng, GROUND_NOUNS)
    if ground == scene.ground:
        return None
    words = pick(rng, (f"change the {noun} to {ground}", f"make the {noun} {ground}"))
    return words, replace(scene, ground=ground)


def edit_replace(scene: Scene, rng: Rng) -> Edited:
    """Another thing in the place of one; it moves as that one did."""
    index = int(rng.integers(len(scene.things)))
    thing, new = scene.things[index], sample_thing(rng)
    if new.shape == thing.shape or new.color == thing.color:
        return None
    what, other = refer(thing, scene, rng), with_article(f"{new.size} {new.color} {new.shape}")
    words = pick(rng, (f"replace {what} with {other}", f"put {other} in place of {what}"))
    return words, swap(scene, index, replace(thing, shape=new.shape, color=new.color, size=new.size))


def edit_write(scene: Scene, rng: Rng) -> Edited:
    if scene.text:
        return None
    text = Text(pick(rng, WORDS), pick(rng, list(COLORS)), pick(rng, TEXT_PLACES))
    what = pick(rng, (f'write "{text.word.lower()}"', f'add the word "{text.word.lower()}"'))
    return f"{what} in {text.color} {at_place(text.place, rng)}", replace(scene, text=text)


def edit_rewrite(scene: Scene, rng: Rng) -> Edited:
    word = pick(rng, WORDS)
    if scene.text is None or word == scene.text.word:
        return None
    old, new = f'"{scene.text.word.lower()}"', f'"{word.lower()}"'
    words = pick(rng, (f"change the word to {new}", f"make the text {new}", f"replace {old} with {new}"))
    return words, replace(scene, text=replace(scene.text, word=word))


def edit_erase(scene: Scene, rng: Rng) -> Edited:
    if scene.text is None:
        return None
    what = pick(rng, ("the word", "the text", f'"{scene.text.word.lower()}"'))
    return f"{pick(rng, ('remove', 'delete', 'take away'))} {what}", replace(scene, text=None)


def edit_texture(scene: Scene, rng: Rng) -> Edited:
    """The world's styles: how the ground is painted."""
    texture, noun = pick(rng, TEXTURES), pick(rng, GROUND_NOUNS)
    if texture == scene.texture:
        return None
    words = pick(rng, (f"make the {noun} {{}}", f"change the {noun} to {{}}")).format(TEXTURE_WORDS[texture])
    return words, replace(scene, texture=texture)


def swap(scene: Scene, index: int, thing: Thing) -> Scene:
    return replace(scene, things=(*scene.things[:index], thing, *scene.things[index + 1 :]))


EDITORS: dict[str, Callable[[Scene, Rng], Edited]] = {
    "recolor": edit_recolor, "reshape": edit_reshape, "move": edit_move, "add": edit_add,
    "remove": edit_remove, "ground": edit_ground,
}  # fmt: skip
EDIT_KINDS = tuple(EDITORS)
# Made only where they are named: whoever edits by EDIT_KINDS draws the same edits as ever.
WIDE_EDITORS: dict[str, Callable[[Scene, Rng], Edited]] = {
    "replace": edit_replace, "write": edit_write, "rewrite": edit_rewrite, "erase": edit_erase,
    "texture": edit_texture,
}  # fmt: skip
WIDE_EDIT_KINDS = tuple(WIDE_EDITORS)


def edit(scene: Scene, rng: Rng, kinds: Sequence[str] = EDIT_KINDS) -> Edit:
    """An edit of one of `kinds`, each equally likely. The result is clear; it shows a held-out pair only if
    the scene does. Needs at least one thing; raises InputError where no edit of the kinds is found.
    """
    editors = EDITORS | WIDE_EDITORS
    for kind in kinds:
        known("kind of edit", kind, editors)
    if not scene.things:
        raise InputError("an edit needs a scene with at least one thing")
    for index in rng.permutation(len(kinds)):
        for _ in range(40):  # redraw what collides, repeats or is held out
            try:
                edited = editors[kinds[index]](scene, rng)
            except InputError:
                continue
            if edited and is_clear(edited[1]) and (is_held_out(scene) or not is_held_out(edited[1])):
                return Edit(*edited, kinds[index])
    raise InputError(f"the scene allows no edit of the kinds {', '.join(kinds)}: {caption(scene)}")
