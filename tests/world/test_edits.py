"""Edits lead where they say, and the judge sees what has changed and what has not."""

from dataclasses import replace

import numpy as np
import pytest

from openlance.errors import InputError
from openlance.world import (
    EDIT_KINDS,
    MOTIONS,
    TEXTURES,
    WIDE_EDIT_KINDS,
    WORDS,
    Scene,
    Text,
    Thing,
    WorldConfig,
    edit,
    is_held_out,
    kept,
    render,
    render_clip,
    sample_scene,
)

FULL = WorldConfig(max_things=3, textures=TEXTURES, words=WORDS, motions=MOTIONS)
PICTURES = WorldConfig(max_things=3, textures=TEXTURES, words=WORDS)


def suited(scene: Scene, kind: str) -> Scene:
    """The scene, with or without a word, as the kind of edit needs it."""
    if kind == "write":
        return replace(scene, text=None, things=scene.things[:1])
    if kind in ("rewrite", "erase") and scene.text is None:
        return replace(scene, things=(STAR,), text=Text("HI", "blue", "bottom"))
    return scene


STAR = Thing("star", "red", "small", "left")


@pytest.mark.parametrize("kind", EDIT_KINDS + WIDE_EDIT_KINDS)
def test_an_edit_leads_where_it_says_and_the_judge_sees_it(kind):
    rng = np.random.default_rng((EDIT_KINDS + WIDE_EDIT_KINDS).index(kind))
    for _ in range(8):
        before = suited(sample_scene(rng, PICTURES), kind)
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


def test_words_are_written_changed_and_erased():
    rng = np.random.default_rng(0)
    blank = Scene("white", things=(STAR,))
    written = replace(blank, text=Text("HI", "blue", "top"))
    for _ in range(10):
        change = edit(blank, rng, ("write",))
        text = change.after.text
        assert text and f'"{text.word.lower()}" in {text.color}' in change.instruction
        change = edit(written, rng, ("rewrite",))
        assert change.after.text == replace(written.text, word=change.after.text.word) != written.text
        assert f'"{change.after.text.word.lower()}"' in change.instruction
        assert edit(written, rng, ("erase",)).after == blank


def test_a_thing_is_replaced_where_it_stood():
    rng = np.random.default_rng(0)
    before = Scene("white", things=(replace(STAR, motion="right", when="early"),))
    for _ in range(10):
        change = edit(before, rng, ("replace",))
        [new] = change.after.things
        assert f"{new.size} {new.color} {new.shape}" in change.instruction and "star" in change.instruction
        assert replace(new, shape="star", color="red", size="small") == before.things[0]
        assert new.shape != "star" and new.color != "red"
    assert kept(before, change.after, render_clip(change.after, 5)).all


def test_the_texture_changes_alone():
    rng = np.random.default_rng(0)
    before = Scene("white", things=(STAR,))
    said = {edit(before, rng, ("texture",)).instruction.split()[-1] for _ in range(60)}
    assert said == {"striped", "checked", "dotted"}
    change = edit(before, rng, ("texture",))
    assert replace(change.after, texture="plain") == before


def test_what_cannot_be_edited_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="at least one thing"):
        edit(Scene("white"), rng)
    with pytest.raises(InputError, match="unknown kind of edit 'melt'"):
        edit(Scene("white", things=(STAR,)), rng, ("melt",))
    with pytest.raises(InputError, match="no edit of the kinds erase"):
        edit(Scene("white", things=(STAR,)), rng, ("erase",))
