"""GenEval (arXiv 2310.11513): objects, counts, colors and positions, by a detector. 553 prompts, 4 each.

The prompts are bundled, under their own licence. The scorer, `evaluation/evaluate_images.py` of
djghosh13/geneval, writes one JSON line for each picture.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import openlance
from openlance.errors import InputError
from openlance.eval.harness import Making, Pictures, Run, Sample
from openlance.eval.results import Scored, compare, mean_by
from openlance.eval.scoring import parts_of, score_parts, written

PROMPTS = Path(openlance.__file__).parent / "assets" / "geneval" / "evaluation_metadata.jsonl"
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
EACH = 4


class GenEval(Pictures):
    """data: the prompts with what they ask for, one JSON object a line."""

    name = "geneval"
    published = 553

    def __init__(self, making: Making, limit: int | None = None, data: Path | None = None):
        super().__init__(making, limit)
        self.data = data or PROMPTS

    def entries(self) -> Sequence[tuple[int, dict[str, Any]]]:
        """(number, what is asked for) of each prompt."""
        return list(enumerate(read_lines(self.data, ("tag", "prompt"))))

    def samples_of(self, entry: tuple[int, dict[str, Any]]) -> list[Sample]:
        number, asked = entry
        facts = {"number": number, "asked": asked}
        return [
            Sample(f"{number:05d}/samples/{index:04d}.png", asked["prompt"], (seed,), facts)
            for index, seed in enumerate(self.making.seeds(EACH))
        ]

    def aside(self, sample: Sample) -> Mapping[str, Callable[[Path], object]]:
        line = json.dumps(sample.facts["asked"]) + "\n"
        return {f"{sample.facts['number']:05d}/metadata.jsonl": partial(_write_text, text=line)}

    def score(self, run: Run) -> None:
        together = EACH if run.config.scorer is None else run.config.scorer.together
        score_parts(run, parts_of(self.samples(), max(EACH, together // EACH * EACH)))

    def aggregate(self, run: Run) -> Scored:
        tags = {sample.path: sample.facts["asked"]["tag"] for sample in self.samples()}
        right: list[tuple[str, bool]] = []
        for file in written(run, "*.jsonl"):
            for line in read_lines(file, ("filename", "correct")):
                right.append(("/".join(Path(line["filename"]).parts[-3:]), bool(line["correct"])))
        failures = compare("score", tags, [name for name, _ in right])
        means = mean_by((tags[name], correct) for name, correct in right)
        scores = {tag: means[tag] for tag in sorted(means, key=_order)}
        lost = sorted(set(tags.values()) - set(means))
        if lost:
            raise InputError(f"{run.judged}: nothing of {', '.join(lost)} has a score")
        marks = {name: "right" if correct else "wrong" for name, correct in right}
        return Scored({"overall": overall(scores), "tags": scores}, len(right), tuple(failures), marks)


def overall(tags: Mapping[str, float]) -> float:
    """The plain mean of the tags, each of which is a mean over its pictures."""
    return fmean(tags.values())


def read_lines(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line. Raises InputError that names a line without these fields."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: cut short or not JSON ({error})") from error
        missing = [name for name in fields if not isinstance(value, dict) or name not in value]
        if missing:
            raise InputError(f"{path}:{number}: a line must be an object with {', '.join(missing)}")
        found.append(value)
    if not found:
        raise InputError(f"{path}: holds no line")
    return found


def _order(tag: str) -> int:
    return TAGS.index(tag) if tag in TAGS else len(TAGS)


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # other processes write the same file
    part.write_text(text, encoding="utf-8")
    part.replace(path)
