"""Each benchmark from beginning to end on the bundled model, with the stand-in for its scorer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from made import configured, dpg_data, info, lines, mvbench_data
from PIL import Image

from openlance.cli import main
from openlance.data.save import save_video
from openlance.eval import mvbench, vbench
from openlance.eval.gedit import GROUPS
from openlance.world import Scene, Thing, render

pytestmark = pytest.mark.slow

CIRCLE = Scene("white", "plain", (Thing("circle", "red", "large", "center"),))


def evaluate(name: str, *words: object) -> dict:
    """What `openlance eval` of nano comes to."""
    assert main(["eval", name, "--quiet", "--out", "run", *map(str, words)]) == 0
    found = json.loads(Path("run/scores.json").read_text())
    assert found["settings"]["model"] == "nano"
    assert Path("run/report.html").is_file()
    return found


def test_geneval(here: Path) -> None:
    config = configured("geneval", here / "config", None)
    found = evaluate("geneval", "--size", 96, "--steps", 2, "--limit", 6, "--config", config)
    assert found["scorer"]["stand_in"] is True
    assert found["counts"] == {"published": 553, "entries": 6, "judged": 24, "failures": 0}
    assert found["scores"]["overall"] == pytest.approx(np.mean(list(found["scores"]["tags"].values())))
    assert Path("run/report.html").read_text().count("data:image/jpeg;base64,") == 24


def test_dpg(here: Path) -> None:
    rows = [
        ("one", 1, "0", "entity - whole (circle)", "Is there a circle?"),
        ("one", 2, "1", "attribute - color (circle, red)", "Is the circle red?"),
        ("two", 1, "0", "entity - whole (star)", "Is there a star?"),
    ]
    config = configured("dpg", here / "config", dpg_data(here / "data", rows))
    found = evaluate("dpg", "--size", 96, "--steps", 2, "--config", config)
    assert found["scorer"]["stand_in"] is True
    assert found["counts"]["failures"] == 0
    assert {path.name for path in Path("run/samples").iterdir()} == {"one.png", "two.png"}
    assert Image.open("run/samples/one.png").size == (192, 192)
    assert 0 <= found["scores"]["overall"] <= 100


def test_vbench(here: Path) -> None:
    still = [vbench.FLICKERING]
    moving = [name for name in vbench.DIMENSIONS if name != vbench.FLICKERING]
    data = info(here, [("a red circle moves to the right", moving), ("a blue star on gray", still)])
    config = configured("vbench", here / "config", data)
    found = evaluate("vbench", "--size", 48, "--frames", 5, "--steps", 1, "--config", config)
    assert found["scorer"]["stand_in"] is True
    assert len(list(Path("run/samples").glob("*.mp4"))) == 5 + 25
    scores = found["scores"]
    assert scores["total"] == pytest.approx((4 * scores["quality"] + scores["semantic"]) / 5)


def test_gedit(here: Path) -> None:
    (here / "data" / "images").mkdir(parents=True)
    Image.fromarray(render(CIRCLE)).save(here / "data" / "images" / "circle.png")
    rows = [
        {"key": "circle", "group": group, "instruction": "make the circle blue"} for group in list(GROUPS)[:2]
    ]
    rows[1] = rows[1] | {"key": "again"}
    Image.fromarray(render(CIRCLE)).save(here / "data" / "images" / "again.png")
    lines(here / "data" / "instructions.jsonl", rows)
    config = configured("gedit", here / "config", here / "data")
    found = evaluate("gedit", "--steps", 2, "--config", config)
    assert found["scorer"]["stand_in"] is True
    assert set(found["scores"]["groups"]) == set(list(GROUPS)[:2])


def test_mvbench(here: Path) -> None:
    data = mvbench_data(here / "data", {"action_count": 2})
    frames = np.stack([render(CIRCLE)] * 16)
    save_video(frames, data / "video" / mvbench.TASKS["action_count"] / "clip.mp4", 8)
    (here / "config.toml").write_text('data = "data"\n')
    others = [task for task in mvbench.TASKS if task != "action_count"]
    found = evaluate("mvbench", "--config", "config.toml", "--leave-out", *others)
    assert found["counts"]["judged"] == 2
    assert 0 <= found["scores"]["overall"] <= 100
