"""VBench (arXiv 2311.17982): sixteen dimensions of clips from words. 946 entries, 5 clips each.

The scorer is the package `vbench`, called once for each dimension; it finds clips by the prompt in their
names and writes one `*_eval_results.json`. The ranges and weights are those of its leaderboard.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from openlance.errors import InputError
from openlance.eval.harness import CLIPS, Benchmark, Making, Run, Sample, check_clip
from openlance.eval.results import Scored
from openlance.eval.scoring import Part, score_parts, written
from openlance.infer.orders import Order
from openlance.infer.pipeline import LancePipeline
from openlance.model.release import read_json

QUALITY = {
    "subject_consistency": 1.0,
    "background_consistency": 1.0,
    "temporal_flickering": 1.0,
    "motion_smoothness": 1.0,
    "aesthetic_quality": 1.0,
    "imaging_quality": 1.0,
    "dynamic_degree": 0.5,
}
"""Weights of the dimensions of quality."""
SEMANTIC = (
    "object_class", "multiple_objects", "human_action", "color", "spatial_relationship", "scene",
    "appearance_style", "temporal_style", "overall_consistency",
)  # fmt: skip
DIMENSIONS = (*QUALITY, *SEMANTIC)
RANGES = {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
}
"""(lowest, highest) of a dimension; (0, 1) for all others."""
FLICKERING = "temporal_flickering"
EACH, FLICKERING_EACH = 5, 25
QUALITY_SHARE = 0.8  # of the total


class VBench(Benchmark):
    """data: `VBench_full_info.json` of the official repository."""

    name = "vbench"
    tasks = ("t2v",)
    published = 946
    default = CLIPS

    def __init__(self, making: Making, limit: int | None = None, data: Path | None = None):
        super().__init__(making, limit)
        if data is None:
            raise InputError("vbench: where is its VBench_full_info.json? See `openlance eval setup vbench`")
        self.data = data

    def entries(self) -> Sequence[dict[str, Any]]:
        """Prompts with all their dimensions: entries of one prompt are one, since they share their clips."""
        merged: dict[str, dict[str, Any]] = {}
        for entry in self._read():
            one = merged.setdefault(
                entry["prompt_en"], {"prompt": entry["prompt_en"], "dimensions": [], "rows": 0}
            )
            one["dimensions"] += [name for name in entry["dimension"] if name not in one["dimensions"]]
            one["rows"] += 1
        return list(merged.values())

    def counted(self) -> int:
        return sum(entry["rows"] for entry in self.chosen())

    def _read(self) -> list[dict[str, Any]]:
        try:
            found = json.loads(self.data.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{self.data}: cannot be read as JSON ({error})") from error
        if not isinstance(found, list) or not found:
            raise InputError(f"{self.data}: must hold a list of entries")
        for entry in found:
            if not isinstance(entry, dict) or not {"prompt_en", "dimension"} <= entry.keys():
                raise InputError(f"{self.data}: an entry needs prompt_en and dimension: {str(entry)[:80]}")
            unknown = sorted(set(entry["dimension"]) - set(DIMENSIONS))
            if unknown:
                raise InputError(f"{self.data}: unknown dimension {', '.join(unknown)}")
        return found

    def samples_of(self, entry: dict[str, Any]) -> list[Sample]:
        prompt, dimensions = entry["prompt"], entry["dimensions"]
        if "/" in prompt or len(prompt.encode()) > 240:
            raise InputError(f"{self.data}: this prompt cannot be the name of a file: {prompt[:80]!r}")
        count = FLICKERING_EACH if FLICKERING in dimensions else EACH
        return [
            Sample(f"{prompt}-{index}.mp4", prompt, (seed,), {"dimensions": dimensions, "index": index})
            for index, seed in enumerate(self.making.seeds(count))
        ]

    def orders(self, lance: LancePipeline, sample: Sample, words: str) -> list[Order]:
        making = self.making
        own = {"size": making.size, "frames": making.frames, **making.options}
        return [lance.order.generate_video(words, seed=seed, **own) for seed in sample.seeds]

    def write(self, sample: Sample, results: Sequence[Any], path: Path) -> None:
        results[0].save(path)

    def check(self, sample: Sample, path: Path) -> None:
        check_clip(path, self.making.size, self.making.frames)

    def score(self, run: Run) -> None:
        parts = []
        for dimension in DIMENSIONS:
            own = self._clips_of(dimension)
            if own:
                info = str(self.data.absolute())
                parts.append(Part(dimension, own, {"dimension": dimension, "info": info}))
        score_parts(run, parts)

    def aggregate(self, run: Run) -> Scored:
        found: dict[str, float] = {}
        failures: list[str] = []
        for file in written(run, "*_eval_results.json"):
            for dimension, value in read_json(file).items():
                if dimension in found:
                    raise InputError(f"judged twice: {dimension}, also in {file}: remove one of the files")
                found[dimension] = _score(file, dimension, value)
                failures += self._unjudged(dimension, value)
        normal = normalise(found)
        parts = {"quality": quality(normal), "semantic": semantic(normal)}
        scores = {"total": total(**parts), **parts}
        percent = {name: 100 * value for name, value in scores.items()}
        raw = {name: 100 * found[name] for name in DIMENSIONS}
        return Scored({**percent, "dimensions": raw}, len(found), tuple(failures))

    def _clips_of(self, dimension: str) -> list[Sample]:
        """What a dimension is judged by: five clips of a prompt, of flickering all."""
        most = FLICKERING_EACH if dimension == FLICKERING else EACH
        return [s for s in self.samples() if dimension in s.facts["dimensions"] and s.facts["index"] < most]

    def _unjudged(self, dimension: str, value: Any) -> list[str]:
        """Clips that the dimension's mean lacks, where the scorer lists what it judged.

        Of flickering the official scorer takes five still clips of the 25; which ones it chooses itself.
        """
        rows = value[1] if isinstance(value, list) and len(value) > 1 and isinstance(value[1], list) else []
        judged = {
            Path(str(row["video_path"])).name for row in rows if isinstance(row, dict) and "video_path" in row
        }
        if not judged:
            return []
        own = self._clips_of(dimension)
        if dimension != FLICKERING:
            return [f"{dimension}: {s.path} is not judged" for s in own if s.path not in judged]
        prompts = {sample.prompt for sample in own}
        counts = {prompt: sum(name.rpartition("-")[0] == prompt for name in judged) for prompt in prompts}
        return [
            f"{dimension}: {count} clips of {prompt!r} are judged, not {EACH} (the others move too much)"
            for prompt, count in sorted(counts.items())
            if count < EACH
        ]


def normalise(scores: Mapping[str, float]) -> dict[str, float]:
    """Each dimension on its range. Raises InputError that names those that are missing or unknown."""
    missing = [name for name in DIMENSIONS if name not in scores]
    unknown = sorted(set(scores) - set(DIMENSIONS))
    if missing or unknown:
        wrong = [f"missing {name}" for name in missing] + [f"unknown {name}" for name in unknown]
        raise InputError(f"no total without every dimension: {', '.join(wrong)}")
    found = {}
    for name in DIMENSIONS:
        low, high = RANGES.get(name, (0.0, 1.0))
        found[name] = (scores[name] - low) / (high - low)
    return found


def quality(normal: Mapping[str, float]) -> float:
    """The weighted mean of the dimensions of quality, normalised."""
    return sum(weight * normal[name] for name, weight in QUALITY.items()) / sum(QUALITY.values())


def semantic(normal: Mapping[str, float]) -> float:
    """The mean of the other dimensions, normalised."""
    return fmean(normal[name] for name in SEMANTIC)


def total(quality: float, semantic: float) -> float:
    """Four parts quality, one part meaning."""
    return QUALITY_SHARE * quality + (1 - QUALITY_SHARE) * semantic


def _score(file: Path, dimension: str, value: Any) -> float:
    """The mean of a dimension, [mean, what each clip has] as the scorer writes it."""
    number = value[0] if isinstance(value, list) and value else value
    if not isinstance(number, int | float) or isinstance(number, bool) or not 0 <= number <= 1:
        raise InputError(f"{file}: {dimension} is {str(number)[:40]}, not a number from 0 to 1")
    return float(number)
