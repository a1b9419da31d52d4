"""nano-bench: what a model draws, answers and edits in the procedural world, by the judge's exact word.

Every score is the share of right ones among what was asked. Scenes are drawn from a seed that training never
uses; "held out" scenes show a shape in a color that training never paired. "tags" are GenEval's six kinds of
prompt, said of shapes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from openlance.config import Sizes
from openlance.data.media import load_image, load_video
from openlance.data.save import check_folder, save_json
from openlance.errors import InputError
from openlance.eval.geneval import read_lines
from openlance.eval.harness import ANSWERS, Benchmark, Making, Run, Sample, check_samples, keep_settings, make
from openlance.eval.nano_parts import Case, cases
from openlance.eval.report import write_report
from openlance.eval.results import Scored, Scores, compare, finish, table
from openlance.eval.scoring import written
from openlance.eval.settings import EvalConfig
from openlance.infer.orders import Order
from openlance.infer.pipeline import LancePipeline
from openlance.model.release import read_json

PARTS = ("one", "two", "held_out", "questions", "edits", "motion", "tags")
# Not among the parts by default: they take as long again.
WIDE_PARTS = ("boxes", "words", "several", "turns")
TAGS_PART = "tags"

__all__ = ["PARTS", "WIDE_PARTS", "NanoBench", "Scores", "Tally", "run", "table"]


class Tally:
    """Right and asked, by name."""

    def __init__(self) -> None:
        self._marks: dict[str, list[bool]] = {}

    def mark(self, name: str, right: bool | None) -> None:
        """Count one; None was not asked."""
        if right is not None:
            self._marks.setdefault(name, []).append(bool(right))

    def scores(self) -> dict[str, float]:
        return {name: float(np.mean(marks)) for name, marks in self._marks.items()}


class NanoBench(Benchmark):
    """sizes: of the model that is asked. The scorer is the world's judge, right here."""

    name = "nano-bench"
    tasks = ("t2i", "t2v", "i2v", "image_edit", "x2t_image", "x2t_video", "chat")
    published = None
    default = ANSWERS

    def __init__(
        self, making: Making, sizes: Sizes, count: int = 100, clips: int = 10, parts: Sequence[str] = PARTS
    ):
        super().__init__(making)
        self.sizes, self.count, self.clips, self.parts = sizes, count, clips, tuple(parts)
        known = (*PARTS, *WIDE_PARTS)
        unknown = [name for name in self.parts if name not in known]
        if unknown:
            raise InputError(f"unknown parts {', '.join(unknown)}: choose from {', '.join(known)}")
        self._samples = [self._sample(part, case) for part in self.parts for case in self._cases(part)]

    def _cases(self, part: str) -> list[Case]:
        return list(cases(part, self.count, self.clips, self.making.seed, self.sizes))

    def _sample(self, part: str, case: Case) -> Sample:
        return Sample(f"{part}/{case.file}", case.words, (case.seed,), {"part": part, "case": case})

    def entries(self) -> Sequence[Sample]:
        return self._samples

    def samples_of(self, entry: Sample) -> list[Sample]:
        return [entry]

    def orders(self, lance: LancePipeline, sample: Sample, words: str) -> list[Order]:
        return [sample.facts["case"].order(lance, seed, self.making.options) for seed in sample.seeds]

    def write(self, sample: Sample, results: Sequence[Any], path: Path) -> None:
        (result,) = results
        if path.suffix == ".png":
            result.save(path)
        elif path.suffix == ".json":
            save_json({"question": sample.prompt, "answer": result.text}, path)
        else:  # no video codec: the judge sees the pixels that were made
            part = path.with_suffix(".part")
            with part.open("wb") as file:
                np.savez_compressed(file, frames=result.frames)
            part.rename(path)

    def aside(self, sample: Sample) -> dict[str, Any]:
        if not sample.path.endswith(".npz"):
            return {}
        return {sample.path.replace(".npz", ".json"): partial(save_json, {"fps": self.sizes.fps})}

    def check(self, sample: Sample, path: Path) -> None:
        _read(path)

    def score(self, run: Run) -> None:
        lines = []
        for sample in run.bar(self._samples, "judge"):
            marks = sample.facts["case"].judge(_read(run.samples / sample.path))
            plain = {name: None if right is None else bool(right) for name, right in marks.items()}
            lines.append({"name": sample.path, "marks": plain})
        run.judged.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run.judged / "marks.jsonl").write_text(text, encoding="utf-8")

    def aggregate(self, run: Run) -> Scored:
        parts = {sample.path: sample.facts["part"] for sample in self._samples}
        rows = [row for file in written(run, "marks.jsonl") for row in read_lines(file, ("name", "marks"))]
        failures = compare("marks", parts, [row["name"] for row in rows])
        tallies = {part: Tally() for part in self.parts}
        for row in rows:
            for name, right in row["marks"].items():
                tallies[parts[row["name"]]].mark(name, right)
        scores = {part: tally.scores() for part, tally in tallies.items()}
        if scores.get(TAGS_PART):  # as GenEval has it: the plain mean of the tags
            scores[TAGS_PART] = {"overall": float(np.mean(list(scores[TAGS_PART].values())))} | scores[
                TAGS_PART
            ]
        marks = {row["name"]: "wrong" if False in row["marks"].values() else "right" for row in rows}
        return Scored(scores, len(rows), tuple(failures), marks)


def run(
    pipeline: LancePipeline,
    *,
    count: int = 100,
    clips: int = 10,
    seed: int = 1,
    out: Path | None = None,
    parts: Sequence[str] = PARTS,
    quiet: bool = False,
    **settings: object,
) -> dict[str, dict[str, float]]:
    """Scores by part and attribute; "all" means that everything said came out right.

    count: pictures, questions and edits a part; clips: of the motion part. parts: of PARTS and WIDE_PARTS.
    out: folder for `scores.json`, `report.html` and all that was made, which is not made again; without one
    nothing is kept. settings: of SamplingConfig, by name.
    """
    bench = NanoBench(Making(options=settings, seed=seed), pipeline.config.sizes, count, clips, parts)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) if out is None else out
        check_folder(folder / "scores.json")
        this = Run(bench, folder, EvalConfig(), quiet)
        keep_settings(this, {"model": pipeline.config.name})
        failures = make(this, pipeline)
        if failures:
            raise InputError("; ".join(f"{name}: {why}" for name, why in failures.items()))
        check_samples(this)
        bench.score(this)
        scored = finish(this)
        if out is not None:
            write_report(this, scored)
    return scored.scores  # type: ignore[return-value]


def _read(path: Path) -> Any:
    """What a case's judge takes. Raises InputError for a file that cannot be read."""
    if path.suffix == ".png":
        return np.asarray(load_image(path))
    if path.suffix == ".npz":
        return load_video(path).frames
    answer = read_json(path).get("answer")
    if not isinstance(answer, str):
        raise InputError(f"{path}: holds no answer")
    return answer
