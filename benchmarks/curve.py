"""How a model of the world came to be: held-out errors over its stages, and what it can do after each.

The stages are those that `make nano` leaves in runs/; their models are scored by parts of nano-bench.

    python benchmarks/curve.py runs/nano-pt runs/nano-ct runs/nano-sft --plot docs/nano_curve.png
"""

from __future__ import annotations

import json
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from machine import about, describe, options, read, write

from openlance.eval.nano_bench import run as bench
from openlance.infer.pipeline import LancePipeline

PARTS = ("one", "two", "questions", "edits", "motion")
ERRORS = {
    "held_out/t2i/mse": "pictures from words: velocity error",
    "held_out/image_edit/mse": "edits: velocity error",
    "held_out/x2t_image/ce": "answers: cross-entropy",
}


def errors(folders: list[Path]) -> tuple[dict[str, list[tuple[int, float]]], list[int]]:
    """((step, value) of each held-out error, with the stages one after the other; where each stage ends)."""
    found, ends = defaultdict(list), [0]
    for folder in folders:
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for line in lines:
            for key in ERRORS.keys() & line.keys():
                found[key].append((ends[-1] + line["step"], line[key]))
        ends.append(ends[-1] + lines[-1]["step"])
    return dict(found), ends[1:]


def scores(folder: Path, count: int, clips: int) -> dict[str, float]:
    """What the model that a stage has left can do."""
    lance = LancePipeline.from_pretrained(folder / "model")
    found = bench(lance, count=count, clips=clips, parts=PARTS)
    motion = {name: value for name, value in found.pop("motion").items() if name != "question"}
    return {part: values["all"] for part, values in found.items()} | {
        f"motion, {name}": value for name, value in motion.items()
    }


def plot(record: dict[str, Any], file: Path) -> None:
    """Errors on the left, scores after each stage on the right."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for key, label in ERRORS.items():
        left.plot(*zip(*record["errors"][key], strict=True), label=label)
    for end in record["ends"][:-1]:
        left.axvline(end, color="gray", linestyle=":")
    left.set_yscale("log")
    left.set_xlabel("step; dotted: where a stage ends")
    left.legend()
    names = list(record["scores"])
    for part in record["scores"][names[0]]:
        right.plot(names, [record["scores"][name][part] for name in names], marker="o", label=part)
    right.set_ylim(0, 1)
    right.set_ylabel("share right")
    right.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = options(__doc__, model=False, threads=1)
    parser.add_argument("stages", nargs="+", type=Path, help="folders of runs, in their order")
    parser.add_argument("--count", type=int, default=100, help="pictures of each part of nano-bench")
    parser.add_argument("--clips", type=int, default=10)
    parser.add_argument("--plot", type=Path, help="PNG file")
    args = read(parser)
    if args.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    found, ends = errors(args.stages)
    record: dict[str, Any] = {
        "machine": about(torch.device("cpu")),
        "errors": found,
        "ends": ends,
        "scores": {folder.name: scores(folder, args.count, args.clips) for folder in args.stages},
    }
    print(describe(record["machine"]))
    for name, values in record["scores"].items():
        print(name, ", ".join(f"{part} {value:.2f}" for part, value in values.items()))
    write(args.out, record)
    if args.plot:
        plot(record, args.plot)


if __name__ == "__main__":
    main()
