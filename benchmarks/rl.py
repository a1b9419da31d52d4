"""What reinforcement learning does to nano, three seeds: before and after, on prompts that none learnt from.

Measured are composition (the share of a prompt's claims that the world's judge finds true) and whether all
claims are true, of short prompts (GenEval's six kinds) and of captions, drawn as nano-rl learns them (ten
steps without guidance) and as the checkpoint does by default; and whether questions about pictures are
answered exactly. Beside them stand parts of nano-bench, to see what got worse.
Every prompt is drawn from the same noise before and after, and every answer is the likeliest, so that
differences are paired. A run that is stopped goes on.

    python benchmarks/rl.py --steps 60 --out runs/rl-measured
    python benchmarks/rl.py --steps 60 --out runs/rl-words --algorithm words --trains und --ratio-range 0.2
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import about, describe
from PIL.Image import Image

from openlance.data.save import contact_sheet
from openlance.eval.nano_bench import run as bench
from openlance.infer.pipeline import LancePipeline
from openlance.infer.result import Generated
from openlance.rl.prompts import Prompts, Worded, of_questions, of_tags, of_world
from openlance.rl.rewards.simple import composition, everything, exact_match

PARTS = ("one", "two", "questions", "edits")
KINDS: dict[str, Callable[[np.random.Generator], Worded]] = {"short prompts": of_tags, "captions": of_world}
WAYS: dict[str, dict[str, Any]] = {"as learnt": {"guidance": 1.0, "steps": 10}, "by default": {}}
SHORT = 3  # times as many short prompts as captions: most of them are failed, so that more must be asked
SHOWN = 6


def train(steps: int, seed: int, folder: Path, options: Sequence[str]) -> Path:
    """A run of the preset; the folder of the trained model."""
    if not (folder / "model").exists():
        command = [sys.executable, "-m", "openlance", "train", "--preset", "nano-rl", "--resume"]
        own = ["--steps", str(steps), "--seed", str(seed), "--run-dir", str(folder)]
        subprocess.run([*command, *own, "--validate-every", str(steps), *options], check=True)
    return folder / "model"


def measure(model: str | Path, prompts: int, count: int, file: Path) -> dict[str, list[float]]:
    """Numbers of each prompt, by reward, and those of nano-bench's parts; read again if measured before."""
    if file.exists():
        return json.loads(file.read_text())
    lance = LancePipeline.from_pretrained(model, device="cpu")
    found: dict[str, list[float]] = {}
    shown: list[tuple[str, Image]] = []
    for (kind, draw), (way, settings) in product(KINDS.items(), WAYS.items()):
        count_of = SHORT * prompts if draw is of_tags else prompts
        rows = Prompts(draw, lambda words, facts: [], lanes=1, apart=True).held_out(count_of)
        drawn: list[Generated] = []
        for start in range(0, count_of, 10):
            orders = [
                lance.order.generate_image(row.words, seed=number, **settings)
                for number, row in enumerate(rows[start : start + 10], start)
            ]
            drawn += lance.run(orders)  # type: ignore[arg-type]
        words, facts = [row.words for row in rows], [row.metadata for row in rows]
        media = [result.frames for result in drawn]
        found[f"{kind}, {way}: composition"] = list(composition(words, media, facts))
        found[f"{kind}, {way}: everything"] = list(everything(words, media, facts))
        shown += [(row.words, result.image) for row, result in zip(rows[:SHOWN], drawn, strict=False)]
    found["questions: exact answer"] = answers(lance, 2 * prompts)
    for part, scores in bench(lance, count=count, parts=PARTS).items():
        found |= {f"{part}: {name}": [value] for name, value in scores.items() if name in ("all", "kept")}
    contact_sheet(shown).save(file.with_suffix(".png"))
    file.write_text(json.dumps(found))
    return found


def answers(lance: LancePipeline, count: int) -> list[float]:
    """1 for each question about a picture that is answered exactly."""
    side = lance.config.sizes.image
    rows = Prompts(of_questions(side), lambda words, facts: [], lanes=1).held_out(count)
    orders = [lance.order.ask(row.words, row.metadata["picture"], max_tokens=12) for row in rows]
    said = [answer.text for answer in lance.run(orders)]  # type: ignore[arg-type, union-attr]
    return list(exact_match([row.words for row in rows], said, [row.metadata for row in rows]))


def table(before: dict[str, list[float]], after: Sequence[dict[str, list[float]]]) -> str:
    """Means before and after. The error of a change: of the prompts' paired differences, each a mean over the
    seeds, where there are prompts; else of the seeds."""
    lines = [
        "| | before | " + " | ".join(f"seed {seed}" for seed in range(len(after))) + " | change |",
        "|---" * (len(after) + 3) + "|",
    ]
    for name, values in before.items():
        gains = np.array([found[name] for found in after]) - np.array(values)
        each = gains.mean(0) if len(values) > 1 else gains.mean(1)
        error = each.std(ddof=1) / len(each) ** 0.5
        means = " | ".join(f"{np.mean(found[name]):.3f}" for found in after)
        lines.append(f"| {name} | {np.mean(values):.3f} | {means} | {gains.mean():+.3f} ± {error:.3f} |")
    return "\n".join(lines)


def curve(folders: Sequence[Path], file: Path, window: int = 10) -> None:
    """Reward of the pictures that were learnt from, a running mean, for each seed."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 3.5))
    for seed, folder in enumerate(folders):
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        points = [(line["step"], line["reward"]) for line in lines if "reward" in line]
        steps, rewards = np.array(points).T
        width = min(window, len(rewards))
        smooth = np.convolve(rewards, np.ones(width) / width, mode="valid")
        axis.plot(steps[width - 1 :], smooth, label=f"seed {seed}")
    axis.set(xlabel="step", ylabel=f"reward, mean of {window} steps")
    axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/rl-measured"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts")
    parser.add_argument("--count", type=int, default=50, help="of each part of nano-bench")
    args, options = parser.parse_known_args()
    if args.seeds < 2:
        parser.error("a standard error needs two seeds or more")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    print(describe(about(torch.device("cpu"))), flush=True)
    before = measure("nano", args.prompts, args.count, args.out / "before.json")
    folders = [args.out / f"seed-{seed}" for seed in range(args.seeds)]
    after = []
    for seed, folder in enumerate(folders):
        trained = train(args.steps, seed, folder, options)
        after.append(measure(trained, args.prompts, args.count, args.out / f"after-{seed}.json"))
    text = table(before, after)
    (args.out / "rl.md").write_text(text + "\n")
    curve(folders, args.out / "rl.png")
    print(text)


if __name__ == "__main__":
    main()
