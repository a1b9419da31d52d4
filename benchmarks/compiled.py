"""torch.compile over the layers of a denoising step: what it gains, what it changes, what compiling costs.

    python benchmarks/compiled.py --threads 1                             # nano, on what there is
    python benchmarks/compiled.py --model ./Lance --device cuda --dtype bfloat16 --ways layers

"whole" compiles all layers as one, "layers" one layer, that all others then share, and "frozen" is whole with
the weights as constants that Inductor packs. Prompts of three lengths: torch makes lengths symbols when they
first change. Compiling is counted in seconds of all its first calls, and of this process's processor time
(the C++ compiler has its own); with an empty folder as TORCHINDUCTOR_CACHE_DIR nothing is there from before,
and a second time everything. Steps are medians of processor time (on a GPU, of wall time) of eager and
compiled in turns; differences are to eager velocities, over their largest.
"""

from __future__ import annotations

import statistics
import time
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from machine import about, describe, options, read, write
from torch import Tensor

from openlance import LancePipeline
from openlance.infer.bench import now
from openlance.infer.generate import Denoising, Target
from openlance.model.cache import KVCache, Workspace
from openlance.model.lance import Halves, Stack, Through

PROMPTS = ("a large red circle", "a small blue square at the left on black", "a star")
WAYS = ("whole", "layers", "frozen")


def compiled(way: str) -> Through:
    """A compiled way through the layers."""
    if way == "layers":
        return by_layer()
    chosen: dict[str, Any] = {"freezing": True} if way == "frozen" else {}

    def whole(stack: Stack, halves: Halves) -> Halves:
        return stack.run(halves)

    return torch.compile(whole, options=chosen)


def by_layer() -> Through:
    """One compiled layer; its number would make it another for each, so it gets a cache of its own."""

    def run(layer: Any, halves: Halves, table: Any, pattern: Any, cache: Workspace) -> Halves:
        return layer(halves, table, pattern, cache, 0)

    one = torch.compile(run)

    def through(stack: Stack, halves: Halves) -> Halves:
        for number, layer in enumerate(stack.layers):
            halves = one(layer, halves, stack.table, stack.pattern, of_layer(stack.cache, number))
        return halves

    return through


def of_layer(cache: KVCache | Workspace | None, number: int) -> Workspace:
    """A workspace of one layer, in the same memory."""
    assert isinstance(cache, Workspace)
    view = copy(cache)
    view._keys, view._values = [cache._keys[number]], [cache._values[number]]
    return view


def denoising(lance: LancePipeline, prompt: str, side: int | None) -> Denoising:
    order = lance.order.generate_image(prompt, size=side)
    grid = order.sample[-1].grid
    assert grid is not None
    noise = torch.randn(*grid, lance.config.vae.channels, generator=torch.Generator().manual_seed(0))
    sampling = replace(order.sampling, guidance_interval=(0.5, 1.0))
    return Denoising(lance.model, [Target(order.sample, noise, order.negative)], sampling)


def evaluate(work: Denoising, guided: bool, through: Through) -> Tensor:
    """Velocities of all branches, [branches, tokens, channels]."""
    return torch.stack(work._pass(guided).velocities(work.start, 0.5, through)[0])


def measure(lance: LancePipeline, way: str, side: int | None, rounds: int) -> list[dict[str, Any]]:
    """One row with guidance and one without."""
    through, rows, device = compiled(way), [], lance.model.device
    for guided in (True, False):
        apart, wall, processor = 0.0, 0.0, 0.0
        for prompt in PROMPTS:
            work = denoising(lance, prompt, side)
            wanted = evaluate(work, guided, Stack.run)
            start = (now(device), time.process_time())
            found = evaluate(work, guided, through)
            wall, processor = wall + now(device) - start[0], processor + time.process_time() - start[1]
            apart = max(apart, float((found - wanted).abs().max() / wanted.abs().max()))
        clock = time.process_time if device.type == "cpu" else lambda: now(device)
        taken: dict[Through, list[float]] = {Stack.run: [], through: []}
        for _ in range(rounds):
            for each, times in taken.items():
                begin = clock()
                evaluate(work, guided, each)
                times.append(clock() - begin)
        eager, quick = (statistics.median(times) * 1e3 for times in taken.values())
        row = {"way": way, "guided": guided, "eager ms": eager, "compiled ms": quick, "ratio": eager / quick}
        rows.append(row | {"compile s": wall, "of processor": processor, "largest difference": apart})
        print({name: round(v, 7) if isinstance(v, float) else v for name, v in rows[-1].items()}, flush=True)
    return rows


@torch.inference_mode()
def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--side", type=int, help="of the picture, in pixels; default: the checkpoint's")
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=["whole", "layers"])
    parser.add_argument("--rounds", type=int, default=30)
    args = read(parser)
    dtype = getattr(torch, args.dtype)
    lance = LancePipeline.from_pretrained(args.model, device=args.device, dtype=dtype)
    rows = [row for way in args.ways for row in measure(lance, way, args.side, args.rounds)]
    machine = about(lance.model.device)
    print(describe(machine))
    write(args.out, {"dtype": args.dtype, "rows": rows, "machine": machine})


if __name__ == "__main__":
    main()
