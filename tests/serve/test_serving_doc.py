"""The page of the server: its blocks of Python as written, one after the other, against a real server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from serving import Server, png

from openlance.data.media import load_video

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


def test_every_block_runs_as_written(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("circle", "cat", "hat"):
        Path(f"{name}.png").write_bytes(png())
    text = PAGE.read_text().replace("http://127.0.0.1:8000", server.address)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), names)
    assert capsys.readouterr().out.startswith("data:image/png;base64,")
    assert len(names["made"].data) == 1
    assert len(load_video("circle.mp4")) > 1
