"""The commands of the training guide, as written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from openlance.cli import main

GUIDE = Path(__file__).parents[1] / "docs" / "training.md"


def commands() -> list[str]:
    """The first block of commands under the heading of the ten."""
    text = GUIDE.read_text().partition("in ten commands")[2]
    found = re.search(r"```console\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return [line.removeprefix("$ ") for line in found[1].splitlines()]


def test_ten_commands_from_a_file_to_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = commands()
    assert len(lines) == 10
    for line in lines:
        program, *args = shlex.split(line)
        assert program == "openlance"
        with torch.random.fork_rng():
            assert main(args) == 0, line
    adapted, tuned = (Image.open(f"{name}.png") for name in ("adapted", "tuned"))
    assert adapted.size == tuned.size == (96, 96)
    assert (tmp_path / "runs" / "adapted" / "step-00000006").is_dir()
    assert (tmp_path / "scores" / "scores.json").is_file()
    assert (tmp_path / "data_check" / "sheet.png").is_file()
