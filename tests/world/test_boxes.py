"""Boxes: where they lie agrees with the pixels, how they are read, and how they are scored."""

import numpy as np
import pytest

from openlance.errors import InputError
from openlance.world import (
    SHAPES,
    Scene,
    Thing,
    WorldConfig,
    box,
    locate,
    look,
    overlap,
    read_boxes,
    render,
    sample_scene,
    say_boxes,
    well_placed,
)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [112, (96, 160)])
def test_a_box_touches_the_outline(shape, size):
    """Within half a pixel of rounding, and a pointed corner that covers less than half of its last pixels."""
    thing = Thing(shape, "yellow", "large", "bottom left", (0.01, -0.01))
    rows, columns = np.nonzero(render(Scene("black", things=(thing,)), size)[..., 0] > 128)
    seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert np.abs(np.array(box(thing, size)) - seen).max() <= 1


def test_a_box_follows_a_moving_thing():
    thing = Thing("square", "red", "large", "left", motion="right")
    left, top, right, bottom = box(thing, 96)
    assert box(thing, 96, 1.0) == (left + 32, top, right + 32, bottom)


def test_the_judge_sees_the_things_where_the_answers_say():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = sample_scene(rng, WorldConfig(max_things=3), held_out=None)
        located = locate(scene, rng)
        seen = look(render(scene)).things
        for corners in located.boxes:
            assert max(overlap(corners, tuple(112 * edge for edge in thing.box)) for thing in seen) > 0.7
        assert read_boxes(located.answer) == located.boxes
        assert well_placed(located.answer, located.boxes) == 1


def test_every_thing_that_is_meant_is_located_from_left_to_right():
    star, ring = Thing("star", "red", "large", "right"), Thing("ring", "red", "small", "left")
    scene = Scene("white", things=(star, ring, Thing("star", "blue", "small", "center")))
    rng = np.random.default_rng(0)
    asked = (locate(scene, rng) for _ in range(200))
    found = {located.question.removeprefix("locate "): located for located in asked}
    assert found["every red shape"].boxes == (box(ring), box(star))
    assert found["the ring"].boxes == (box(ring),)
    assert found["the red star"].answer == say_boxes([box(star)])


def test_boxes_are_read_from_words_and_from_json():
    assert read_boxes("[1, 2, 3, 4], [5,6, 7,8]") == ((1, 2, 3, 4), (5, 6, 7, 8))
    assert read_boxes('```json\n[{"bbox_2d": [1, 2, 3.5, 4], "label": "red star"}]\n```') == ((1, 2, 3.5, 4),)
    assert read_boxes("[1, 2, 3] and 1, 2, 3, 4") == ()
    assert say_boxes([(1, 2, 3, 4), (5, 6, 7, 8)]) == "[1, 2, 3, 4], [5, 6, 7, 8]"


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1),
        ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3),
        ((0, 0, 2, 2), (2, 0, 4, 2), 0),
        ((0, 0, 4, 4), (1, 1, 3, 3), 1 / 4),
        ((2, 2, 0, 0), (0, 0, 2, 2), 0),
        ((1, 1, 1, 1), (1, 1, 1, 1), 0),
    ],
)
def test_overlap_is_known(a, b, expected):
    assert overlap(a, b) == overlap(b, a) == pytest.approx(expected)


def test_what_is_missing_or_too_much_costs():
    right = ((0, 0, 2, 2), (4, 4, 6, 6))
    assert well_placed("[4, 4, 6, 6], [0, 0, 2, 2]", right) == 1
    assert well_placed("[0, 0, 2, 2]", right) == 1 / 2
    assert well_placed("[0, 0, 2, 2], [0, 0, 2, 2]", right) == 1 / 2
    assert well_placed("[0, 0, 2, 2], [9, 9, 10, 10], [4, 4, 6, 6], [8, 8, 9, 9]", right) == 1 / 2
    assert well_placed("on the left", right) == 0


def test_an_empty_scene_has_nothing_to_locate():
    with pytest.raises(InputError, match="nothing to locate"):
        locate(Scene("white"), np.random.default_rng(0))
