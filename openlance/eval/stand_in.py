"""A stand-in for every official scorer: it writes files of their form, with scores that mean nothing.

It shows that a run goes through on a machine that has no scorer: `openlance eval setup BENCH --stand-in`
names it in the configuration, and results that come from it say so.

    python -m openlance.eval.stand_in BENCH SAMPLES OUTPUT [what else the benchmark gives]
"""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from pathlib import Path
from statistics import fmean


def share(*words: object) -> float:
    """A number in [0, 1) that only the words decide."""
    digest = hashlib.sha256(" ".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32


def geneval(samples: Path, output: Path) -> None:
    lines = []
    for folder in sorted(samples.iterdir()):
        asked = json.loads((folder / "metadata.jsonl").read_text())
        for picture in sorted((folder / "samples").glob("*.png")):
            correct = share(folder.name, picture.name) > 0.3
            row = {
                "filename": str(picture),
                "tag": asked["tag"],
                "prompt": asked["prompt"],
                "correct": correct,
            }
            lines.append(json.dumps(row | {"reason": "", "metadata": json.dumps(asked), "details": "{}"}))
    (output / "results.jsonl").write_text("\n".join(lines) + "\n")


def dpg(samples: Path, output: Path, table: str, tile: str) -> None:
    """Like the official script, without the first row of the questions."""
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))[1:]
    side, lines = int(tile), []
    for grid in sorted(samples.glob("*.png")):
        for left, top in ((0, 0), (side, 0), (0, side), (side, side)):
            for row in rows:
                if row["item_id"] == grid.stem:
                    words = row["question_natural_language"]
                    answer = "yes" if share(grid.stem, left, top, words) > 0.3 else "no"
                    lines.append(f"{grid}, {(left, top, left + side, top + side)}, {words}, {answer}")
    (output / "dpg_detail.txt").write_text("\n".join(lines) + "\n")


def vbench(samples: Path, output: Path, dimension: str) -> None:
    rows = [
        {"video_path": str(clip), "video_results": 0.7 + 0.2 * share(dimension, clip.name)}
        for clip in sorted(samples.glob("*.mp4"))
    ]
    found = {dimension: [fmean(float(str(row["video_results"])) for row in rows), rows]}
    (output / "results_eval_results.json").write_text(json.dumps(found))


def gedit(samples: Path, output: Path, model: str, group: str) -> None:
    edits = sorted(
        path
        for path in (samples / model / "fullset" / group / "en").glob("*.png")
        if "_SRCIMG" not in path.stem
    )
    with open(output / f"{model}_{group}_en_vie_score.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["edited_image", "sementics_score", "quality_score", "instruction_language"])
        for edit in edits:
            writer.writerow(
                [edit, round(10 * share(edit.name, "sc")), round(10 * share(edit.name, "pq")), "en"]
            )


BENCHMARKS = {"geneval": geneval, "dpg": dpg, "vbench": vbench, "gedit": gedit}

if __name__ == "__main__":
    name, samples, output, *own = sys.argv[1:]
    BENCHMARKS[name](Path(samples), Path(output), *own)  # type: ignore[operator]
