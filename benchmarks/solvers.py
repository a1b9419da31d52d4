"""Solvers: how far few steps end from Euler's many, and what the judge says of few.

    python benchmarks/solvers.py --threads 1                          # nano, on what there is
    python benchmarks/solvers.py --steps 5 10 --shifts 3 1 --judge-steps

Difference: relative RMS of the latents (‖a − b‖ / ‖b‖) and PSNR of the pixels, against Euler at 100 steps and
the checkpoint's shift, from the same noise; medians over the pictures, and in brackets the worst, since some
pictures go another way altogether. Judge: share of pictures in which all that was said is right, of
nano-bench's parts "one" and "two".
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import torch
from machine import about, describe, options, read, write
from torch import Tensor

from openlance import LancePipeline
from openlance.config import SOLVERS, SamplingConfig
from openlance.eval.nano_bench import run as judge
from openlance.flow.multistep import SOLVERS as SOLVE
from openlance.flow.path import time_grid
from openlance.infer.generate import Denoising, Target

PROMPTS = (
    "a large red circle on white", "a small blue square at the left on black",
    "a green star and a yellow triangle", "a star at the top left",
)  # fmt: skip
REFERENCE = 100


def targets(lance: LancePipeline, count: int) -> list[Target]:
    """Pictures to make: each prompt with seeds that count up."""
    made = []
    for number in range(count):
        order = lance.order.generate_image(PROMPTS[number % len(PROMPTS)], seed=number)
        grid = order.sample[-1].grid
        assert grid is not None
        generator = torch.Generator().manual_seed(number)
        made.append(Target(order.sample, torch.randn(*grid, lance.config.vae.channels, generator=generator)))
    return made


@torch.inference_mode()
def latents(lance: LancePipeline, given: list[Target], config: SamplingConfig) -> tuple[Tensor, Denoising]:
    """[pictures, frames, rows, columns, channels], and what they were denoised with."""
    work = Denoising(lance.model, given, config)
    *_, end = SOLVE[config.solver](work.velocity, work.start, time_grid(config.steps, config.shift))
    return torch.stack(work.latents(end)), work


@torch.inference_mode()
def pixels(lance: LancePipeline, found: Tensor) -> Tensor:
    """In [-1, 1], of latents [pictures, …]."""
    assert lance.vae is not None
    weight = next(lance.vae.parameters())
    return torch.cat([lance.vae.decode(one[None].to(weight)).clamp(-1, 1) for one in found])


def psnr(found: Tensor, wanted: Tensor) -> float:
    """In dB, of pixels in [-1, 1]."""
    error = float((found - wanted).square().mean())
    return 10 * math.log10(4 / error) if error else math.inf


def apart(lance: LancePipeline, found: Tensor, wanted: Tensor, seen: Tensor) -> dict[str, str]:
    """How far latents are from others, and their pixels from those of the others (`seen`)."""
    pairs = list(zip(found, wanted, strict=True))
    shares = [float((a - b).norm() / b.norm()) for a, b in pairs]
    decibels = [psnr(a, b) for a, b in zip(pixels(lance, found), seen, strict=True)]
    return {
        "latents": f"{statistics.median(shares):.4f} ({max(shares):.3f})",
        "dB": f"{statistics.median(decibels):.1f} ({min(decibels):.1f})",
    }


def compare(lance: LancePipeline, given: list[Target], steps: list[int], shifts: list[float]) -> list[Any]:
    """One row for each number of steps, shift and solver."""
    base, rows = lance.config.sampling, []
    wanted, _ = latents(lance, given, replace(base, steps=REFERENCE, solver="euler"))
    seen = pixels(lance, wanted)
    for shift in shifts:
        for count in steps:
            for solver in SOLVERS:
                found, _ = latents(lance, given, replace(base, steps=count, solver=solver, shift=shift))
                row = {"shift": shift, "steps": count, "solver": solver}
                rows.append(row | apart(lance, found, wanted, seen))
                print(rows[-1], flush=True)
    return rows


def judged(lance: LancePipeline, count: int, **settings: object) -> dict[str, float]:
    """What the judge says of pictures made with some settings."""
    parts = ("one", "two")
    scores = judge(lance, count=count, parts=parts, quiet=True, **settings)
    return {part: scores[part]["all"] for part in parts}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10, 15, 20, 30])
    parser.add_argument("--shifts", type=float, nargs="+", help="default: the checkpoint's")
    parser.add_argument("--judge-steps", type=int, nargs="*", default=[4, 8])
    parser.add_argument("--judged", type=int, default=20, help="pictures a part of nano-bench")
    args = read(parser)
    lance = LancePipeline.from_pretrained(args.model, device=args.device)
    shifts = args.shifts or [lance.config.sampling.shift]
    rows = compare(lance, targets(lance, args.pictures), args.steps, shifts)
    scores = []
    for shift in shifts:
        for count in args.judge_steps:
            for solver in SOLVERS:
                settings = {"steps": count, "solver": solver, "shift": shift}
                scores.append({**settings, **judged(lance, args.judged, **settings)})
                print(scores[-1], flush=True)
    machine = about(lance.model.device)
    print(describe(machine))
    write(args.out, {"machine": machine, "rows": rows, "judge": scores})


if __name__ == "__main__":
    main()
