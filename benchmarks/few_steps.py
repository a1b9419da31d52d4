"""What a distilled adapter is worth: nano in few steps with it, without it, and in many steps with guidance.

Each way is judged by parts of nano-bench on the same prompts from the same noise, and timed on pictures drawn
one after the other, beside the others in the same run. An evaluation is one branch of one step through the
network.

    openlance train --preset nano-distill
    python benchmarks/few_steps.py --adapter runs/nano-distill/adapter
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from machine import about, describe

from openlance.data.save import contact_sheet
from openlance.eval.nano_bench import run as bench
from openlance.flow.guidance import guided_now
from openlance.flow.path import time_grid
from openlance.infer.pipeline import LancePipeline

PARTS = ("one", "two", "edits", "motion")
SHOWN = (
    "a large red circle on white",
    "a small blue star at the top left and a green ring at the right on black",
)


def evaluations(lance: LancePipeline) -> int:
    """Of one picture from words, both branches."""
    chosen = lance.config.sampling
    times = time_grid(chosen.steps, chosen.shift)[:-1].tolist()
    return sum(1 + (chosen.guidance != 1 and guided_now(chosen, t)) for t in times)


def measure(lance: LancePipeline, count: int, clips: int, repeats: int) -> dict[str, float]:
    """Scores of nano-bench's parts, and seconds of a picture."""
    seconds = []
    for seed in range(repeats + 1):
        start = time.perf_counter()
        lance.generate_image(SHOWN[0], seed=seed)
        seconds.append(time.perf_counter() - start)
    scores = bench(lance, count=count, clips=clips, parts=PARTS)
    found = {f"{part}: {name}": scores[part][name] for part in ("one", "two") for name in ("all", "shape")}
    found |= {f"edits: {name}": scores["edits"][name] for name in ("all", "kept")}
    moved = {f"motion: {name}": value for name, value in scores["motion"].items()}
    return {"evaluations": evaluations(lance), "seconds": statistics.median(seconds[1:])} | found | moved


def table(found: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(found.values())))
    lines = ["| way | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for way, values in found.items():
        cells = [f"{v:.3f}" if name == "seconds" else f"{v:.3g}" for name, v in values.items()]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", required=True, help="a folder, or the name of a bundled one")
    parser.add_argument("--out", type=Path, default=Path("runs/few-steps"))
    parser.add_argument("--count", type=int, default=100, help="pictures and edits of each part")
    parser.add_argument("--clips", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=10, help="pictures that are timed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    print(describe(about(torch.device("cpu"))), flush=True)
    lance = LancePipeline.from_pretrained("nano", device="cpu")
    own = lance.config.sampling
    lance.load_adapter(args.adapter)
    few = lance.config.sampling
    lance.merge_adapters()  # no cost any more
    plain = LancePipeline.from_pretrained("nano", device="cpu")
    ways = {
        "as bundled": (plain, own),
        "few steps, guided": (plain, replace(own, steps=few.steps)),
        "few steps": (plain, few),
        "few steps, distilled": (lance, few),
    }
    found, shown = {}, []
    for way, (pipeline, sampling) in ways.items():
        pipeline.model.config = replace(pipeline.model.config, sampling=sampling)
        found[way] = measure(pipeline, args.count, args.clips, args.repeats)
        shown += [(way, pipeline.generate_image(words, seed=3).image) for words in SHOWN]
        (args.out / "few-steps.json").write_text(json.dumps(found))
    contact_sheet(shown).save(args.out / "few-steps.png")
    (args.out / "few-steps.md").write_text(table(found) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
