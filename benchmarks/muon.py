"""Muon's update of nano's matrices by several processes: each doing all of it, and each its share, in turns.

OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/muon.py
"""

from __future__ import annotations

import time
from statistics import median

import torch
import torch.distributed as dist
from machine import about, describe, options, read, write

from openlance.config import nano
from openlance.model.lance import Lance
from openlance.train.muon import Muon
from openlance.train.parallel import join, leave


def one_update(optimizer: Muon) -> float:
    """Seconds of the clock until all processes are done."""
    dist.barrier()
    begin = time.perf_counter()
    optimizer.step()
    dist.barrier()
    return time.perf_counter() - begin


def main() -> None:
    parser = options(__doc__, model=False)
    parser.add_argument("--rounds", type=int, default=20)
    args = read(parser)
    ranks = join("cpu")
    torch.manual_seed(0)
    model = Lance(nano())
    matrices = [p for name, p in model.named_parameters() if "layers." in name and p.dim() == 2]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    groups = {"all by each": None, "shared": dist.group.WORLD}
    ways = {
        name: Muon(matrices, 1e-6, like_adamw=True, dtype=torch.bfloat16, processes=group)
        for name, group in groups.items()
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + args.rounds):
        for name, optimizer in ways.items():
            times[name].append(one_update(optimizer))
    if ranks.main:
        seconds = {name: median(found[1:]) for name, found in times.items()}  # the first warms up
        machine = about(ranks.device) | {"processes": ranks.size}
        print(f"{describe(machine)}\n\n| update | seconds | times as fast |\n|---|---|---|")
        for name, value in seconds.items():
            print(f"| {name} | {value:.3f} | {seconds['all by each'] / value:.2f} |")
        write(args.out, {"machine": machine, "seconds": seconds})
    leave()


if __name__ == "__main__":
    main()
