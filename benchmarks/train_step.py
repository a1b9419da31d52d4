"""A training step of nano in float32 and in bfloat16, in turns in one process: processor time, by part.

Matrices of weights by Muon, as `nano-ct` has it. In bfloat16 the weights stay float32; products, and Muon's
iterations, are in bfloat16. What that brings depends on the processor: whether `lscpu` lists avx512_bf16 or
amx_bf16.

    python benchmarks/train_step.py
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from machine import about, describe, options, read, write

from openlance.model.checkpoint import find_release, load_model
from openlance.train.checkpoint import Checkpoints
from openlance.train.draw import draw_batch, generator_of
from openlance.train.loop import Run, freeze
from openlance.train.losses import Counts
from openlance.train.nano import NanoParts, NanoRecipe, make_parts
from openlance.train.parallel import Ranks, leave, pattern_of, spread
from openlance.train.presets import preset
from openlance.train.settings import PRECISIONS

PARTS = ("data", "forward", "backward", "update")


def begin(parts: NanoParts, precision: str, tokens: int, folder: Path) -> Run:
    """nano about to go on learning, one pack of so many tokens a step."""
    config = replace(preset("nano-ct"), precision=precision, tokens=tokens, lanes=1)
    model = load_model(find_release("nano", None), parts.config)
    freeze(model, config)
    objective = spread(model, config, Ranks(), parts.tokenizer.size)
    return Run(config, objective, parts.feed(config, Ranks()), Ranks(), Checkpoints(folder, 1, Ranks()))


def one_step(run: Run) -> tuple[int, list[float]]:
    """(tokens, seconds of processor time of each of PARTS)."""
    marks = [time.process_time()]

    def mark() -> None:
        marks.append(time.process_time())

    (given,) = run.feed.packs(run.step)
    generator = generator_of(run.config, run.step, given.lane)
    batch, noise = draw_batch(given.samples, run.model_config, run.config, generator)
    mark()
    found = run.objective(batch, noise, Counts.of(batch), pattern_of(batch, run.ranks))
    mark()
    found.total.backward()
    mark()
    torch.nn.utils.clip_grad_norm_(list(run.trained.values()), run.config.clip)
    run.learn(1e-5)
    run.average.update(run.step)
    run.objective.zero_grad(set_to_none=True)
    mark()
    run.step += 1
    return batch.tokens, [end - start for start, end in pairwise(marks)]


def measure(runs: dict[str, Run], rounds: int) -> Iterator[tuple[str, float, list[float]]]:
    """(precision, tokens a second, medians of each part) of steps in turns; the first does not count."""
    found: dict[str, list[tuple[int, list[float]]]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            found[name].append(one_step(run))
    for name, steps in found.items():
        kept = steps[1:]
        tokens, seconds = sum(count for count, _ in kept), sum(sum(parts) for _, parts in kept)
        columns = zip(*(parts for _, parts in kept), strict=True)
        yield name, tokens / seconds, [median(column) for column in columns]


def main() -> None:
    parser = options(__doc__, model=False, threads=1)
    parser.add_argument(
        "--parts",
        type=Path,
        default=Path("runs/bundled-parts"),
        help="of the bundled model; made where there are none",
    )
    parser.add_argument("--tokens", type=int, default=4200, help="of a pack")
    parser.add_argument("--rounds", type=int, default=8, help="steps of each")
    args = read(parser)
    small = NanoRecipe(items=(400, 200, 50, 20, 50, 50, 50, 10, 100))
    parts = make_parts(args.parts, small, release=find_release("nano", None))
    machine = about(torch.device("cpu"))
    print(describe(machine), "\n\n| precision | tokens/s | " + " | ".join(f"{p} (s)" for p in PARTS) + " |")
    print("|---" * (2 + len(PARTS)) + "|")
    record = {}
    with TemporaryDirectory() as folder:
        runs = {p: begin(parts, p, args.tokens, Path(folder)) for p in PRECISIONS}
        for name, rate, seconds in measure(runs, args.rounds):
            record[name] = {"tokens_per_second": rate} | dict(zip(PARTS, seconds, strict=True))
            print(f"| {name} | {rate:.0f} | " + " | ".join(f"{s:.2f}" for s in seconds) + " |")
    leave()
    write(args.out, {"machine": machine, "tokens": args.tokens, "results": record})


if __name__ == "__main__":
    main()
