"""Command lines in this process, on the tiny checkpoint, and media to give them."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ran import Ran, Run

from openlance.cli import main
from openlance.data.save import save_video


@pytest.fixture
def run(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Runs a command line in an empty folder, on the tiny checkpoint unless it names another."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(*args: object, model: object = tiny_checkpoint, stdin: str = "") -> Ran:
        words = [str(arg) for arg in args]
        if model is not None:
            words += ["--model", str(model)]
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            code = main(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture
def spoiled(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, for a test to spoil."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "spoiled"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    frames = np.random.default_rng(0).integers(0, 256, (9, 48, 48, 3), dtype=np.uint8)
    return save_video(frames, tmp_path / "clip.mp4", 8)
