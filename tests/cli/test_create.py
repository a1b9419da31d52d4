"""Commands that make pictures and clips."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from ran import Run, pixels, seed_of

from openlance.data.media import load_video


def test_generate_writes_a_picture_and_says_seed_and_seconds(run: Run) -> None:
    ran = run("generate", "a red circle")
    assert ran.code == 0
    assert re.fullmatch(r"openlance-0001\.png  seed \d+  \d+\.\d s\n", ran.out)
    assert ran.err == ""  # no progress bar where stderr is no terminal
    assert pixels("openlance-0001.png").shape == (64, 64, 3)


def test_the_same_seed_gives_the_same_pixels(run: Run) -> None:
    first = run("generate", "a red circle", "--size", "32x48", "--steps", 3, "--guidance", 2)
    run(
        "generate", "a red circle", "--size", "32x48", "--steps", 3, "--guidance", 2, "--seed", seed_of(first)
    )
    run("generate", "--like", "openlance-0001.png")
    run("generate", "a red circle", "--size", "32x48", "--steps", 3, "--guidance", 2)
    one, seeded, like, other = (pixels(f"openlance-000{n}.png") for n in range(1, 5))
    assert one.shape == (32, 48, 3)
    assert np.array_equal(one, seeded)
    assert np.array_equal(one, like)
    assert not np.array_equal(one, other)


def test_options_go_over_those_of_like(run: Run) -> None:
    run("generate", "a red circle", "--size", 32, "--negative", "blue")
    run("generate", "--like", "openlance-0001.png", "--seed", 5, "--steps", 1)
    old, new = (json.loads(run("show", f"openlance-000{n}.png", model=None).out) for n in (1, 2))
    assert (new["prompt"], new["negative_prompt"], new["size"]) == ("a red circle", "blue", [32, 32])
    assert (new["seed"], new["sampling"]["steps"]) == (5, 1)
    assert new["sampling"] == {**old["sampling"], "steps": 1}


def test_several_seeds_and_names_that_are_free(run: Run) -> None:
    Path("openlance-0007.mp4").touch()
    ran = run("generate", "a circle", "--count", 2, "--seed", 3, "--steps", 1)
    assert [line.split("  ")[:2] for line in ran.out.splitlines()] == [
        ["openlance-0008.png", "seed 3"], ["openlance-0009.png", "seed 4"],
    ]  # fmt: skip
    run("generate", "a circle", "--count", 2, "--seed", 3, "--steps", 1, "--out", "new/stars.jpg")
    assert sorted(path.name for path in Path("new").iterdir()) == ["stars-1.jpg", "stars-2.jpg"]
    run("generate", "a circle", "--seed", 3, "--steps", 1, "--out", "new")
    assert Path("new/openlance-0001.png").is_file()


def test_a_clip_from_words_and_the_same_again(run: Run) -> None:
    assert run("video", "it moves", "--frames", 9, "--seed", 1, "--out", "one.gif").code == 0
    assert run("video", "--like", "one.gif", "--out", "two.gif").code == 0
    one, two = load_video("one.gif"), load_video("two.gif")
    assert one.frames.shape == (9, 48, 48, 3)
    assert np.array_equal(one.frames, two.frames)


def test_animate(run: Run, photo: Path) -> None:
    ran = run("animate", photo, "it moves", "--last", photo, "--frames", 9)
    assert ran.code == 0, ran.err
    assert ran.out.startswith("openlance-0001.mp4")
    assert len(load_video("openlance-0001.mp4")) == 9


def test_edit_takes_pictures_and_clips(run: Run, photo: Path, clip: Path) -> None:
    assert run("edit", photo, "make it blue", "--visual-guidance", 1.5).code == 0
    height, width, _ = pixels("openlance-0001.png").shape
    assert height < width  # the shape of what was edited
    assert run("edit", clip, "make it blue", "--out", "edited.mp4").code == 0
    assert load_video("edited.mp4").fps == pytest.approx(8)
    assert json.loads(run("show", "edited.mp4", model=None).out)["task"] == "video_edit"
    told = run("edit", clip, "make it blue", "--max-memory", "1MB", "--steps", 1)
    assert told.code == 2 and "too little for video_edit:" in told.err


def test_subject_draws_and_films(run: Run, photo: Path) -> None:
    assert run("subject", photo, photo, "--prompt", "it on black", "--size", 32).code == 0
    assert run("subject", photo, "--prompt", "it on black", "--video", "--frames", 5).code == 0
    assert json.loads(run("show", "openlance-0001.png", model=None).out)["task"] == "subject_image"
    assert len(load_video("openlance-0002.mp4")) == 5
