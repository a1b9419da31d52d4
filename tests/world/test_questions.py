"""Questions: the answers agree with what the judge sees."""

from collections import Counter

import numpy as np
import pytest

from openlance.errors import InputError
from openlance.world import (
    MOTIONS,
    QUESTION_KINDS,
    TEXTURES,
    WORDS,
    Scene,
    Seen,
    SeenThing,
    Text,
    Thing,
    WorldConfig,
    look,
    question,
    render,
    render_clip,
    sample_scene,
    watch,
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


def test_the_order_of_events_is_answered_as_the_judge_watches_it():
    rng = np.random.default_rng(0)
    config = WorldConfig(count_weights=(0, 1), motions=MOTIONS, times=("early", "late"))
    answers = set()
    while len(answers) < 4:
        scene = sample_scene(rng, config, held_out=None)
        if {thing.when for thing in scene.things} != {"early", "late"}:
            continue
        qa = question(scene, rng, ("order",))
        watched = watch(render_clip(scene, 5))
        first = watched.first.things[watched.times.index("early")]
        assert qa.answer in (first.shape, f"{first.color} {first.shape}")
        assert f"the {qa.answer}" in qa.question
        answers.add(qa.answer)


def test_shapes_are_named_in_their_order():
    things = (
        Thing("star", "red", "small", "right"),
        Thing("ring", "blue", "small", "top left"),
        Thing("cross", "blue", "large", "bottom"),
    )
    rng = np.random.default_rng(0)
    asked = {question(Scene("white", things=things), rng, ("row",)) for _ in range(20)}
    assert {(qa.question, qa.answer) for qa in asked} == {
        ("name the shapes from left to right", "ring, cross, star"),
        ("name the shapes from top to bottom", "ring, star, cross"),
    }
    with pytest.raises(InputError, match="no question of the kinds row"):
        question(Scene("white", things=things[:1]), rng, ("row",))


def test_lettering_is_asked_about_exactly():
    scene = Scene("white", text=Text("SUN", "red", "top"))
    rng = np.random.default_rng(0)
    asked = {(qa.question, qa.answer) for qa in (question(scene, rng, ("lettering",)) for _ in range(200))}
    assert ("what color is the word?", "red") in asked and ("where is the text?", "top") in asked
    right = {answer for words, answer in asked if words == 'is the word "sun" there?'}
    wrong = {answer for words, answer in asked if words.startswith("is the word") and "sun" not in words}
    assert right == {"yes"} and wrong == {"no"}


def test_what_cannot_be_asked_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="allows no question of the kinds text"):
        question(Scene("white"), rng, ("text",))
    for kind in ("order", "row", "lettering"):
        with pytest.raises(InputError, match=f"allows no question of the kinds {kind}"):
            question(Scene("white"), rng, (kind,))
    with pytest.raises(InputError, match="unknown kind of question 'weight'"):
        question(Scene("white"), rng, ("weight",))
