"""The judge: right on pictures whose scene is known, also when spoilt, and it rejects known wrong ones."""

from dataclasses import replace

import numpy as np
import pytest

from openlance.errors import InputError
from openlance.world import (
    MOTIONS,
    SHAPES,
    TEXTURES,
    WORDS,
    Claims,
    Scene,
    Text,
    TextClaim,
    Thing,
    ThingClaim,
    Verdict,
    WorldConfig,
    check,
    claims_of,
    kept,
    look,
    render,
    render_clip,
    sample_scene,
    watch,
)
from openlance.world.judge.__main__ import main, spoil

PICTURES = WorldConfig(max_things=3, textures=TEXTURES, words=WORDS)
STAR = Thing("star", "red", "large", "top left")
RING = Thing("ring", "blue", "small", "right")
SCENE = Scene("beige", "plain", (STAR, RING))


@pytest.mark.parametrize("noisy", [False, True])
def test_pictures_are_read(noisy):
    rng = np.random.default_rng(0)
    for _ in range(30):
        scene = sample_scene(rng, PICTURES, held_out=None)
        picture = spoil(render(scene), rng) if noisy else render(scene)
        assert check(claims_of(scene), picture).all, scene


@pytest.mark.parametrize("size", [64, 224, (96, 192)])
def test_other_sizes_are_read(size):
    for shape in SHAPES:
        scene = Scene("gray", things=(replace(STAR, shape=shape), RING))
        assert check(claims_of(scene), render(scene, size)).all, shape


@pytest.mark.parametrize("motion", MOTIONS)
def test_motions_are_read(motion):
    size = "large" if motion == "shrink" else "small"
    scene = Scene(
        "white", things=(Thing("cross", "green", size, "center", motion=motion), replace(STAR, size="small"))
    )
    watched = watch(spoil(render_clip(scene, 5), np.random.default_rng(0)))
    assert dict(zip([t.shape for t in watched.first.things], watched.motions, strict=True)) == {
        "cross": motion,
        "star": "still",
    }
    assert len(watched.frames) == 5


@pytest.mark.parametrize(
    ("motion", "frames"), [("left", 5), ("down", 4), ("right", 3), ("grow", 5), ("shrink", 4)]
)
def test_times_of_motions_are_read(motion, frames):
    size = "large" if motion == "shrink" else "small"
    claims = Claims((ThingClaim("cross", "green", motion=motion, when="early"),))
    for when in ("always", "early", "late"):
        cross = Thing("cross", "green", size, "center", motion=motion, when=when)
        clip = render_clip(Scene("white", things=(cross,)), frames)
        assert watch(clip).times == (when,)
        assert check(claims, clip) == Verdict(shape=True, color=True, motion=True, when=when == "early")


def test_what_is_seen_is_measured():
    seen = look(render(SCENE))
    ring = next(thing for thing in seen.things if thing.shape == "ring")
    assert ring.center == pytest.approx((5 / 6, 1 / 2), abs=0.006)  # half a pixel of 112 is 0.0045
    assert ring.radius == pytest.approx(0.092, abs=0.006)
    assert 0.5 < ring.confidence <= 1


WRONG = {
    "color": replace(SCENE, things=(replace(STAR, color="pink"), RING)),
    "shape": replace(SCENE, things=(STAR, replace(RING, shape="circle"))),
    "size": replace(SCENE, things=(replace(STAR, size="small"), RING)),
    "place": replace(SCENE, things=(replace(STAR, place="top"), RING)),
    "count": replace(SCENE, things=(STAR, RING, Thing("cross", "green", "small", "bottom"))),
    "ground": replace(SCENE, ground="white"),
    "texture": replace(SCENE, texture="checks"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_one_wrong_attribute_fails_its_field_alone(wrong):
    verdict = check(claims_of(SCENE), render(WRONG[wrong]))
    assert not verdict.all
    assert [name for name, true in verdict.claimed.items() if not true] == [wrong]


def test_swapped_colors_and_a_missing_thing_are_wrong():
    swapped = replace(SCENE, things=(replace(STAR, color="blue"), replace(RING, color="red")))
    verdict = check(claims_of(SCENE), render(swapped))
    assert verdict.color is False or verdict.shape is False
    verdict = check(claims_of(SCENE), render(replace(SCENE, things=(STAR,))))
    assert verdict.count is False and verdict.place is False


def test_relation_text_and_motion_can_be_wrong():
    pair = (ThingClaim("star", "red"), ThingClaim("ring", "blue"))
    assert check(Claims(pair, relation="left"), render(SCENE)).relation is True
    assert check(Claims(pair, relation="right"), render(SCENE)).relation is False
    written = render(Scene("navy", text=Text("SUN", "yellow", "center")))
    for claim, true in (
        (TextClaim("SUN"), True),
        (TextClaim("SUN", "yellow", "center"), True),
        (TextClaim("SON"), False),
        (TextClaim("SUN", "red"), False),
        (TextClaim("SUN", None, "top"), False),
    ):
        assert check(Claims(text=claim), written).text is true
    assert check(Claims(count=0), written).count is False  # a word nobody claimed
    moving = Scene("white", things=(replace(RING, motion="left"),))
    backwards = render_clip(moving, 3)[::-1]
    claims = Claims((ThingClaim("ring", "blue", motion="left"),))
    assert check(claims, render_clip(moving, 3)).motion is True
    assert check(claims, backwards).motion is False


def test_only_what_was_said_is_judged():
    verdict = check(Claims((ThingClaim("star", "red"),)), render(SCENE))
    assert verdict == Verdict(shape=True, color=True)
    assert verdict.claimed == {"shape": True, "color": True} and verdict["place"] is None


def test_a_shapeless_smear_is_no_shape():
    """An ellipse, a triangle on its head and a half disc may not pass for a shape."""
    y, x = np.mgrid[:112, :112] - 55.5
    ellipse = (x / 16) ** 2 + (y / 9) ** 2 < 1
    on_its_head = (np.abs(x) < 0.6 * (17 - y)) & (y > -14)
    half = (np.hypot(x, y) < 17) & (x > 0)
    for inside in (ellipse, on_its_head, half):
        picture = np.full((112, 112, 3), 250, np.uint8)
        picture[inside] = (214, 32, 40)
        assert [thing.shape for thing in look(picture).things] == ["unknown"]
    noise = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    assert not check(claims_of(SCENE), noise).all
    assert look(np.full((112, 112, 3), 250, np.uint8)).things == ()


def test_strange_colors_are_unknown():
    picture = render(SCENE)
    picture[40:72, 40:72] = (255, 255, 255)
    picture[45:67, 45:67] = (90, 255, 120)
    assert any(thing.color == "unknown" for thing in look(picture).things)
    assert look(np.full((64, 64, 3), (0, 255, 0), np.uint8)).ground == "unknown"


def test_an_edit_must_be_made_and_keep_the_rest():
    recolored = replace(SCENE, things=(replace(STAR, color="green"), RING))
    assert kept(SCENE, recolored, render(recolored)).all
    spoilt = replace(recolored, things=(recolored.things[0], replace(RING, place="bottom")))
    verdict = kept(SCENE, recolored, render(spoilt))
    assert verdict.made and not verdict.kept and not verdict.all
    removed = replace(SCENE, things=(RING,))
    verdict = kept(SCENE, removed, render(SCENE))
    assert not verdict.made and verdict.kept
    verdict = kept(SCENE, replace(SCENE, ground="navy"), render(replace(removed, ground="navy")))
    assert verdict.made and not verdict.kept


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: look(render(SCENE).astype(np.float32)), "dtype uint8"),
        (lambda: look(render(SCENE)[..., 0]), "shape \\[height, width, 3\\]"),
        (lambda: look(render(SCENE)[..., :2]), "3 channels"),
        (lambda: watch(render(SCENE)), "\\[frames, height, width, 3\\]"),
        (lambda: watch(render_clip(SCENE, 1)), "two frames"),
        (lambda: check(Claims((ThingClaim(motion="left"),)), render(SCENE)), "give the judge a clip"),
    ],
)
def test_what_cannot_be_judged_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_the_measurement_prints_a_table(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["judge", "--scenes", "2"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert "pictures, clean" in lines[1] and "clips, noisy" in lines[1]
    assert any(line.startswith("rejects") for line in lines)
