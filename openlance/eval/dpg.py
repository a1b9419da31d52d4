"""DPG-Bench (arXiv 2403.05135): long prompts, judged by questions that depend on each other. 1065 prompts.

Each prompt's four pictures stand in one grid. The scorer, `dpg_bench/compute_dpg_bench.py` of
TencentQQGYLab/ELLA, asks a visual question model about each tile and writes a line for each answer; what
follows from the answers is reckoned here. Its own sums differ in two ways, which `as_published` repeats: its
category scores hold the last tile only, and it drops the first row of the questions, so that what depends on
that question cannot be judged and its prompt falls out.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from openlance.data.save import save_image
from openlance.errors import InputError
from openlance.eval.harness import Making, Pictures, Run, Sample, check_picture
from openlance.eval.results import Scored, compare, mean_by
from openlance.eval.scoring import parts_of, score_parts, written

TILES = 4
COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
ANSWER = re.compile(
    r"(?P<path>.*), \((?P<left>\d+), (?P<top>\d+), \d+, \d+\), (?P<question>.*), (?P<answer>[^,]*)"
)


@dataclass(frozen=True)
class Question:
    """One row of the questions. number: within its prompt; parents: numbers, without the 0 for none."""

    number: int
    parents: tuple[int, ...]
    category: str
    words: str


Tile = Mapping[int, bool]
"""Number of a question → whether its answer is yes."""


class DPG(Pictures):
    """data: the folder `dpg_bench` of the official repository, with `prompts/` and `dpg_bench.csv`."""

    name = "dpg"
    published = 1065

    def __init__(self, making: Making, limit: int | None = None, data: Path | None = None):
        super().__init__(making, limit)
        if data is None:
            raise InputError("dpg: where are its prompts? See `openlance eval setup dpg`")
        self.data = data

    def entries(self) -> Sequence[Path]:
        found = sorted((self.data / "prompts").glob("*.txt"))
        if not found:
            raise InputError(f"{self.data}: no prompts/*.txt there")
        return found

    def samples_of(self, entry: Path) -> list[Sample]:
        words = " ".join(entry.read_text(encoding="utf-8").split())
        return [Sample(f"{entry.stem}.png", words, self.making.seeds(TILES))]

    def write(self, sample: Sample, results: Sequence[Any], path: Path) -> None:
        height, width = results[0].frames.shape[1:3]
        grid = Image.new("RGB", (2 * width, 2 * height))
        for index, made in enumerate(results):
            grid.paste(made.image, (index % 2 * width, index // 2 * height))
        save_image(grid, path, dict(results[0].settings) | {"seeds": list(sample.seeds), "grid": [2, 2]})

    def check(self, sample: Sample, path: Path) -> None:
        size = self.making.size
        check_picture(path, None if size is None else (2 * size[0], 2 * size[1]))

    def score(self, run: Run) -> None:
        assert self.making.size is not None
        table = self.data / "dpg_bench.csv"
        if not run.as_published:
            table = _with_first_row_twice(table, run.judged / "dpg_bench.csv")
        together = run.config.scorer.together if run.config.scorer else TILES
        values = {"csv": str(table.absolute()), "tile": str(self.making.size[0])}
        score_parts(run, parts_of(self.samples(), together, **values))

    def aggregate(self, run: Run) -> Scored:
        asked = read_questions(self.data / "dpg_bench.csv", without_first=run.as_published)
        names = [Path(sample.path).stem for sample in self.samples()]
        unknown = [name for name in names if name not in asked]
        if unknown:
            raise InputError(f"{self.data}/dpg_bench.csv: no questions for {', '.join(unknown[:3])}")
        answers = read_answers(written(run, "*_detail.txt"), asked)
        left_out = {name for name in names if run.as_published and _orphaned(asked[name])}
        judged = [name for name in answers if name not in left_out]
        failures = compare("score", [name for name in names if name not in left_out], judged)
        whole = {}
        for name in judged:
            wrong = _incomplete(answers[name], asked[name])
            if wrong:
                failures.append(f"{name}: {wrong}")
            else:
                whole[name] = answers[name]
        if not whole:
            raise InputError(f"{run.judged}: no prompt is judged: {'; '.join(failures[:3])}")
        scores = {name: prompt_score(tiles, asked[name]) for name, tiles in whole.items()}
        categories = category_scores(whole, asked, last_tile_only=run.as_published)
        marks = {f"{name}.png": f"{100 * score:.0f}" for name, score in scores.items()}
        total = 100 * fmean(scores.values())
        return Scored({"overall": total, **categories}, len(whole), tuple(failures), marks)


def tile_score(tile: Tile, questions: Sequence[Question]) -> float:
    """The share of yes, where a parent's no makes a no of what depends on it, in the order of the rows."""
    passed: dict[int, bool] = {}
    for question in questions:
        # A parent that is asked later counts with its own answer, as it does in the official order.
        parents = all(passed.get(parent, tile[parent]) for parent in question.parents)
        passed[question.number] = tile[question.number] and parents
    return fmean(passed.values())


def prompt_score(tiles: Sequence[Tile], questions: Sequence[Question]) -> float:
    """The mean over the tiles of a grid."""
    return fmean(tile_score(tile, questions) for tile in tiles)


def category_scores(
    answers: Mapping[str, Sequence[Tile]],
    asked: Mapping[str, Sequence[Question]],
    *,
    last_tile_only: bool = False,
) -> dict[str, dict[str, float]]:
    """Means ×100 of the answers themselves, by broad and by fine category, over all tiles."""
    pairs = [
        (question.category, 100.0 * tile[question.number])
        for name, tiles in answers.items()
        for tile in (tiles[-1:] if last_tile_only else tiles)
        for question in asked[name]
    ]
    broad = mean_by((category.split("-")[0].strip(), value) for category, value in pairs)
    return {"categories": broad, "fine_categories": mean_by(sorted(pairs))}


def read_questions(path: Path, *, without_first: bool = False) -> dict[str, list[Question]]:
    """The questions of each prompt, in the order of the rows."""
    found: dict[str, list[Question]] = {}
    for place, row in enumerate(_rows(path)):
        if place == 0 and without_first:
            found[row["item_id"]] = []
            continue
        try:
            parents = tuple(int(part) for part in row["dependency"].split(",") if int(part))
            number = int(row["proposition_id"])
        except ValueError as error:
            raise InputError(f"{path}: row {place + 2}: {error}") from error
        category = row["tuple"].split("(")[0].strip()
        question = Question(number, parents, category, row["question_natural_language"])
        found.setdefault(row["item_id"], []).append(question)
    for name, questions in found.items():
        numbers = {question.number for question in questions}
        if len(numbers) < len(questions):
            raise InputError(f"{path}: {name}: two questions have one proposition_id")
        if not without_first and _orphaned(questions):
            raise InputError(f"{path}: {name}: a question depends on one that is not there")
    return found


def read_answers(files: Sequence[Path], asked: Mapping[str, Sequence[Question]]) -> dict[str, list[Tile]]:
    """For each prompt the tiles, left to right and top to bottom, as far as they are answered."""
    found: dict[str, dict[tuple[int, int], list[tuple[str, str]]]] = {}
    places: dict[str, Path] = {}
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            match = ANSWER.fullmatch(line)
            if match is None:
                raise InputError(f"{file}:{number}: no answer of the scorer: {line[:80]!r}")
            name = Path(match["path"]).stem
            if places.setdefault(name, file) != file:
                raise InputError(f"judged twice: {name}, in {places[name]} and {file}: remove one")
            corner = (int(match["top"]), int(match["left"]))
            found.setdefault(name, {}).setdefault(corner, []).append((match["question"], match["answer"]))
    return {
        name: [_tile(name, tiles[corner], asked.get(name, ())) for corner in sorted(tiles)]
        for name, tiles in found.items()
    }


def _tile(name: str, said: list[tuple[str, str]], questions: Sequence[Question]) -> Tile:
    """The answers are in the order of the questions; a scorer that stopped has given the first of them."""
    if len(said) > len(questions):
        raise InputError(f"judged twice: {name} has {len(said)} answers to {len(questions)} questions")
    for (words, _), question in zip(said, questions, strict=False):
        if words != question.words:
            raise InputError(
                f"{name}: the scorer asked {words!r} where the questions have {question.words!r}"
            )
    return {question.number: answer == "yes" for (_, answer), question in zip(said, questions, strict=False)}


def _incomplete(tiles: Sequence[Tile], questions: Sequence[Question]) -> str:
    """What is missing, in words, or nothing."""
    if len(tiles) != TILES:
        return f"{len(tiles)} tiles are judged, not {TILES}"
    missing = sum(len(questions) - len(tile) for tile in tiles)
    return f"{missing} questions have no answer" if missing else ""


def _orphaned(questions: Sequence[Question]) -> bool:
    numbers = {question.number for question in questions}
    return not questions or any(set(question.parents) - numbers for question in questions)


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}): see `openlance eval setup dpg`") from error
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing or not rows:
        raise InputError(f"{path}: has no rows, or no column {', '.join(missing)}")
    return rows


def _with_first_row_twice(source: Path, target: Path) -> Path:
    """A copy for the official scorer, which drops the first row: so every question is asked."""
    rows = _rows(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows([rows[0], *rows])
    return target
