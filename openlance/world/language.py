"""Say a scene in a short, true sentence, and keep what exactly the sentence claims."""

from dataclasses import dataclass

import numpy as np

from openlance.world.scene import Scene, Text, Thing, cell, pick

NUMBERS = ("zero", "one", "two", "three", "four")
TEXTURE_WORDS = {"plain": "plain", "stripes": "striped", "checks": "checked", "dots": "dotted"}
MOTION_WORDS = {
    "left": "moving left", "right": "moving right", "up": "moving up", "down": "moving down",
    "grow": "growing", "shrink": "shrinking",
}  # fmt: skip
TIME_WORDS = {"early": "at first", "late": "at the end"}
RELATION_WORDS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below", "under"),
}
GROUND_NOUNS = ("ground", "background")

Rng = np.random.Generator | None  # None: the canonical wording, which says everything


@dataclass(frozen=True)
class ThingClaim:
    """What is said of one thing; None where nothing is said. Place and size are those of the first frame."""

    shape: str | None = None
    color: str | None = None
    size: str | None = None
    place: str | None = None
    motion: str | None = None
    when: str | None = None


@dataclass(frozen=True)
class TextClaim:
    """What is said of the written word."""

    word: str
    color: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Claims:
    """Exactly what a sentence says, and no more. `relation` "left": things[0] is left of things[1]."""

    things: tuple[ThingClaim, ...] = ()
    count: int | None = None
    relation: str | None = None
    ground: str | None = None
    texture: str | None = None
    text: TextClaim | None = None


def claims_of(scene: Scene, *, clip: bool = False) -> Claims:
    """Everything there is to say of a scene; the motions, stillness too, only where it is a clip."""
    moves = [(t.motion, said_time(t)) if clip else (None, None) for t in scene.things]
    things = tuple(
        ThingClaim(t.shape, t.color, t.size, t.place, *move)
        for t, move in zip(scene.things, moves, strict=True)
    )
    text = TextClaim(scene.text.word, scene.text.color, scene.text.place) if scene.text else None
    related = relation(*scene.things) if len(scene.things) == 2 else None
    return Claims(things, len(things), related, scene.ground, scene.texture, text)


def chance(rng: Rng, share: float) -> bool:
    """Whether to say an optional part; always in the canonical wording."""
    return rng is None or bool(rng.random() < share)


def choose(rng: Rng, options):
    """One wording; the first is the canonical one."""
    return options[0] if rng is None else pick(rng, options)


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def at_place(place: str, rng: Rng) -> str:
    if place == "center":
        return choose(rng, ("in the center", "in the middle"))
    if place in ("left", "right"):
        return choose(rng, (f"at the {place}", f"on the {place}"))
    return f"at the {place}"


def relation(a: Thing, b: Thing) -> str | None:
    """Where a clearly is, seen from b: "left", "right", "above", "below"; None on a diagonal."""
    (ax, ay), (bx, by) = cell(a.place), cell(b.place)
    dx, dy = ax - bx, ay - by
    if abs(dx) == abs(dy):
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def said_time(thing: Thing) -> str | None:
    """When the thing moves, where that is worth a word."""
    return thing.when if thing.when != "always" else None


def refer(thing: Thing, scene: Scene, rng: np.random.Generator) -> str:
    """Say "the circle" where there is one circle, else, and sometimes anyway, "the red circle"."""
    alone = sum(other.shape == thing.shape for other in scene.things) == 1
    return f"the {thing.shape}" if alone and rng.random() < 0.6 else f"the {thing.color} {thing.shape}"


def say_thing(thing: Thing, rng: Rng, *, place: bool) -> tuple[str, ThingClaim]:
    size = thing.size if chance(rng, 0.75) else None
    motion = thing.motion if thing.motion != "still" else None
    words = [with_article(" ".join(filter(None, (size, thing.color, thing.shape))))]
    if place:
        words.append(at_place(thing.place, rng))
    if motion:
        words.append(MOTION_WORDS[motion])
    when = said_time(thing)
    if when:
        words.append(TIME_WORDS[when])
    claim = ThingClaim(thing.shape, thing.color, size, thing.place if place else None, motion, when)
    return " ".join(words), claim


def say_things(scene: Scene, rng: Rng) -> tuple[list[str], tuple[ThingClaim, ...], str | None]:
    """(phrases, claims, relation): a relation between two still things stands in for both places."""
    things = list(scene.things)
    if rng is not None:
        rng.shuffle(things)
    related = relation(*things) if len(things) == 2 and all(t.motion == "still" for t in things) else None
    if rng is None or not chance(rng, 0.5):
        related = None
    placed = not related and chance(rng, 0.9)
    said = [say_thing(thing, rng, place=placed) for thing in things]
    phrases = [phrase for phrase, _ in said]
    if related:
        phrases = [f" {choose(rng, RELATION_WORDS[related])} ".join(phrases)]
    return phrases, tuple(claim for _, claim in said), related


def say_text(text: Text, rng: Rng) -> tuple[str, TextClaim]:
    color, place = chance(rng, 0.75), chance(rng, 0.75)
    words = f'the word "{text.word.lower()}"'
    if color:
        words = choose(rng, (f"{words} in {text.color}", words.replace("word", f"{text.color} word")))
    if place:
        words = f"{words} {at_place(text.place, rng)}"
    return words, TextClaim(text.word, text.color if color else None, text.place if place else None)


def say_ground(scene: Scene, rng: Rng) -> tuple[str, str, str | None]:
    """(noun phrase, ground, texture): a texture is always said, plainness seldom."""
    texture: str | None = scene.texture
    if texture == "plain" and (rng is None or chance(rng, 0.8)):
        texture = None
    words = " ".join(filter(None, (texture and TEXTURE_WORDS[texture], scene.ground)))
    noun = choose(rng, ("", *GROUND_NOUNS))
    return (with_article(f"{words} {noun}") if noun else words), scene.ground, texture


def join(phrases: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


def describe(scene: Scene, rng: Rng = None) -> tuple[str, Claims]:
    """(sentence, what it claims): lower case, always true; without rng it says everything, in one wording."""
    phrases, things, related = say_things(scene, rng)
    text: TextClaim | None = None
    if scene.text:
        phrase, text = say_text(scene.text, rng)
        phrases.append(phrase)
    ground: str | None = None
    texture: str | None = None
    sentence = join(phrases) if phrases else "nothing"
    if chance(rng, 0.9):
        words, ground, texture = say_ground(scene, rng)
        last = f"{sentence} on {words}"
        sentence = choose(rng, (last, last, f"on {words}, {sentence}"))
    return sentence, Claims(things, len(things), related, ground, texture, text)


def caption(scene: Scene, rng: Rng = None) -> str:
    """The sentence of `describe`: "a large red circle at the top left on white"."""
    return describe(scene, rng)[0]
