"""Newton-Schulz iterations on nano's matrices: all of one shape stacked, against one after the other.

On the CPU `openlance.train.muon` takes them one by one, on accelerators stacked.

    python benchmarks/muon.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from machine import about, describe
from torch import Tensor

from openlance.config import nano
from openlance.model.experts import EXPERTS
from openlance.model.lance import Lance
from openlance.train.muon import orthogonal


def seconds(run: Callable[[], object], repeats: int) -> float:
    """The fastest of some runs."""
    run()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(describe(about(torch.device("cpu"))))
    model = Lance(nano(), EXPERTS)
    groups: dict[tuple[int, ...], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if name.startswith("layers.") and parameter.dim() == 2:
            groups.setdefault(tuple(parameter.shape), []).append(torch.randn(parameter.shape))
    stacked = seconds(lambda: [orthogonal(torch.stack(group)) for group in groups.values()], args.repeats)
    single = seconds(lambda: [[orthogonal(m) for m in group] for group in groups.values()], args.repeats)
    count = sum(map(len, groups.values()))
    print(
        f"{count} matrices: stacked {stacked:.2f} s, one by one {single:.2f} s, ratio {stacked / single:.2f}"
    )


if __name__ == "__main__":
    main()
