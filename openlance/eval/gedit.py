"""GEdit-Bench (arXiv 2504.17761): 606 English instructions for real pictures, in 11 groups, and a judge.

The judge is VIEScore (arXiv 2312.14867): it says from 0 to 10 how well the edit follows and keeps to the
instruction (SC), and how natural and free of artefacts the picture is (PQ). Scores stand in its CSV files,
one for each group. It may be any OpenAI-compatible service, or a scorer of the configuration writes them.
Where an answer cannot be read, VIEScore's own code puts a random number: here the judge is asked again, and
what stays unreadable is reported.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

from openlance.data.media import load_image
from openlance.data.save import save_image
from openlance.errors import InputError
from openlance.eval.geneval import read_lines
from openlance.eval.harness import Benchmark, Making, Run, Sample, check_picture
from openlance.eval.results import Scored, Scores, compare, mean_by
from openlance.eval.scoring import Part, score_parts, written
from openlance.eval.viescore import judge_edits
from openlance.infer.orders import Order
from openlance.infer.pipeline import LancePipeline

GROUPS = (
    "background_change", "color_alter", "material_alter", "motion_change", "ps_human", "style_change",
    "subject-add", "subject-remove", "subject-replace", "text_change", "tone_transfer",
)  # fmt: skip
SC, PQ = "sementics_score", "quality_score"  # the columns of the official files, spelt as they are
MODEL = "openlance"


class GEdit(Benchmark):
    """data: a folder with `instructions.jsonl` (key, group, instruction) and `images/KEY.png`, which
    `openlance eval setup gedit --data` makes of the published data set."""

    name = "gedit"
    tasks = ("image_edit",)
    published = 606

    def __init__(self, making: Making, limit: int | None = None, data: Path | None = None):
        super().__init__(making, limit)
        if data is None:
            raise InputError("gedit: where are its pictures? See `openlance eval setup gedit`")
        self.data = data

    def entries(self) -> Sequence[dict[str, Any]]:
        rows = read_lines(self.data / "instructions.jsonl", ("key", "group", "instruction"))
        unknown = sorted({row["group"] for row in rows} - set(GROUPS))
        if unknown:
            raise InputError(f"{self.data}/instructions.jsonl: unknown group {', '.join(unknown)}")
        return rows

    def samples_of(self, entry: dict[str, Any]) -> list[Sample]:
        path = f"{MODEL}/fullset/{entry['group']}/en/{entry['key']}.png"
        return [Sample(path, entry["instruction"], self.making.seeds(1), entry)]

    def source(self, sample: Sample) -> Path:
        """The picture to edit."""
        return self.data / "images" / f"{sample.facts['key']}.png"

    def aside(self, sample: Sample) -> Mapping[str, Callable[[Path], object]]:
        name = sample.path.removesuffix(".png") + "_SRCIMG.png"
        return {name: partial(_copy, self.source(sample))}

    def orders(self, lance: LancePipeline, sample: Sample, words: str) -> list[Order]:
        source = self.source(sample)
        return [lance.order.edit(source, words, seed=seed, **self.making.options) for seed in sample.seeds]

    def write(self, sample: Sample, results: Sequence[Any], path: Path) -> None:
        results[0].save(path)

    def check(self, sample: Sample, path: Path) -> None:
        check_picture(path, None)  # an edit has the shape of its source, at the checkpoint's resolution

    def score(self, run: Run) -> None:
        samples = self.samples()
        if run.config.scorer is not None:
            by_group = {group: [s for s in samples if s.facts["group"] == group] for group in GROUPS}
            score_parts(
                run, [Part(g, own, {"group": g, "model": MODEL}) for g, own in by_group.items() if own]
            )
            return
        if run.config.judge is None:
            raise InputError("no judge for gedit: see `openlance eval setup gedit`, and give it by --config")
        pairs = [(sample, self.source(sample), run.samples / sample.path) for sample in samples]
        rows = judge_edits(run, pairs)
        for group in GROUPS:
            own = [
                rows[sample.path]
                for sample in samples
                if sample.facts["group"] == group and sample.path in rows
            ]
            _write_csv(run.judged / "viescore" / f"{MODEL}_{group}_en_vie_score.csv", own)

    def aggregate(self, run: Run) -> Scored:
        groups = {Path(s.path).stem: s.facts["group"] for s in self.samples()}
        keys = {Path(s.path).stem: s.path for s in self.samples()}
        rows: dict[str, tuple[float, float]] = {}
        seen: list[str] = []
        for file in written(run, "*_vie_score.csv"):
            for key, sc, pq in _read_csv(file):
                rows[key] = (sc, pq)
                seen.append(key)
        failures = compare("score", groups, seen)
        by = mean_by((groups[key], edit_score(*scores)) for key, scores in rows.items())
        lost = sorted(set(groups.values()) - set(by))
        if lost:
            raise InputError(f"{run.judged}: nothing of {', '.join(lost)} has a score")
        ordered = {group: by[group] for group in GROUPS if group in by}
        scores: Scores = {
            "overall": overall(ordered),
            "semantic_consistency": overall(mean_by((groups[key], sc) for key, (sc, _) in rows.items())),
            "perceptual_quality": overall(mean_by((groups[key], pq) for key, (_, pq) in rows.items())),
            "groups": ordered,
        }
        marks = {keys[key]: f"{edit_score(*pair):.1f}" for key, pair in rows.items()}
        return Scored(scores, len(rows), tuple(failures), marks)


def edit_score(sc: float, pq: float) -> float:
    """Of one edit: √(SC · PQ), each the least of its judge's numbers."""
    return sqrt(sc * pq)


def overall(groups: Mapping[str, float]) -> float:
    """The plain mean of the groups, each of which is a mean over its edits."""
    return fmean(groups.values())


def _copy(source: Path, target: Path) -> None:
    save_image(load_image(source), target)


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(
            file, ["source_image", "edited_image", "instruction", SC, PQ, "instruction_language"]
        )
        writer.writeheader()
        writer.writerows({"instruction_language": "en", **row} for row in rows)


def _read_csv(path: Path) -> list[tuple[str, float, float]]:
    """(key, SC, PQ) of each English row. Raises InputError where these are no numbers from 0 to 10."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = []
    for number, row in enumerate(rows, 2):
        if row.get("instruction_language", "en") != "en":
            continue
        try:
            key, sc, pq = Path(row["edited_image"]).stem, float(row[SC]), float(row[PQ])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}:{number}: needs edited_image, {SC} and {PQ} ({error!r})") from error
        if not (0 <= sc <= 10 and 0 <= pq <= 10):
            raise InputError(f"{path}:{number}: {key}: scores lie from 0 to 10, not {sc} and {pq}")
        found.append((key, sc, pq))
    return found
