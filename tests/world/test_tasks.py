"""Questions and edits: answers agree with what the judge sees, edits lead where they say."""

from collections import Counter

import numpy as np
import pytest

from openlance.errors import InputError
from openlance.world import (
    EDIT_KINDS,
    MOTIONS,
    QUESTION_KINDS,
    TEXTURES,
    WORDS,
    Scene,
    Seen,
    SeenThing,
    Thing,
    WorldConfig,
    edit,
    is_held_out,
    kept,
    look,
    question,
    render,
    sample_scene,
)
from openlance.world.language import NUMBERS

FULL = WorldConfig(max_things=3, textures=TEXTURES, words=WORDS, motions=MOTIONS)
PICTURES = WorldConfig(max_things=3, textures=TEXTURES, words=WORDS)


def meant(seen: Seen, words: str) -> list[SeenThing]:
    """The seen things that a phrase fits: every shape, color or place that it names must agree."""
    words = f" {words.replace('middle', 'center')} "
    found = []
    for thing in seen.things:
        facts = {"shape": thing.shape, "color": thing.color}
        named = {
            name: [value for value in values if f" {value} " in words or f" {value}s " in words]
            for name, values in (("shape", SHAPE_WORDS), ("color", COLOR_WORDS))
        }
        place = words.split(" at the ")[-1] if " at the " in words else words.split(" on the ")[-1]
        place = "center" if " in the center " in words else place
        placed = " the " in words and any(w in words for w in (" at the ", " on the ", " in the "))
        fits = all(not values or facts[name] in values for name, values in named.items())
        if fits and (not placed or place.strip() == thing.place):
            found.append(thing)
    return found


SHAPE_WORDS = ("circle", "square", "triangle", "cross", "star", "ring")
COLOR_WORDS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")


def answer(seen: Seen, kind: str, words: str) -> str:
    """The answer that follows from what is seen, found from the words of the question alone."""
    words = words.rstrip("?")
    if kind == "ground":
        return seen.ground
    if kind == "text":
        return seen.words[0].word.lower()
    if kind == "count":
        return NUMBERS[len(meant(seen, words.replace("crosses", "cross")))]
    if kind == "exists":
        return "yes" if meant(seen, words) else "no"
    if kind == "relation":
        first, second = words.split(" or ")
        (a,), (b,) = meant(seen, first), meant(seen, second)
        axis, names = (0, ("left", "right")) if "left" in words else (1, ("above", "below"))
        return names[a.center[axis] > b.center[axis]]
    (thing,) = meant(seen, words)
    return getattr(thing, kind)


@pytest.mark.parametrize("kind", [kind for kind in QUESTION_KINDS if kind != "motion"])
def test_answers_agree_with_what_the_judge_sees(kind):
    rng = np.random.default_rng(QUESTION_KINDS.index(kind))
    asked = 0
    while asked < 12:
        scene = sample_scene(rng, PICTURES, held_out=None)
        try:
            qa = question(scene, rng, (kind,))
        except InputError:
            continue  # for example a relation where there is one thing
        assert qa.kind == kind
        assert qa.answer == answer(look(render(scene)), kind, qa.question), qa
        asked += 1


def test_questions_cover_all_kinds_and_yes_is_as_likely_as_no():
    rng = np.random.default_rng(0)
    asked = [question(sample_scene(rng, FULL), rng) for _ in range(1000)]
    assert {qa.kind for qa in asked} == set(QUESTION_KINDS)
    assert all(qa.answer == qa.answer.lower() and len(qa.answer.split()) <= 2 for qa in asked)
    scene = Scene("white", things=(Thing("star", "red", "small", "left"),))
    answers = Counter(question(scene, rng, ("exists",)).answer for _ in range(1000))
    assert 430 < answers["yes"] < 570  # 4.4 sigma


def test_motion_is_answered():
    thing = Thing("star", "red", "small", "left", motion="right")
    qa = question(Scene("white", things=(thing,)), np.random.default_rng(0), ("motion",))
    assert qa.answer == "moves right"


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_an_edit_leads_where_it_says_and_the_judge_sees_it(kind):
    rng = np.random.default_rng(EDIT_KINDS.index(kind))
    for _ in range(8):
        before = sample_scene(rng, PICTURES)
        change = edit(before, rng, (kind,))
        assert change.kind == kind and change.after != before
        assert not is_held_out(change.after)
        verdict = kept(before, change.after, render(change.after))
        assert verdict.all, change
        same = kept(before, change.after, render(before))
        assert not same.made and same.kept, change


def test_the_instruction_names_what_changes():
    rng = np.random.default_rng(0)
    scene = Scene("white", things=(Thing("star", "red", "small", "left"),))
    for _ in range(20):
        change = edit(scene, rng, ("recolor",))
        assert change.after.things[0].color in change.instruction and "star" in change.instruction
        change = edit(scene, rng, ("move",))
        assert change.instruction.endswith(f"to the {change.after.things[0].place}")
        change = edit(scene, rng, ("ground",))
        assert change.after.ground in change.instruction and change.after.things == scene.things


def test_edits_cover_all_kinds():
    rng = np.random.default_rng(0)
    assert {edit(sample_scene(rng, FULL), rng).kind for _ in range(100)} == set(EDIT_KINDS)


def test_what_cannot_be_asked_or_edited_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="allows no question of the kinds text"):
        question(Scene("white"), rng, ("text",))
    with pytest.raises(InputError, match="unknown kind of question 'weight'"):
        question(Scene("white"), rng, ("weight",))
    with pytest.raises(InputError, match="at least one thing"):
        edit(Scene("white"), rng)
    with pytest.raises(InputError, match="unknown kind of edit 'melt'"):
        edit(Scene("white", things=(Thing("star", "red", "small", "left"),)), rng, ("melt",))
