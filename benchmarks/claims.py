"""Two claims of the paper (arXiv 2605.18678) at the size of nano, three seeds each.

1. MaPE helps: offsets on the temporal axis keep groups of visual tokens apart, against all offsets zero.
2. Learning several tasks helps drawing: drawing, editing and understanding together, against drawing only,
   for the same number of steps.

Every run begins from nothing, on the frozen parts of nano (`make nano`, or `openlance train --preset
nano-pt`, makes them). What is measured: velocity error on held-out drawings and edits, and what the judge
says of drawings of one and two things. A run that is stopped goes on.

    python benchmarks/claims.py --parts runs/nano-parts --steps 240 --out runs/claims
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from openlance.config import MaPEConfig, ModelConfig
from openlance.data.mixture import Schedule
from openlance.eval.nano_bench import Scores
from openlance.eval.nano_bench import run as bench
from openlance.infer.pipeline import LancePipeline
from openlance.model.lance import Lance
from openlance.sequence.template import Task
from openlance.train.loop import Validation, train
from openlance.train.nano import PRE_TRAINING, NanoParts, make_parts
from openlance.train.nano_data import EncodedWorld, Shares, WorldFeed
from openlance.train.parallel import Ranks
from openlance.train.presets import preset

DRAWING: Shares = {task: PRE_TRAINING[task] for task in (Task.T2I, Task.T2V, Task.I2V)}
ALL = {**PRE_TRAINING, Task.T2I: 0.5, Task.X2T_IMAGE: 0.2, Task.IMAGE_EDIT: 0.23}


@dataclass(frozen=True)
class Variant:
    """A way to train. mape: with the offsets of the checkpoint, or without any."""

    mixture: Shares
    mape: bool = True

    def config(self, base: ModelConfig) -> ModelConfig:
        return base if self.mape else replace(base, mape=MaPEConfig(0, 0, shift_understanding=True))


VARIANTS = {
    "all tasks": Variant(ALL),
    "all tasks, no MaPE": Variant(ALL, mape=False),
    "drawing only": Variant(DRAWING),
}


def one_run(
    parts: NanoParts, variant: Variant, seed: int, steps: int, count: int, folder: Path
) -> dict[str, float]:
    """Train and measure one variant with one seed; what was measured before is read again."""
    file = folder / "scores.json"
    if file.exists():
        return json.loads(file.read_text())
    parts = replace(parts, config=variant.config(parts.config))
    config = replace(
        preset("nano-pt"),
        steps=steps,
        precision="float32",
        ema=0.999,
        compile=True,
        learning_rate=1e-3,
        warmup=min(50, steps // 5),
        schedule="linear",
        lanes=1,
        tokens=2_800,
        seed=seed,
        validate_every=steps,
    )
    feed = WorldFeed(
        EncodedWorld(parts.folder), Schedule.constant(variant.mixture), parts.tokenizer.encode_with_offsets,
        parts.config, config.lanes, config.tokens, Ranks(), seed,
    )  # fmt: skip
    held_out = {name: packs for name, packs in parts.held_out(config).items() if name != "x2t_image"}
    weights = train(parts.new_model(seed), feed, config, folder, resume=True, validation=Validation(held_out))
    measured = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(measured) if any(key.startswith("held_out") for key in line))
    scores = {
        key.split("/")[1] + " error": value for key, value in last.items() if key.startswith("held_out")
    }
    model = Lance(parts.config)
    model.load_state_dict(weights)
    lance = LancePipeline(model, parts.tokenizer, parts.vae)
    for part, found in bench(lance, count=count, parts=("one", "two")).items():
        scores |= {f"{part}: {name}": found[name] for name in ("color", "place", "shape") if name in found}
    file.write_text(json.dumps(scores))
    return scores


def table(found: Mapping[str, list[Scores]]) -> str:
    """Mean and standard error over the seeds, as Markdown."""
    names = list(next(iter(found.values()))[0])
    lines = ["| variant | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for variant, runs in found.items():
        cells = []
        for name in names:
            values = np.array([run[name] for run in runs])
            cells.append(f"{values.mean():.3f} ± {values.std(ddof=1) / len(values) ** 0.5:.3f}")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: Mapping[str, list[Scores]], file: Path) -> None:
    """Means with standard errors, one panel for errors and one for scores."""
    from matplotlib import pyplot

    names = list(next(iter(found.values()))[0])
    panels = ([n for n in names if n.endswith("error")], [n for n in names if not n.endswith("error")])
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), width_ratios=(1, 2))
    for axis, group in zip(axes, panels, strict=True):
        for offset, (variant, runs) in enumerate(found.items()):
            values = np.array([[run[name] for name in group] for run in runs])
            error = values.std(0, ddof=1) / len(runs) ** 0.5
            places = np.arange(len(group)) + 0.25 * (offset - 1)
            axis.bar(places, values.mean(0), 0.25, yerr=error, label=variant, capsize=3)
        axis.set_xticks(range(len(group)), group, rotation=20)
    axes[1].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=Path, default=Path("runs/nano-parts"))
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--count", type=int, default=50, help="pictures of each part of nano-bench")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("a standard error needs two seeds or more")
    torch.set_num_threads(1)
    parts = make_parts(args.parts)
    found: dict[str, list[Scores]] = {name: [] for name in VARIANTS}
    for seed in range(args.seeds):
        for name, variant in VARIANTS.items():
            folder = args.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            found[name].append(one_run(parts, variant, seed, args.steps, args.count, folder))
    text = table(found)
    (args.out / "claims.md").write_text(text + "\n")
    plot(found, args.out / "claims.png")
    print(text)


if __name__ == "__main__":
    main()
