"""The demo runs every task, on any checkpoint, and writes what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from openlance.data.media import load_video
from openlance.data.save import read_settings
from openlance.demo import QUESTIONS, run
from openlance.infer.pipeline import LancePipeline
from openlance.model.hub import BUNDLED

TASKS = (
    "generate", "subject", "edit", "edit again", "ask", "caption", "video", "animate", "edit video",
    "ask video",
)  # fmt: skip


def check_output(out: Path, rows: list) -> None:
    """Every row's file is there, answers in both forms, and one sheet."""
    assert {row.task for row in rows} == set(TASKS)
    for row in rows:
        assert (out / row.file).is_file()
    for name in ("video", "animate", "edit-video"):
        assert len(load_video(out / f"{name}.mp4")) == len(load_video(out / f"{name}.gif"))
    answers = json.loads((out / "answers.json").read_text())
    assert [answer["question"] for answer in answers[: len(QUESTIONS)]] == [
        question for question, _ in QUESTIONS
    ]
    assert (out / "answers.txt").read_text().count("\n") >= len(answers)
    with Image.open(out / "sheet.png") as sheet:
        assert min(sheet.size) > 400


def test_demo_on_random_weights(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(LancePipeline.from_pretrained(tiny_checkpoint), tmp_path / "demo", seed=1, steps=1)
    check_output(tmp_path / "demo", rows)
    said = capsys.readouterr().out
    assert said.count("\n") > len(rows)
    assert "sheet.png" in said
    assert read_settings(tmp_path / "demo" / "edit-again.png")["prompt"] == "change the background to beige"


@pytest.mark.slow
@pytest.mark.skipif(not BUNDLED["nano"].is_dir(), reason="the bundled model is not in this checkout")
def test_demo_on_nano(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(LancePipeline.from_pretrained("nano"), tmp_path / "demo")
    check_output(tmp_path / "demo", rows)
    assert "nano has" in capsys.readouterr().out
    judged = [row for row in rows if row.right is not None]
    answers = [row.right for row in judged if isinstance(row.result, str)]
    assert sum(answers) >= len(answers) - 2
    assert 3 * sum(row.right for row in judged) >= 2 * len(judged)
