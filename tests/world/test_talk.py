"""Conversations: each turn goes on from the picture before it."""

from itertools import pairwise

import numpy as np
import pytest

from openlance.errors import InputError
from openlance.world import (
    PLANS,
    Scene,
    Thing,
    WorldConfig,
    chain,
    converse,
    edit,
    is_held_out,
    kept,
    render,
    sample_scene,
)


def test_a_chain_is_edits_one_after_the_other():
    rng = np.random.default_rng(0)
    for _ in range(6):
        scenes, words = chain(rng, WorldConfig(), edits=3)
        assert (len(scenes), len(words)) == (4, 3)
        assert not any(map(is_held_out, scenes))
        for before, after in pairwise(scenes):
            assert kept(before, after, render(after)).all


def test_a_chain_of_one_edit_is_that_edit():
    rng, other = (np.random.default_rng(5) for _ in range(2))
    before = sample_scene(rng, WorldConfig())
    change = edit(before, rng)
    assert chain(other, WorldConfig(), edits=1) == ((before, change.after), (change.instruction,))


STAR, RING = Thing("star", "red", "small", "left"), Thing("ring", "blue", "small", "right")
SCENES = (Scene("white", things=(STAR,)), Scene("navy", things=(STAR,)), Scene("navy", things=(STAR, RING)))
WORDS = ("make the ground navy", "add a small blue ring at the right")


@pytest.mark.parametrize("plan", PLANS, ids="-".join)
def test_turns_follow_the_plan(plan):
    turns = converse(SCENES, WORDS, np.random.default_rng(0), plan)
    assert [turn.step for turn in turns] == [step for step in plan if step != "show"]
    assert (turns[0].shown is None) == (plan[0] == "draw")
    assert all(turn.shown is None for turn in turns[1:])
    edited = [turn for turn in turns if turn.step == "edit"]
    assert [turn.words for turn in edited] == list(WORDS[: len(edited)])
    assert [turn.reply for turn in edited] == list(SCENES[1 : 1 + len(edited)])


def test_the_question_is_about_the_edited_picture():
    rng = np.random.default_rng(0)
    for _ in range(100):
        last = converse(SCENES, WORDS, rng, ("draw", "edit", "edit", "ask"))[-1]
        if last.words == "how many shapes are there?":
            assert last.reply == "two"
            return
    raise AssertionError("never counted")


def test_a_description_is_shown_and_said():
    first = converse(SCENES, WORDS, np.random.default_rng(0), ("describe",))[0]
    assert first.shown == SCENES[0] and "red star" in first.reply


def test_a_plan_that_cannot_be_followed_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="needs 3 edits, not 2"):
        converse(SCENES, WORDS, rng, ("draw", "edit", "edit", "edit"))
    with pytest.raises(InputError, match="unknown step of a conversation 'sing'"):
        converse(SCENES, WORDS, rng, ("sing",))
