"""A pack on one process and shared by several, compared: a script that a test starts through torchrun.

    torchrun --nproc-per-node 4 tests/train/context_run.py FOLDER

Process n writes FOLDER/n.json. errors: the largest difference of each output, loss and gradient; kept: bytes
kept for the backward pass, as a share of what one process keeps.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import build_network, clean, compose_task, config, noise, samples, seen, target

from openlance.model.attention import Pattern, Shared, flex_pattern
from openlance.sequence.pack import PackedBatch, pack
from openlance.sequence.template import Task
from openlance.train.losses import Counts, Objective
from openlance.train.parallel import Ranks, join, leave, pattern_of
from openlance.train.settings import TrainConfig


def batches() -> dict[str, PackedBatch]:
    """A long sample; every kind of token and loss; words alone; one token of the gen expert, at the end."""
    clip = compose_task(Task.VIDEO_EDIT, [seen((2, 4, 4)), clean((4, 8, 8)), "Red."], target((4, 8, 8)))
    return {
        "long": pack([clip], config()),
        "all tasks": pack(list(samples().values()), config()),
        "words": pack([samples()["question"], samples()["chat"]], config()),
        "one latent": pack([samples()["chat"], [clean((1, 1, 1))]], config()),
    }


def outcome(objective: Objective, batch: PackedBatch, pattern: Pattern) -> tuple[dict[str, Tensor], int]:
    """What a pack gives, the gradients of this process among it; and bytes kept for the backward pass."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in objective.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            kept[place] = tensor
        return tensor

    objective.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = objective(batch, noise(*batch.latents.shape, seed=5), Counts.of(batch), pattern)
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    found.total.backward()
    out = found.output
    values = {"hidden": out.hidden, "velocity": out.velocity, "ce": found.ce, "mse": found.mse}
    gradients = {f"grad {n}": p.grad for n, p in objective.named_parameters() if p.grad is not None}
    return {name: value.detach().clone() for name, value in (values | gradients).items()}, size


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = join("cpu", int(os.environ["WORLD_SIZE"]))
    objective = Objective(build_network(3), TrainConfig(steps=1))
    errors: dict[str, float] = {}
    kept: dict[str, float] = {}
    for title, batch in batches().items():
        pattern = pattern_of(batch, ranks)
        assert isinstance(pattern, Shared)
        wanted, size = outcome(objective, batch, pattern_of(batch, Ranks()))
        found, own_size = outcome(objective, batch, pattern)
        kept[title] = own_size / size
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            if name.startswith("grad"):  # the mean over the processes, as the sharded network has it
                dist.all_reduce(value)
                value /= ranks.size
            errors[f"{title}: {name}"] = _difference(value, wanted[name])
        with torch.no_grad():
            rows = objective.model(batch)
            flex = objective.model(batch, pattern=Shared(flex_pattern(batch.visibility), pattern.share))
        errors[f"{title}: block mask"] = _difference(flex.hidden, rows.hidden)
    (folder / f"{ranks.rank}.json").write_text(json.dumps({"errors": errors, "kept": kept}))
    leave()


def _difference(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max()) if one.numel() else 0.0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
