"""Who sees whom: generalized 3D causal attention, one predicate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Visibility:
    """What the predicate reads of each token, all [N]: its sample, segment, place in the sequence, and
    whether its segment is visual or noisy."""

    sample: Tensor
    segment: Tensor
    order: Tensor
    visual: Tensor
    noisy: Tensor

    def to(self, device: torch.device | str) -> Visibility:
        return Visibility(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def visible(q: Tensor, k: Tensor, s: Visibility) -> Tensor:
    """Whether query token q may see key token k; indices broadcast."""
    same = s.segment[q] == s.segment[k]
    ordered = (s.order[q] >= s.order[k]) | (same & s.visual[q])
    return (s.sample[q] == s.sample[k]) & ordered & (same | ~s.noisy[k])


def dense_mask(s: Visibility) -> Tensor:
    """[N, N] bool, row = query. For tests and small inputs."""
    index = torch.arange(len(s.order), device=s.order.device)
    return visible(index[:, None], index[None, :], s)
