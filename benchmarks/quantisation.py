"""What weights in fewer bits cost and save, against the same model in bfloat16.

    python benchmarks/quantisation.py --threads 1                     # nano, every scheme
    python benchmarks/quantisation.py --model ./Lance --device cuda --judge 0

Differences: of the network's outputs (hidden states of questions, velocities of pictures on their way) as the
root mean square of the difference over that of bfloat16; of whole pictures, in latents and pixels, as PSNR.
Perplexity: of the right answers to questions about scenes that training never drew. Judge: shares that
nano-bench calls right, of as many pictures and questions (which only nano can do). Time: of one forward, in
turns with bfloat16 in this process.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from machine import about, describe, options, read, write
from torch import Tensor

from openlance import LancePipeline
from openlance.eval import nano_bench
from openlance.model.lance import Lance
from openlance.model.quantize import stored_bytes
from openlance.sequence.pack import PackedBatch, pack
from openlance.sequence.segment import Kind, Role, Sample, Segment
from openlance.world import WorldConfig, question, render, sample_scene
from openlance.world import describe as caption

SCHEMES = ("float32", "int8", "fp8", "int4", "und=int4,gen=int8")
TIMES = (1.0, 0.8, 0.5)  # of the noise in which velocities are compared
SEED = 1_000_003  # of scenes; nano's training draws from others
PEAK = 255.0


def load(model: str, scheme: str | None, device: str) -> LancePipeline:
    if scheme == "float32":
        return LancePipeline.from_pretrained(model, device=device, dtype=torch.float32)
    return LancePipeline.from_pretrained(model, device=device, dtype=torch.bfloat16, quantize=scheme)


def questions(lance: LancePipeline, count: int) -> list[Sample]:
    """Questions about pictures with their right answers."""
    rng, samples = np.random.default_rng(SEED), []
    for _ in range(count):
        scene = sample_scene(rng, WorldConfig())
        asked = question(scene, rng)
        order = lance.order.ask(asked.question, render(scene, lance.config.sizes.image))
        ids = torch.tensor([*lance.tokenizer.encode(asked.answer), lance.config.tokens.im_end])
        samples.append([*order.sample, Segment(Kind.TEXT, Role.ANSWER, ids)])
    return samples


def captions(count: int) -> list[str]:
    rng = np.random.default_rng(SEED)
    return [caption(sample_scene(rng, WorldConfig()), rng)[0] for _ in range(count)]


def draw(lance: LancePipeline, words: Sequence[str], steps: int | None) -> list[tuple[Tensor, np.ndarray]]:
    """(latents, pixels) of whole pictures."""
    settings = {} if steps is None else {"steps": steps}
    orders = [lance.order.generate_image(text, seed=seed, **settings) for seed, text in enumerate(words)]
    last: dict[int, Tensor] = {}
    made = lance.run(orders, on_step=lambda step: last.update({step.order: step.latents.cpu()}) or True)
    return [(last[index], result.frames) for index, result in enumerate(made)]  # type: ignore[union-attr]


def on_the_way(lance: LancePipeline, words: Sequence[str], ends: Sequence[Tensor], t: float) -> PackedBatch:
    """Pictures at time t, between noise and where bfloat16 led."""
    samples = []
    for seed, (text, clean) in enumerate(zip(words, ends, strict=True)):
        sample = lance.order.generate_image(text, seed=seed).sample
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
        samples.append([*sample[:-1], replace(sample[-1], latents=(1 - t) * clean + t * noise)])
    return pack(samples, lance.config, times=[t] * len(samples))


@torch.inference_mode()
def outputs(model: Lance, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """(hidden states, velocities)"""
    out = model(batch.to(model.device, model.dtype))
    return out.hidden.float(), out.velocity.float()


@torch.inference_mode()
def perplexity(model: Lance, batch: PackedBatch, allowed: int) -> float:
    hidden, _ = outputs(model, batch)
    logits = model.head(hidden[batch.answer_index].to(model.dtype))[:, :allowed].float()
    return float(F.cross_entropy(logits, batch.answer_labels.to(logits.device)).exp())


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def psnr(found: np.ndarray, wanted: np.ndarray, peak: float) -> float:
    error = float(np.square(found.astype(float) - wanted).mean())
    return 10 * math.log10(peak**2 / error) if error else math.inf


def in_turns(first: Lance, second: Lance, batch: PackedBatch, repeats: int) -> float:
    """Median seconds of the second's forward over the first's."""
    times: dict[Lance, list[float]] = {first: [], second: []}
    for _ in range(repeats + 1):
        for model, found in times.items():
            start = time.perf_counter()
            outputs(model, batch)[1].cpu()
            found.append(time.perf_counter() - start)
    one, two = (statistics.median(times[model][1:]) for model in (first, second))
    return two / one


class Reference:
    """The model in bfloat16, and what it gives."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.lance = load(args.model, None, args.device)
        self.asked = pack(questions(self.lance, args.questions), self.lance.config)
        self.words = captions(args.pictures)
        self.made = draw(self.lance, self.words, args.steps)
        ends = [latents for latents, _ in self.made]
        self.pictures = [on_the_way(self.lance, self.words, ends, t) for t in TIMES]
        self.hidden, _ = outputs(self.lance.model, self.asked)
        self.velocities = [outputs(self.lance.model, batch)[1] for batch in self.pictures]

    def row(self, lance: LancePipeline) -> dict[str, float | str]:
        model = lance.model
        hidden, _ = outputs(model, self.asked)
        velocities = [outputs(model, batch)[1] for batch in self.pictures]
        made = self.made if lance is self.lance else draw(lance, self.words, self.args.steps)
        pairs = list(zip(made, self.made, strict=True))
        spread = float(torch.cat([latents.flatten() for latents, _ in self.made]).std())
        found: dict[str, float | str] = {
            "weights (MB)": sum(stored_bytes(weight) for weight in model.parameters()) / 1e6,
            "hidden": apart(hidden, self.hidden),
            "velocity": apart(torch.cat(velocities), torch.cat(self.velocities)),
            "latents (dB)": statistics.mean(
                psnr(new.numpy(), old.numpy(), spread) for (new, _), (old, _) in pairs
            ),
            "pixels (dB)": statistics.mean(psnr(new, old, PEAK) for (_, new), (_, old) in pairs),
            "perplexity": perplexity(model, self.asked, lance.tokenizer.size),
            "time": in_turns(self.lance.model, model, self.pictures[0], self.args.repeats),
        }
        if self.args.judge:
            scores = nano_bench.run(
                lance, count=self.args.judge, parts=self.args.parts, steps=self.args.steps, quiet=True
            )
            found |= {part: scores[part]["all"] for part in self.args.parts}
        return found


def table(results: dict[str, dict[str, float | str]]) -> str:
    names = list(next(iter(results.values())))
    lines = ["| weights | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for scheme, found in results.items():
        lines.append(f"| {scheme} | " + " | ".join(f"{found[name]:.3g}" for name in names) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--pictures", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--judge", type=int, default=30, help="of each part; 0: none")
    parser.add_argument("--parts", nargs="+", default=["one", "questions"])
    parser.add_argument("--repeats", type=int, default=5)
    args = read(parser)
    reference = Reference(args)
    results = {"bfloat16": reference.row(reference.lance)}
    print(results, flush=True)
    for scheme in args.schemes:
        results[scheme] = reference.row(load(args.model, scheme, args.device))
        print(scheme, results[scheme], flush=True)
    machine = about(reference.lance.model.device)
    print(f"\n{reference.lance.config.name}; {describe(machine)}\n\n{table(results)}")
    write(args.out, {"machine": machine, "results": results})


if __name__ == "__main__":
    main()
