"""The page of the Python API: its blocks as written, one after the other, on the bundled model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import openlance
from openlance.infer.pipeline import LancePipeline
from openlance.model.adapters import add_lora, save_adapter
from openlance.model.hub import BUNDLED

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


@pytest.mark.slow
@pytest.mark.skipif(not BUNDLED["nano"].is_dir(), reason="the bundled model is not in this checkout")
def test_every_block_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tuned = LancePipeline.from_pretrained("nano", device="cpu")
    add_lora(tuned.model, ["gen"], rank=2)
    save_adapter(tuned.model, tmp_path / "adapter")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) > 10
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), names)
    told = capsys.readouterr().out
    for line in (
        "stopped after step 2 of 20",
        "stopped\n",
        "unknown settings guidence: choose from guidance",
    ):
        assert line in told
    assert len(names["talk"]) == 7 and len(names["fork"]) == 5
    assert {path.name for path in tmp_path.iterdir()} == {
        "circle.png", "moving.mp4", "answer.json", "talk.zip", "adapter",
    }  # fmt: skip


def test_everything_is_at_the_top_of_the_package() -> None:
    for name in openlance.__all__:
        assert getattr(openlance, name) is not None
        assert name in dir(openlance)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        openlance.Nothing  # noqa: B018


def test_importing_the_package_is_light() -> None:
    """Not a name of it loads torch before it is used."""
    code = "import sys, openlance; dir(openlance); print({'torch', 'PIL', 'numpy', 'av'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
