"""Small data of the benchmarks' own forms."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from openlance.eval.prepare import prepare

QUESTIONS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
# "a": 1 is a parent of 2, and 2 of 3. "b": 1 alone, then 2.
DPG_ROWS = [
    ("a", 1, "0", "entity - whole (cat)", "Is there a cat, please?"),
    ("a", 2, "1", "attribute - color (cat, red)", "Is it red?"),
    ("a", 3, "2", "relation - spatial (cat, mat)", "Is it on a mat?"),
    ("b", 1, "0", "entity - whole (dog)", "Is there a dog?"),
    ("b", 2, "0", "entity - part (tail)", "Is there a tail?"),
]


def lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dpg_data(folder: Path, rows: list[tuple]) -> Path:
    (folder / "prompts").mkdir(parents=True)
    for name in {row[0] for row in rows}:
        (folder / "prompts" / f"{name}.txt").write_text(f"a long prompt, {name}\n")
    with (folder / "dpg_bench.csv").open("w", newline="") as file:
        csv.writer(file).writerows([QUESTIONS, *rows])
    return folder


def info(folder: Path, entries: list[tuple[str, list[str]]]) -> Path:
    path = folder / "info.json"
    path.write_text(json.dumps([{"prompt_en": prompt, "dimension": names} for prompt, names in entries]))
    return path


def mvbench_data(folder: Path, counts: dict[str, int]) -> Path:
    (folder / "json").mkdir(parents=True)
    for task, count in counts.items():
        row = {"video": "clip.mp4", "question": "what?", "candidates": ["red", "blue"], "answer": "blue"}
        (folder / "json" / f"{task}.json").write_text(json.dumps([row] * count))
    return folder


def configured(name: str, folder: Path, data: Path | None) -> Path:
    """The stand-in's configuration, with this data."""
    prepare(name, folder, stand_in=True)
    file = folder / "config.toml"
    kept = [line for line in file.read_text().splitlines() if not line.startswith("data")]
    named = [] if data is None else [f"data = {json.dumps(str(data))}"]
    file.write_text("\n".join([*named, *kept]) + "\n")
    return file
