"""bfloat16 against float32 on the CPU: time of each piece of work, and what it changes.

    python benchmarks/dtypes.py --threads 1                # nano; worth it where lscpu shows avx512_bf16

Both models take turns in one process; ms of processor time, medians. Pictures are of 20 steps unless the
checkpoint says otherwise; dB is PSNR of bfloat16's pixels against float32's, from the same noise.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from machine import about, describe, options, read, write
from solvers import PROMPTS, apart, latents, pixels, targets

from openlance import LancePipeline
from openlance.infer.generate import Denoising, Target
from openlance.infer.speak import speak

QUESTIONS = ("What colour is the shape?", "How many shapes are there?", "")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Work = Callable[[], Any]


def step(lance: LancePipeline, side: int, frames: int, guided: bool) -> Work:
    """One evaluation of the network: a picture or, of more than one frame, a clip."""
    if frames == 1:
        order = lance.order.generate_image(PROMPTS[0], size=side)
    else:
        order = lance.order.generate_video(PROMPTS[0], size=side, frames=frames)
    grid = order.sample[-1].grid
    assert grid is not None
    noise = torch.randn(*grid, lance.config.vae.channels, generator=torch.Generator().manual_seed(0))
    interval = (0.0, 1.0) if guided else (1.0, 1.0)
    sampling = replace(order.sampling, guidance_interval=interval)
    work = Denoising(lance.model, [Target(order.sample, noise, order.negative)], sampling)
    return lambda: work.velocity(work.start, 0.5)


def decode(lance: LancePipeline, side: int, frames: int) -> Work:
    """The VAE, from latents to pixels."""
    vae, stride = lance.vae, lance.config.vae
    assert vae is not None
    cells = side // stride.spatial_stride
    grid = ((frames - 1) // stride.temporal_stride + 1, cells, cells)
    given = torch.randn(1, *grid, stride.channels).to(vae.dtype)
    return lambda: vae.decode(given)


def words(lance: LancePipeline, count: int) -> Work:
    """So many, whatever they say, after a question without a picture."""
    order, allowed = lance.order.ask("What is a circle?"), lance.tokenizer.size
    config = replace(order.text, max_tokens=count)
    return lambda: list(speak(lance.model, order.sample, config, allowed=allowed, stop=()))


def pieces(lance: LancePipeline) -> dict[str, Work]:
    """What is timed, by name."""
    made: dict[str, Work] = {}
    for name, side, frames in (("96²", 96, 1), ("256²", 256, 1), ("9 frames of 96²", 96, 9)):
        made[f"{name}: step with guidance"] = step(lance, side, frames, guided=True)
        made[f"{name}: step without"] = step(lance, side, frames, guided=False)
        made[f"{name}: decode"] = decode(lance, side, frames)
    made["picture, whole"] = lambda: lance.generate_image(PROMPTS[0], seed=0)
    made["32 words"] = words(lance, 32)
    return made


def times(models: dict[str, LancePipeline], rounds: int) -> list[dict[str, Any]]:
    """One row a piece: ms for each dtype, and how many times faster the second is."""
    works, rows = {name: pieces(lance) for name, lance in models.items()}, []
    for piece in works["float32"]:
        taken: dict[str, list[float]] = {name: [] for name in models}
        for number in range(rounds + 1):
            for name, found in taken.items():
                start = time.process_time()
                works[name][piece]()
                if number:
                    found.append(time.process_time() - start)
        ms = {name: statistics.median(found) * 1e3 for name, found in taken.items()}
        rows.append({"work": piece, **ms, "times faster": ms["float32"] / ms["bfloat16"]})
        print(" | ".join([piece, *(f"{value:.3g}" for value in list(rows[-1].values())[1:])]), flush=True)
    return rows


def changed(models: dict[str, LancePipeline], pictures: int) -> dict[str, Any]:
    """How far pictures and answers are apart."""
    exact, small = models["float32"], models["bfloat16"]
    given, sampling = targets(exact, pictures), exact.config.sampling
    wanted, _ = latents(exact, given, sampling)
    found, _ = latents(small, given, sampling)
    seen, same = pixels(exact, wanted), 0
    shown = [picture.permute(1, 2, 3, 0).add(1).mul(127.5).byte().numpy()[0] for picture in seen]
    asked = [(question, picture) for picture in shown for question in QUESTIONS]
    for question, picture in asked:
        same += exact.ask(question, picture).text == small.ask(question, picture).text
    return {**apart(exact, found, wanted, seen), "same answers": f"{same} of {len(asked)}"}


@torch.inference_mode()
def main() -> None:
    parser = options(__doc__, model=False)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pictures", type=int, default=8)
    args = read(parser)
    models = {
        name: LancePipeline.from_pretrained(args.model, device="cpu", dtype=dtype)
        for name, dtype in DTYPES.items()
    }
    rows = times(models, args.rounds)
    apart_by = changed(models, args.pictures)
    print(apart_by)
    machine = about(torch.device("cpu"))
    print(describe(machine))
    write(args.out, {"rows": rows, "changed": apart_by, "machine": machine})


if __name__ == "__main__":
    main()
