"""Nano's vision tower: labels are true at every time of a clip, and a short run writes what it promises."""

import json
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from openlance.config import VisionConfig
from openlance.model.vision import Vision
from openlance.train.nano_vision import example, labels, train_vision
from openlance.world import COLORS, MOTIONS, PLACES, SHAPES, Scene, Text, Thing, cell_labels

TINY = VisionConfig(depth=2, hidden=16, heads=2, mlp=32, out_hidden=32, full_attention_layers=(1,))


def test_labels_follow_the_motion():
    moving = Thing("star", "red", "small", "center", motion="left")
    growing = Thing("ring", "blue", "small", "top", motion="grow")
    scene = Scene("navy", "dots", (moving, growing))
    for time, place, size in ((0.0, "center", 1), (0.9, "left", 1)):
        places, picture = labels(scene, time)
        assert (places[:, 0] > 0).sum() == 2
        kinds = (SHAPES.index("star"), list(COLORS).index("red"), size - 1, MOTIONS.index("left"))
        assert places[PLACES.index(place)].tolist() == [kind + 1 for kind in kinds]
        assert places[PLACES.index("top"), 2] == (2 if time > 0.5 else 1)
        assert picture[2] == 0
    np.testing.assert_array_equal(labels(scene, 0.0)[0][:, :3], cell_labels(scene))
    assert labels(Scene("gray", text=Text("GO", "red", "top")), 0.0)[1][2] > 0


def test_examples_are_two_frames():
    rng = np.random.default_rng(0)
    examples = [example(rng) for _ in range(60)]
    assert all(e.frames.shape == (2, 112, 112, 3) for e in examples)
    moved = [not np.array_equal(e.frames[0], e.frames[1]) for e in examples]
    assert 2 < sum(moved) < 30


def test_a_run_writes_weights_and_measurements(tmp_path: Path):
    result = train_vision(tmp_path, 0.02, config=TINY)
    assert result == json.loads((tmp_path / "vision.json").read_text())
    Vision(TINY).load_state_dict(load_file(tmp_path / "vision.safetensors"))
    assert set(result["accuracy"]["seen pairs"]) == {"shape", "color", "size", "motion", "empty"}
