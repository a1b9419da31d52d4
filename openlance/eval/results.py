"""What a benchmark comes to: one JSON file and a table."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from openlance import __version__
from openlance.data.save import save_json
from openlance.errors import InputError
from openlance.eval.harness import Run
from openlance.model.release import read_json, some

Scores = Mapping[str, float | Mapping[str, float]]


@dataclass(frozen=True)
class Scored:
    """Numbers and what they are of.

    scores: by name, or by name within a group. judged: entries that they are the mean of. failures: what has
    no score, and why. marks: what the gallery says of a sample, by its path.
    """

    scores: Scores
    judged: int
    failures: tuple[str, ...] = ()
    marks: Mapping[str, str] = field(default_factory=dict)


def finish(run: Run, *, allow_failures: bool = False) -> Scored:
    """Aggregate, and write `scores.json`.

    Raises InputError where anything has no score, unless that is allowed; then the file says what, and that
    it is not complete.
    """
    scored = run.benchmark.aggregate(run)
    if scored.failures and not allow_failures:
        raise InputError(
            f"{len(scored.failures)} without a score, so there is no result (--allow-failures averages over "
            f"the rest): {'; '.join(scored.failures[:3])}"
        )
    save_json(record(run, scored), run.folder / "scores.json")
    return scored


def record(run: Run, scored: Scored) -> dict[str, Any]:
    """All that `scores.json` holds."""
    settings = run.folder / "settings.json"
    scorer = run.judged / "scorer.json"
    entries, published = run.benchmark.counted(), run.benchmark.published
    return {
        "benchmark": run.benchmark.name,
        "scores": scored.scores,
        "as_published": run.as_published,
        "complete": not scored.failures,
        "whole_benchmark": published in (None, entries),
        "counts": {
            "published": published,
            "entries": entries,
            "judged": scored.judged,
            "failures": len(scored.failures),
        },
        "failures": list(scored.failures),
        "version": __version__,
        "commit": commit(),
        "scorer": read_json(scorer) if scorer.is_file() else None,
        "settings": read_json(settings) if settings.is_file() else None,
    }


def commit() -> str | None:
    """Of the checkout that this package is in, "+" where files differ from it; None where there is none."""
    folder = Path(__file__).parent
    try:
        found = [
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "."))
        ]
    except OSError:
        return None  # no git on this machine
    if any(done.returncode for done in found):
        return None
    return found[0].stdout.strip() + ("+" if found[1].stdout.strip() else "")


def table(scores: Scores) -> str:
    """The scores as a Markdown table: one row for each that stands alone, one for each group."""
    lines = ["| part | scores |", "|---|---|"]
    for name, value in scores.items():
        cells = (
            ", ".join(f"{part.replace('_', ' ')} {number:.2f}" for part, number in value.items())
            if isinstance(value, Mapping)
            else f"{value:.4g}"
        )
        lines.append(f"| {name.replace('_', ' ')} | {cells} |")
    return "\n".join(lines)


def warnings(run: Run) -> list[str]:
    """What a reader must know before any number."""
    found = read_json(run.folder / "scores.json")
    counts, said = found["counts"], []
    if (found["scorer"] or {}).get("stand_in"):
        said.append("Scored by a stand-in: these numbers mean nothing.")
    if not found["complete"]:
        said.append(f"Not complete: {counts['failures']} have no score and are left out.")
    if not found["whole_benchmark"]:
        said.append(f"Not the whole benchmark: {counts['entries']} of {counts['published']} entries.")
    return said


def mean_by(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The mean of the values of each name, in the order in which names come first."""
    found: dict[str, list[float]] = {}
    for name, value in pairs:
        found.setdefault(name, []).append(float(value))
    return {name: fmean(values) for name, values in found.items()}


def compare(what: str, wanted: Iterable[str], found: Iterable[str]) -> list[str]:
    """What is wrong with the names that were judged: missing, judged twice, or not asked for."""
    times = Counter(found)
    known, seen = set(wanted), set(times)
    failures = [f"{name}: no {what}" for name in sorted(known - seen)]
    twice = sorted(name for name, count in times.items() if count > 1)
    if twice:
        raise InputError(f"judged twice: {some(twice, 3)}: remove one of the files in judged/")
    if seen - known:
        raise InputError(f"judged, but no sample of this run: {some(sorted(seen - known), 3)}")
    return failures
