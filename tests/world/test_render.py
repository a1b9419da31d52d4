"""Pictures: sizes, edges and motion, measured on the pixels."""

import numpy as np
import pytest

from openlance.errors import InputError
from openlance.world import COLORS, GROUNDS, MOTIONS, SHAPES, Scene, Text, Thing, render, render_clip
from openlance.world.scene import possible_motions


@pytest.mark.parametrize("size", [112, 48, (64, 160), (160, 64)])
def test_a_picture_has_the_asked_size(size):
    height, width = (size, size) if isinstance(size, int) else size
    picture = render(Scene("navy", "dots", (Thing("star", "pink", "large", "top"),)), size)
    assert picture.shape == (height, width, 3) and picture.dtype == np.uint8


@pytest.mark.parametrize("size", [(64, 160), 112, 224])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_fills_its_cell_and_no_more(shape, size):
    picture = render(Scene("black", things=(Thing(shape, "yellow", "large", "bottom right"),)), size)
    rows, columns = np.nonzero(picture[..., 0] > 60)
    height, width = picture.shape[:2]
    assert rows.min() >= height * 2 // 3 and columns.min() >= width * 2 // 3
    assert max(np.ptp(rows), np.ptp(columns)) > 0.25 * min(height, width)


def test_edges_are_smooth_and_the_inside_is_the_color():
    picture = render(Scene("black", things=(Thing("circle", "red", "large", "center"),))).astype(int)
    assert tuple(picture[56, 56]) == COLORS["red"]
    assert tuple(picture[0, 0]) == GROUNDS["black"]
    between = (picture[..., 0] > 30) & (picture[..., 0] < 190)
    assert 60 < between.sum() < 200  # about one pixel along an outline of 2 pi 17 = 107


def test_an_offset_moves_by_parts_of_a_pixel():
    """The centre of mass follows an offset of a tenth of a pixel; antialiasing carries it."""

    def middle(offset: float) -> float:
        thing = Thing("square", "red", "large", "center", (offset / 112, 0.0))
        ink = render(Scene("black", things=(thing,)))[..., 0].astype(float) - GROUNDS["black"][0]
        return float((ink.sum(axis=0) * np.arange(112)).sum() / ink.sum())

    assert middle(0.4) - middle(0.3) == pytest.approx(0.1, abs=0.02)  # colors are whole levels


def test_rendering_leaves_the_cached_ground_alone():
    empty = render(Scene("gray", "checks"))
    render(Scene("gray", "checks", (Thing("star", "red", "large", "center"),)))[:] = 0
    assert np.array_equal(render(Scene("gray", "checks")), empty)


def test_a_clip_begins_and_ends_with_its_pictures():
    scene = Scene("white", things=(Thing("ring", "blue", "small", "left", motion="right"),))
    clip = render_clip(scene, 5, 64)
    assert clip.shape == (5, 64, 64, 3)
    assert np.array_equal(clip[0], render(scene, 64)) and np.array_equal(clip[-1], render(scene, 64, 1.0))
    assert np.array_equal(
        clip[-1], render(Scene("white", things=(Thing("ring", "blue", "small", "center"),)), 64)
    )


def test_a_motion_early_or_late_takes_half_the_clip():
    def clip(when: str) -> np.ndarray:
        ring = Thing("ring", "blue", "small", "left", motion="right", when=when)
        return render_clip(Scene("white", things=(ring,)), 5, 64)

    always, early, late = map(clip, ("always", "early", "late"))
    assert np.array_equal(early[[0, 1, 2, 3, 4]], always[[0, 2, 4, 4, 4]])
    assert np.array_equal(late[[0, 1, 2, 3, 4]], always[[0, 0, 0, 2, 4]])


def test_motions_stay_in_the_picture():
    assert set(possible_motions("small", "top left")) == {"still", "right", "down", "grow"}
    assert set(possible_motions("large", "center")) == set(MOTIONS) - {"grow"}


@pytest.mark.parametrize("word", ["W", "WWWWW", "LANCE"])
def test_words_fit_into_their_row(word):
    for size in (112, (64, 160), (160, 64)):
        picture = render(Scene("white", text=Text(word, "blue", "bottom")), size)
        rows, columns = np.nonzero(picture[..., 0] < 200)
        height, width = picture.shape[:2]
        assert rows.min() >= height * 2 // 3 and rows.max() < height - 1
        assert columns.min() > 0 and columns.max() < width - 1


def test_bad_sizes_and_times_are_refused():
    scene = Scene("white")
    for size in (0, 100, (112, 50)):
        with pytest.raises(InputError, match="multiples of 16"):
            render(scene, size)
    with pytest.raises(InputError, match=r"frame_time is 1\.5"):
        render(scene, 112, 1.5)
    with pytest.raises(InputError, match="at least one frame"):
        render_clip(scene, 0, 112)
