"""One request on several processes, one device each: who they are, and what all of them must hold alike."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from openlance.config import SamplingConfig
from openlance.errors import InputError
from openlance.infer.generate import Cancelled, OnStep, Target
from openlance.infer.parallel import check_spread, denoise_parallel
from openlance.model.lance import Lance
from openlance.model.tiles import Tiles

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Spread:
    """This process among those that do each request together.

    what: "guidance" or "tokens", see `openlance.infer.parallel`. device: its own.
    """

    what: str
    group: dist.ProcessGroup
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.group.rank() == 0

    def same(self, value: T) -> T:
        """The first process's value, on all of them."""
        found = [value]
        dist.broadcast_object_list(found, group=self.group, group_src=0)
        return found[0]

    def least(self, value: int) -> int:
        """The smallest of all processes' values."""
        found = torch.tensor(value)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self.group)
        return int(found)

    def tiles(self, own: Tiles | None) -> Tiles:
        """How the VAE runs on all: in tiles that the processes share, as small as any of them needs."""
        own = own or Tiles()
        whole = torch.iinfo(torch.int64).max
        side = self.least(own.side or whole)
        return replace(own, side=None if side == whole else side, group=self.group)

    def denoise(
        self, model: Lance, targets: Sequence[Target], config: SamplingConfig, on_step: OnStep | None = None
    ) -> list[Tensor | Cancelled]:
        """As `denoise_together`, on all processes."""
        return denoise_parallel(model, targets, config, on_step, spread=self.what, group=self.group)

    def leave(self) -> None:
        """End what `join` began."""
        dist.destroy_process_group()


def join(what: str, device: str | torch.device | None = None) -> Spread:
    """Join the processes that torchrun started. device: "cuda" or "cpu"; default CUDA where there is one.

    Of several GPUs each process takes the one of its number. Raises InputError for what cannot be spread, for
    a process that torchrun did not start, and for another device.
    """
    check_spread(what)
    if "LOCAL_RANK" not in os.environ:
        raise InputError(
            f"spread {what} needs several processes: start them with torchrun --nproc-per-node 2 …"
        )
    kind = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if kind not in ("cuda", "cpu"):
        raise InputError(
            f"device {kind} cannot be spread over: choose cuda, of which each process takes one, or cpu"
        )
    own = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if kind == "cuda" else "cpu")
    if own.type == "cuda":
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise InputError(
                f"there are {torch.cuda.device_count()} CUDA devices here: start as many processes at most"
            )
        torch.cuda.set_device(own)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    # A group of its own: decisions go by the CPU, tensors of the device by its own library.
    return Spread(what, dist.new_group(backend="cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"), own)
