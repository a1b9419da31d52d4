"""Muon: momentum whose matrices are made orthogonal (Jordan et al., 2024)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: every singular value lands near 1 in five steps


class Muon(torch.optim.Optimizer):
    """For weights of linear layers and convolutions; other parameters belong to AdamW.

    A 3D convolution's weight is one matrix [out, in * h * w] for each time slice, and a slice without any
    gradient is left alone.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"]
                average.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(average, group["momentum"])
                for matrix, change in zip(_matrices(parameter), _matrices(update), strict=True):
                    if change.any():
                        flat = change.flatten(1)
                        scale = max(1, flat.shape[0] / flat.shape[1]) ** 0.5
                        matrix.sub_(orthogonal(flat).view_as(matrix), alpha=group["lr"] * scale)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """The matrix [rows, columns] with its singular values moved close to 1 (Newton-Schulz iteration)."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x


def split_parameters(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """(weights for Muon, the rest: biases, gains and whatever has no two dimensions above 1)."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for parameter in module.parameters():
        wide = parameter.dim() >= 2 and parameter.shape[0] > 1 and parameter[0].numel() > 1
        (matrices if wide else rest).append(parameter)
    return matrices, rest


def _matrices(weight: Tensor) -> list[Tensor]:
    return list(weight.unbind(2)) if weight.dim() == 5 else [weight]
