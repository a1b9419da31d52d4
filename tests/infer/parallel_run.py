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
from openlance.infer.generate import Target, denoise_together
from openlance.infer.parallel import denoise_parallel

SAMPLING = SamplingConfig(steps=3, shift=2.0, guidance=3.0)  # guided at first, plain at the end
CASES: dict[str, tuple[list[str], SamplingConfig]] = {
    "one": (["t2i"], SAMPLING),
    "plain": (["t2i"], replace(SAMPLING, guidance=1.0)),
    "fixed frames": (["i2v"], SAMPLING),
    "three branches": (["image_edit"], replace(SAMPLING, visual_guidance=1.5)),
    "several": (["t2i", "i2v", "image_edit"], SAMPLING),
    "solver": (["t2v"], replace(SAMPLING, solver="dpm++2m")),
    "reuse": (["t2v"], replace(SAMPLING, steps=6, reuse=0.1)),
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    record: dict[str, dict[str, float]] = {}
    for spread in ("guidance", "tokens"):
        for name, (tasks, config) in CASES.items():
            if spread == "tokens" and config.reuse:
                continue
            chosen = [samples()[task][:-1] for task in tasks]
            targets = [Target(s, noise(*s[-1].grid, CHANNELS, seed=i)) for i, s in enumerate(chosen)]
            alone = denoise_together(network(), targets, config)
            found = denoise_parallel(network(), targets, config, spread=spread)
            errors = [float((a - b).abs().max()) for a, b in zip(alone, found, strict=True)]
            record.setdefault(spread, {})[name] = max(errors)
            others = [torch.empty_like(found[0]) for _ in range(dist.get_world_size())]
            dist.all_gather(others, found[0].contiguous())
            assert all(torch.equal(other, found[0]) for other in others), "processes differ"
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(record))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
