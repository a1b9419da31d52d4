"""Bad input: exit code 2, and one line that says what to do."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ran import Ran, Run, pixels, refused
from safetensors.torch import load_file, save_file

from openlance.data.media import load_video
from openlance.data.save import save_video

MODEL = "Lance_3B/model.safetensors"
NORM = "language_model.model.norm.weight"


def test_wrong_layout(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(run("generate", "a circle", model=tmp_path / "empty"), "not a Lance release")
    refused(run("generate", "a circle", model=tmp_path / "nowhere"), "no such folder")
    refused(run("generate", "a circle", "--variant", "Lance_4B"), "no variant Lance_4B")


def test_truncated_weights(run: Run, spoiled: Path) -> None:
    data = (spoiled / MODEL).read_bytes()
    (spoiled / MODEL).write_bytes(data[: len(data) // 2])
    refused(run("generate", "a circle", model=spoiled), "model.safetensors", "complete")


@pytest.mark.parametrize(
    ("value", "words"),
    [(torch.ones(31), ("misshapen", NORM)), (torch.full((32,), float("nan")), ("NaN", NORM))],
    ids=["misshapen", "NaN"],
)
def test_bad_parameters(run: Run, spoiled: Path, value: torch.Tensor, words: tuple[str, ...]) -> None:
    tensors = load_file(spoiled / MODEL)
    assert NORM in tensors
    save_file({**tensors, NORM: value}, spoiled / MODEL)
    refused(run("generate", "a circle", model=spoiled), *words)


def test_unknown_words_of_the_command_line(run: Run) -> None:
    assert run("paint", "a circle", model=None).code == 2
    assert run("generate", "a circle", "--colour", "red").code == 2
    assert run("generate", "a circle", "--dtype", "int8").code == 2
    refused(run("info", "--task", "t2x"), "unknown task", "t2i")
    refused(run("info", model="lance_4b"), "no such folder")


@pytest.mark.parametrize("words", [["generate"], ["generate", " "], ["video", ""], ["ask"], ["ask", ""]])
def test_empty_prompt(run: Run, words: list[str]) -> None:
    refused(run(*words), "empty" if words[0] != "ask" else "nothing is asked")


@pytest.mark.parametrize("command", ["edit", "animate", "ask", "subject"])
def test_media_that_cannot_be_read(run: Run, tmp_path: Path, command: str) -> None:
    def tried(name: str) -> Ran:
        path = tmp_path / name
        words = ["--prompt", "make it blue"] if command == "subject" else ["make it blue"]
        return run(command, path, *words, model="never loaded")

    (tmp_path / "empty.png").touch()
    (tmp_path / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(100))
    Image.new("1", (50_000, 4)).save(tmp_path / "wide.png")
    refused(tried("empty.png"), "empty.png", "empty")
    refused(tried("broken.mp4"), "broken.mp4")
    refused(tried("wide.png"), "wide.png", "50000x4", "too large")
    refused(tried("missing.png"), "missing.png", "no such file")


def test_a_clip_of_one_frame_works(run: Run, tmp_path: Path) -> None:
    one = save_video(np.full((1, 48, 48, 3), 200, dtype=np.uint8), tmp_path / "one.mp4", 8)
    assert run("ask", one, "--max-tokens", 2).code == 0
    assert run("edit", one, "make it blue", "--out", "blue.mp4").code == 0
    assert len(load_video("blue.mp4")) == 1


def test_sizes(run: Run) -> None:
    ran = run("generate", "a circle", "--size", "40x30")
    assert ran.code == 0
    assert pixels("openlance-0001.png").shape[:2] in {(32, 32), (48, 32)}
    assert re.fullmatch(r"openlance: note: size 40x30 is not a multiple of 16: made .*\n", ran.err)
    refused(run("generate", "a circle", "--size", "large"), "--size must be")
    refused(run("generate", "a circle", "--size", 4096), "128 pixels")
    refused(run("generate", "a circle", "--resolution", 8), "16")


def test_frames_over_the_limit(run: Run) -> None:
    refused(run("video", "a circle", "--frames", 18), "18 frames", "17")
    refused(run("video", "a circle", "--frames", 0), "0 frames")


def test_outputs_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for out in (tmp_path / "file" / "a.png", tmp_path / "a.bmp", tmp_path / "clip.mp4"):
        refused(run("generate", "a circle", "--out", out, model="never loaded"), str(out))
    refused(
        run("ask", "hello", "--out", tmp_path / "file" / "a.json", model="never loaded"), "cannot be written"
    )
    refused(run("demo", "--out", tmp_path / "file"), "file")


@pytest.mark.parametrize(
    "options",
    [
        ["--steps", "0"],
        ["--shift", "-1"],
        ["--guidance-interval", "1", "0"],
        ["--seed", "-1"],
        ["--count", "0"],
    ],
)
def test_settings_that_cannot_be(run: Run, options: list[str]) -> None:
    refused(
        run("generate", "a circle", *options, model="never loaded"), options[0].strip("-").replace("-", "_")
    )


def test_text_settings_that_cannot_be(run: Run) -> None:
    refused(run("ask", "hello", "--top-p", 2, model="never loaded"), "top_p")
    refused(run("chat", "--max-tokens", 0, model="never loaded"), "max_tokens")


def test_like_of_something_else(run: Run, photo: Path) -> None:
    refused(run("generate", "--like", photo), "holds no settings")
    run("generate", "a circle", "--steps", 1)
    refused(run("video", "--like", "openlance-0001.png"), "t2i")


def test_a_device_that_is_not_there(run: Run) -> None:
    refused(run("generate", "a circle", "--device", "toaster"), "toaster")
    if not torch.cuda.is_available():
        refused(run("generate", "a circle", "--device", "cuda"), "cuda")


def test_chat_ends_at_a_mistake_where_lines_are_piped(run: Run) -> None:
    refused(run("chat", stdin="/image nowhere.png\nhello\n"), "nowhere.png")
    refused(run("chat", stdin="/paint\n"), "/paint")
