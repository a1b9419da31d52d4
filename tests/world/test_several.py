"""Questions of several pictures: the answers follow from the scenes alone."""

from collections import Counter

import numpy as np
import pytest

from openlance.errors import InputError
from openlance.world import (
    SEVERAL_KINDS,
    Scene,
    Thing,
    WorldConfig,
    is_held_out,
    look,
    question_of_several,
    render,
    sample_several,
)

STAR = Thing("star", "red", "small", "left")
RING = Thing("ring", "blue", "small", "right")
ONE, TWO, OTHER = (
    Scene("white", things=(STAR,)),
    Scene("white", things=(STAR, RING)),
    Scene("navy", things=(RING,)),
)


def asked(scenes, kind, times=60):
    rng = np.random.default_rng(0)
    found = (question_of_several(scenes, rng, (kind,)) for _ in range(times))
    return {(qa.question, qa.answer) for qa in found}


def test_which_picture_has_it():
    assert asked((ONE, OTHER), "which") == {
        ("which picture has a star?", "first"),
        ("which picture has a red shape?", "first"),
        ("which picture has a red star?", "first"),
        ("which picture has a white ground?", "first"),
        ("which picture has a ring?", "second"),
        ("which picture has a blue shape?", "second"),
        ("which picture has a blue ring?", "second"),
        ("which picture has a navy ground?", "second"),
    }
    assert asked((ONE, TWO), "which") == {
        ("which picture has a ring?", "second"),
        ("which picture has a blue shape?", "second"),
        ("which picture has a blue ring?", "second"),
    }


def test_what_is_the_same():
    assert asked((ONE, OTHER), "same") == {
        ("is the ground the same in all pictures?", "no"),
        ("is the number of shapes the same in all pictures?", "yes"),
        ("is the shape the same in all pictures?", "no"),
        ("is the color of the shape the same in all pictures?", "no"),
        ("is the size of the shape the same in all pictures?", "yes"),
    }
    assert asked((ONE, TWO, OTHER), "same") == {
        ("is the ground the same in all pictures?", "no"),
        ("is the number of shapes the same in all pictures?", "no"),
    }


def test_counts_over_pictures():
    assert asked((ONE, TWO, OTHER), "most") == {("which picture has the most shapes?", "second")}
    assert asked((TWO, ONE), "most") == {
        ("which picture has the most shapes?", "first"),
        ("which picture has the fewest shapes?", "second"),
    }
    assert asked((ONE, TWO, OTHER), "total") == {("how many shapes are there in all pictures?", "four")}


def test_the_judge_finds_the_picture_that_is_named():
    rng = np.random.default_rng(0)
    for _ in range(10):
        scenes = sample_several(rng, WorldConfig(max_things=1), 2)
        seen = [look(render(scene)) for scene in scenes]
        try:
            qa = question_of_several(scenes, rng, ("which",))
        except InputError:
            assert len({(s.things[0].shape, s.things[0].color, s.ground) for s in seen}) == 1
            continue
        words = qa.question.rstrip("?").split()
        facts = [{s.things[0].shape, s.things[0].color, s.ground, "shape", "ground"} for s in seen]
        has = [set(words[4:]) <= fact for fact in facts]
        assert has == [qa.answer == "first", qa.answer == "second"], qa


def test_sampled_scenes_are_as_often_the_same_as_not():
    rng = np.random.default_rng(0)
    drawn = [sample_several(rng, WorldConfig(), 2) for _ in range(300)]
    assert not any(is_held_out(scene) for scenes in drawn for scene in scenes)
    answers = Counter(question_of_several(scenes, rng, ("same",)).answer for scenes in drawn)
    assert 0.4 < answers["yes"] / 300 < 0.6
    assert {question_of_several(scenes, rng).kind for scenes in drawn} == set(SEVERAL_KINDS)


def test_what_cannot_be_asked_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="two to four"):
        question_of_several((ONE,), rng)
    with pytest.raises(InputError, match="unknown kind of question of several pictures 'weight'"):
        question_of_several((ONE, TWO), rng, ("weight",))
    with pytest.raises(InputError, match="no question of the kinds which"):
        question_of_several((ONE, ONE), rng, ("which",))
