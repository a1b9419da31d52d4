"""Reuse between steps: how much is skipped, what that gains, and what it costs.

    python benchmarks/step_cache.py --threads 1                       # nano, on what there is
    python benchmarks/step_cache.py --reuse 0.1 0.2 --orders 0 1 --judged 0

Skipped: share of all branch evaluations that ran the first layer only. Speed: time of denoising without reuse
over that with it, in turns in one process, the medians' ratio. Differences are to the same steps without
reuse, as in solvers.py; "no guidance" is how far that would be, for scale.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from itertools import product
from typing import Any

from machine import about, describe, options, read, write
from solvers import apart, judged, latents, pixels, targets

from openlance import LancePipeline
from openlance.config import SamplingConfig
from openlance.infer.generate import Target


def seconds(lance: LancePipeline, given: list[Target], config: SamplingConfig) -> float:
    """Of denoising each target by itself: what one user waits for."""
    start = time.perf_counter()
    for target in given:
        latents(lance, [target], config)
    return time.perf_counter() - start


def speed(lance: LancePipeline, given: list[Target], config: SamplingConfig, repeats: int) -> float:
    """How many times faster than without reuse."""
    times: dict[float, list[float]] = {0.0: [], config.reuse: []}
    for number in range(repeats + 1):
        for reuse, taken in times.items():
            found = seconds(lance, given, replace(config, reuse=reuse))
            if number:
                taken.append(found)
    plain, quick = (statistics.median(taken) for taken in times.values())
    return plain / quick


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--steps", type=int, help="default: the checkpoint's")
    parser.add_argument("--reuse", type=float, nargs="+", default=[0.05, 0.1, 0.15, 0.2, 0.3])
    parser.add_argument("--orders", type=int, nargs="+", default=[0, 1], help="of reuse")
    parser.add_argument("--repeats", type=int, default=3, help="of the times; 0: none")
    parser.add_argument("--judged", type=int, default=20, help="pictures a part of nano-bench; 0: none")
    args = read(parser)
    lance = LancePipeline.from_pretrained(args.model, device=args.device)
    given, base = targets(lance, args.pictures), lance.config.sampling
    base = replace(base, steps=args.steps or base.steps)
    wanted, _ = latents(lance, given, base)
    seen, rows = pixels(lance, wanted), []
    unguided, _ = latents(lance, given, replace(base, guidance=1.0))
    print("no guidance", apart(lance, unguided, wanted, seen))
    for reuse, order in [(0.0, 0), *product(args.reuse, args.orders)]:
        config = replace(base, reuse=reuse, reuse_order=order)
        row: dict[str, Any] = {"reuse": reuse, "order": order}
        if reuse:
            found, work = latents(lance, given, config)
            assert work.reuse is not None
            ran, of = (sum(counts) for counts in zip(*work.reuse.runs, strict=True))
            row["skipped"] = 1 - ran / of
            if args.repeats:
                row["speed"] = speed(lance, given[:2], config, args.repeats)
            row |= apart(lance, found, wanted, seen)
        if args.judged:
            row |= judged(lance, args.judged, steps=base.steps, reuse=reuse, reuse_order=order)
        rows.append(row)
        print(row, flush=True)
    machine = about(lance.model.device)
    print(describe(machine))
    write(args.out, {"steps": base.steps, "machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
