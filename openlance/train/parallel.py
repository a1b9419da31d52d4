"""One process or many: who they are, what they add up, and how the network is spread over them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from openlance.errors import InputError
from openlance.model.attention import Pattern, Rows, Shared, flex_pattern
from openlance.model.context_parallel import Share
from openlance.model.lance import Lance
from openlance.sequence.pack import PackedBatch
from openlance.train.losses import Objective
from openlance.train.settings import TrainConfig

PATIENCE = timedelta(hours=3)
"""How long processes on CPU wait for each other: the frozen parts of nano are made by the first one alone."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. device: its own.

    group: the processes that share each pack with it (context parallelism); None where it has its packs
    alone. Those of a group follow each other; `data_rank` of `data_size` is which packs the group has.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: dist.ProcessGroup | None = None

    @property
    def context(self) -> int:
        """How many processes share each pack."""
        return 1 if self.group is None else self.group.size()

    @property
    def leads(self) -> bool:
        """Whether this is the first of the processes that share a pack."""
        return self.rank % self.context == 0

    @property
    def data_rank(self) -> int:
        return self.rank // self.context

    @property
    def data_size(self) -> int:
        return self.size // self.context

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Each value added up over all processes."""
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers)
        return numbers.tolist()

    def once(self, values: Sequence[float]) -> list[float]:
        """What this process adds to a total over packs: of those that share a pack, the first has it."""
        return list(values) if self.leads else [0.0] * len(values)

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in the order of ranks, on every process."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found


def join(device: str | None = None, context: int = 1) -> Ranks:
    """Join the run that torchrun started; a process that it did not start is a run of its own.

    device: "cpu" or "cuda"; default CUDA where there is one. context: processes that share each pack. Raises
    InputError for CUDA that is not there, and for processes that do not fill groups of `context`.
    """
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device: use --device cpu")
    if (size := int(os.environ.get("WORLD_SIZE", 1))) % context:
        raise InputError(f"packs cannot be shared by {context} processes each: {size} is no multiple")
    own = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if wanted == "cuda" else "cpu")
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if "RANK" not in os.environ:
        return Ranks(device=own)
    if not dist.is_initialized():
        backend, patience = ("cpu:gloo,cuda:nccl", None) if own.type == "cuda" else ("gloo", PATIENCE)
        dist.init_process_group(backend, timeout=patience)
    group = dist.new_subgroups(context)[0] if context > 1 else None
    return Ranks(dist.get_rank(), dist.get_world_size(), own, group)


def leave() -> None:
    """End what `join` or `spread` began."""
    if dist.is_initialized():
        dist.destroy_process_group()


def spread(model: Lance, config: TrainConfig, ranks: Ranks, vocabulary: int | None = None) -> Objective:
    """The network ready for training: on its device, what does not train frozen, spread over the processes.

    Sharding is FSDP2's (`torch.distributed.fsdp.fully_shard`): each process holds its share of every float32
    parameter, and gathers a layer at a time in the dtype of the computation. One process in float32 needs
    none of it. Raises InputError for lanes, replicas and heads that the processes cannot share evenly.
    """
    if config.context != ranks.context:
        raise InputError(f"context is {config.context}: join the run with join(context={config.context})")
    if config.lanes % ranks.data_size:
        groups = f" in groups of {ranks.context}" if ranks.context > 1 else ""
        raise InputError(f"{config.lanes} lanes cannot be shared evenly by {ranks.size} processes{groups}")
    if (heads := model.config.backbone.heads) % ranks.context:
        raise InputError(f"context {ranks.context}: the {heads} heads of attention cannot be shared evenly")
    if config.optimizer == "muon" and ranks.size > config.replicas:
        raise InputError(f"muon needs whole matrices on each process: use --replicas {ranks.size}")
    if ranks.size % config.replicas:
        raise InputError(f"{ranks.size} processes cannot hold {config.replicas} replicas of equal size")
    model.to(ranks.device)
    objective = Objective(model, config, vocabulary)
    for layer in model.layers:
        if config.checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if config.compile:
            layer.compile(dynamic=True)  # no two packs are of one length
    if ranks.size == 1 and config.precision == "float32":
        return objective
    if not dist.is_initialized():
        file = tempfile.NamedTemporaryFile(prefix="openlance-", delete=False)  # noqa: SIM115 (the group keeps it)
        dist.init_process_group("cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo",
                                store=dist.FileStore(file.name, 1), rank=0, world_size=1)  # fmt: skip
    if config.replicas > 1:
        shape: tuple[int, ...] = (config.replicas, ranks.size // config.replicas)
        mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    policy = MixedPrecisionPolicy(getattr(torch, config.precision), torch.float32, cast_forward_inputs=False)
    for part in (*model.layers, objective):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return objective


def pattern_of(batch: PackedBatch, ranks: Ranks) -> Pattern:
    """Who sees whom in a batch: FlexAttention, or its dense rows where it has them; shared in a group."""
    pattern = Rows(batch.rows, batch.masks) if batch.rows else flex_pattern(batch.visibility)
    return pattern if ranks.group is None else Shared(pattern, Share(batch.tokens, ranks.group))


def whole_state(objective: Objective, ranks: Ranks) -> Mapping[str, Tensor]:
    """All weights of the network, gathered to the CPU of the main process; empty on the others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found = cast(dict[str, Tensor], get_model_state_dict(objective, options=options))
    # Copies: on the CPU the tensors are still those of the network.
    return {name.removeprefix("model."): t.clone() for name, t in found.items()} if ranks.main else {}


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Those that learn, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
