"""Denoising spread over processes, compared with one: a script that a test starts through torchrun.

    torchrun --nproc-per-node 2 tests/infer/parallel_run.py FOLDER

Process n writes FOLDER/n.json: the largest difference of each case, by what is spread.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import CHANNELS, network, noise, samples

from openlance.config import SamplingConfig
from openlance.errors import InputError
from openlance.infer.generate import Cancelled, OnStep, Target, denoise_together
from openlance.infer.parallel import denoise_parallel

SAMPLING = SamplingConfig(steps=3, shift=2.0, guidance=3.0)  # guided at first, plain at the end
LONG = SamplingConfig(steps=10, shift=2.0, guidance=3.0, guidance_interval=(0.3, 0.9))
SEVERAL = ["t2i", "i2v", "image_edit"]
CASES: dict[str, tuple[list[str], SamplingConfig]] = {
    "one": (["t2i"], SAMPLING),
    "plain": (["t2i"], replace(SAMPLING, guidance=1.0)),
    "fixed frames": (["i2v"], SAMPLING),
    "three branches": (["image_edit"], replace(SAMPLING, visual_guidance=1.5)),
    "several": (SEVERAL, SAMPLING),
    "solver": (["t2v"], replace(SAMPLING, solver="dpm++2m")),
    # Thresholds between the changes of two branches, so that each alone would decide otherwise.
    "reuse": (["image_edit"], replace(LONG, reuse=0.1065)),
    "reuse of three branches": (["image_edit"], replace(LONG, reuse=0.1, visual_guidance=1.5)),
    "reuse of several": (SEVERAL, replace(LONG, reuse=0.1, reuse_order=1)),
}


def targets_of(tasks: list[str], seed: int = 0) -> list[Target]:
    chosen = [samples()[task][:-1] for task in tasks]
    return [Target(s, noise(*s[-1].grid, CHANNELS, seed=seed + i)) for i, s in enumerate(chosen)]


def with_long_negative() -> list[Target]:
    """Of two targets, the one with the shorter condition has the longer sample to move away from."""
    first, second = targets_of(["t2i", "image_edit"])
    words = first.sample[:-1]
    return [replace(first, negative=[*words * 8, first.segment]), second]


def difference(targets: list[Target], config: SamplingConfig, spread: str) -> float:
    """From what one process makes; asserts that all processes have the same."""
    alone = denoise_together(network(), targets, config)
    found = denoise_parallel(network(), targets, config, spread=spread)
    others = [torch.empty_like(found[0]) for _ in range(dist.get_world_size())]
    dist.all_gather(others, found[0].contiguous())
    assert all(torch.equal(other, found[0]) for other in others), "processes differ"
    return max(float((a - b).abs().max()) for a, b in zip(alone, found, strict=True))


def stopped(spread: str) -> float:
    """The last process alone stops the second of three targets: it ends on all, and the others go on."""
    last = dist.get_rank() == dist.get_world_size() - 1
    on_step: OnStep | None = (lambda step: (step.number, step.order) != (2, 1)) if last else None
    targets = targets_of(SEVERAL)
    first, second, third = denoise_parallel(network(), targets, SAMPLING, on_step, spread=spread)
    assert isinstance(second, Cancelled) and str(second) == "stopped after step 2 of 3"
    alone = denoise_together(network(), targets, SAMPLING)
    return max(float((a - b).abs().max()) for a, b in ((alone[0], first), (alone[2], third)))


def refused(spread: str, seed: int) -> str:
    """What is said where every process has a seed of its own."""
    try:
        denoise_parallel(network(), targets_of(["t2i"], seed), SAMPLING, spread=spread)
    except InputError as error:
        return str(error)
    return "nothing"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    record: dict[str, dict[str, float]] = {}
    for spread in ("guidance", "tokens"):
        found = record[spread] = {}
        for name, (tasks, config) in CASES.items():
            if spread == "guidance" or not config.reuse:
                found[name] = difference(targets_of(tasks), config, spread)
        found["long negative"] = difference(with_long_negative(), SAMPLING, spread)
        found["stopped"] = stopped(spread)
        why = refused(spread, seed=dist.get_rank())
        assert why == "the processes ask for different things: give each the same seed", why
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(record))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
