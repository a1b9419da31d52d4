"""Muon: momentum whose matrices are made orthogonal (Jordan et al., 2024)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: every singular value lands near 1 in five steps


class Muon(torch.optim.Optimizer):
    """For weights of linear layers and convolutions; other parameters belong to AdamW.

    A 3D convolution's weight is one matrix [out, in * h * w] for each time slice, and a slice without any
    gradient is left alone. like_adamw: updates as large as AdamW's are on average, 0.2 a weight times the
    learning rate (Liu et al., 2025); else each singular value of an update is the learning rate. dtype: what
    matrices are made orthogonal in. processes: those that hold the same parameters and gradients; each makes
    a part of them orthogonal. A parameter that is spread over processes must be whole on each.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.02,
        momentum: float = 0.95,
        *,
        like_adamw: bool = False,
        dtype: torch.dtype = torch.float32,
        processes: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "like_adamw": like_adamw})
        self.dtype = dtype
        self.processes = processes

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                average, gradient = _here(state["momentum"]), _here(parameter.grad)
                average.lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(average, group["momentum"])
                for matrix, change in zip(_matrices(_here(parameter)), _matrices(update), strict=True):
                    rows, columns = change.flatten(1).shape
                    alike[rows, columns].append((matrix, change.flatten(1)))
            for (rows, columns), pairs in alike.items():
                scale = 0.04 * max(rows, columns) if group["like_adamw"] else max(1, rows / columns)
                changes = torch.stack([change for _, change in pairs])
                ways = self._orthogonal(changes.to(self.dtype)).to(changes.dtype)
                for (matrix, change), way in zip(pairs, ways, strict=True):
                    if change.any():
                        matrix.sub_(way.view_as(matrix), alpha=group["lr"] * scale**0.5)

    def _orthogonal(self, matrices: Tensor) -> Tensor:
        if self.processes is None:
            return orthogonal(matrices)
        rank, size = self.processes.rank(), self.processes.size()
        share = -(-len(matrices) // size)  # all gather as much, of zeros where the matrices end
        own = matrices.new_zeros(share, *matrices.shape[1:])
        mine = matrices[rank * share : (rank + 1) * share]
        own[: len(mine)] = mine
        found = matrices.new_empty(share * size, *matrices.shape[1:])
        dist.all_gather(list(found.split(share)), orthogonal(own).contiguous(), group=self.processes)
        return found[: len(matrices)]


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices [..., rows, columns] with their singular values moved close to 1 (Newton-Schulz iteration)."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def split_parameters(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Of those that learn: (weights for Muon, the rest: biases, gains, all that has no two dimensions)."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for parameter in filter(lambda p: p.requires_grad, module.parameters()):
        wide = parameter.dim() >= 2 and parameter.shape[0] > 1 and parameter[0].numel() > 1
        (matrices if wide else rest).append(parameter)
    return matrices, rest


def _here(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _matrices(weight: Tensor) -> list[Tensor]:
    return list(weight.unbind(2)) if weight.dim() == 5 else [weight]
