"""Sentences: every claim is true of the scene and of its picture, and the words are few."""

import re

import numpy as np
import pytest

from openlance.world import (
    MOTIONS,
    TEXTURES,
    WORDS,
    Claims,
    Scene,
    Text,
    TextClaim,
    Thing,
    ThingClaim,
    WorldConfig,
    caption,
    check,
    claims_of,
    describe,
    render,
    render_clip,
    sample_scene,
    vocabulary_texts,
)

PICTURES = WorldConfig(max_things=3, textures=TEXTURES, words=WORDS)
CLIPS = WorldConfig(max_things=2, motions=MOTIONS)


def test_the_canonical_caption():
    circle = Thing("circle", "orange", "large", "top left")
    assert caption(Scene("white", things=(circle,))) == "a large orange circle at the top left on white"
    scene = Scene(
        "black", "stripes", (circle, Thing("star", "red", "small", "top")), Text("HI", "blue", "center")
    )
    assert caption(scene) == (
        "a large orange circle at the top left, a small red star at the top "
        'and the word "hi" in blue in the center on striped black'
    )
    assert caption(Scene("navy")) == "nothing on navy"


def test_captions_are_true_of_the_picture():
    rng = np.random.default_rng(0)
    for _ in range(40):
        scene = sample_scene(rng, PICTURES, held_out=None)
        words, claims = describe(scene, rng)
        assert check(claims, render(scene)).all, words


def test_captions_of_motion_are_true_of_the_clip():
    rng = np.random.default_rng(1)
    for _ in range(20):
        scene = sample_scene(rng, CLIPS, held_out=None)
        words, claims = describe(scene, rng)
        assert check(claims, render_clip(scene, 3)).all, words


def test_the_time_of_a_motion_is_said_where_it_is_not_all_the_clip():
    thing = Thing("circle", "red", "small", "left", motion="right", when="early")
    words = "a small red circle at the left moving right at first on white"
    assert caption(Scene("white", things=(thing,))) == words
    claim = ThingClaim("circle", "red", "small", "left", "right", "early")
    assert describe(Scene("white", things=(thing,)))[1].things == (claim,)
    assert claims_of(Scene("white", things=(thing,))).things[0].when is None


def test_claims_are_what_the_words_say():
    """Every claimed value stands in the sentence, and no size, place or ground stands there unclaimed."""
    rng = np.random.default_rng(2)
    for _ in range(300):
        scene = sample_scene(rng, PICTURES, held_out=None)
        words, claims = describe(scene, rng)
        said = words.replace("middle", "center").replace("under", "below")
        for thing in claims.things:
            assert f"{thing.color} {thing.shape}" in said
            assert thing.size is None or f"{thing.size} {thing.color} {thing.shape}" in said
        sizes = sum(thing.size is not None for thing in claims.things)
        assert len(re.findall("small|large", said)) == sizes
        assert (claims.ground is not None) == bool(re.search(rf" on .*{scene.ground}|^on ", said))
        assert (claims.relation is not None) == bool(re.search("left of|right of|above|below", said))
        assert (claims.text is not None) == ("word" in said)
        assert claims.count == len(scene.things)


def test_everything_said_of_a_scene():
    thing = Thing("cross", "red", "small", "left", motion="right")
    scene = Scene("gray", "dots", (thing,), Text("UP", "blue", "top"))
    claim = ThingClaim("cross", "red", "small", "left", "right")
    text = TextClaim("UP", "blue", "top")
    assert claims_of(scene, clip=True) == Claims((claim,), 1, None, "gray", "dots", text)
    assert claims_of(scene).things[0].motion is None


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("left", "right", "left"),
        ("top", "bottom", "above"),
        ("bottom left", "right", "left"),
        ("center", "top", "below"),
        ("top left", "bottom right", None),
    ],
)
def test_a_relation_is_claimed_only_where_it_is_clear(a, b, expected):
    scene = Scene("white", things=(Thing("star", "red", "small", a), Thing("ring", "blue", "small", b)))
    assert claims_of(scene).relation == expected


def test_a_seed_gives_the_same_words():
    scene = sample_scene(np.random.default_rng(0), PICTURES)
    first, second = (describe(scene, np.random.default_rng(5)) for _ in range(2))
    assert first == second and first[0] == caption(scene, np.random.default_rng(5))


def test_the_vocabulary_is_small_lower_case_and_complete():
    texts = vocabulary_texts()
    words = {word for text in texts for word in re.findall("[a-z]+", text)}
    assert all(text == text.lower() for text in texts)
    assert len(words) < 200
    rng = np.random.default_rng(9)
    for _ in range(100):
        assert set(re.findall("[a-z]+", caption(sample_scene(rng, PICTURES), rng))) <= words
