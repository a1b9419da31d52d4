"""Context parallelism: the tokens of one batch spread over the processes of a group, for training.

DeepSpeed Ulysses (arXiv 2309.14509). All but attention treats each token alone, so a process computes it for
a run of tokens; attention treats each head alone, so a process computes it for all tokens and a share of the
heads. Before attention the processes exchange tokens for heads, and after it heads for tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Share:
    """What this process of `group` holds of a batch of `tokens`; all of it without a group.

    A run of the sorted tokens, [all und | all gen]: equally long on every process, give or take one, whatever
    experts serve it. What arrives run by run is thereby in the order of the batch.
    """

    tokens: int
    group: dist.ProcessGroup | None = None

    def own(self, x: Tensor, first: int = 0) -> Tensor:
        """This process's rows of x, which belong to the tokens from `first` on."""
        if self.group is None:
            return x
        rank = self.group.rank()
        start, stop = (min(max(self._edge(i) - first, 0), len(x)) for i in (rank, rank + 1))
        return x[start:stop]

    def whole(self, x: Tensor, first: int, last: int) -> Tensor:
        """The rows of all processes, where x are this one's of the tokens from `first` to before `last`.

        Gradients of all processes are added up: each has a loss of its own that reads the row.
        """
        if self.group is None:
            return x
        sizes = self._sizes(first, last)
        return _exchange(torch.cat([x] * len(sizes)), [len(x)] * len(sizes), sizes, self.group)

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Own tokens with all heads → all tokens with own heads: q [n, heads, d], k and v [n, kv_heads, d] →
        [N, own heads, d] and [N, own kv_heads, d]. Keys and values are repeated where the processes are more
        than their heads."""
        assert self.group is not None
        size = self.group.size()
        repeats = math.lcm(k.shape[1], size) // k.shape[1]
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        parts = [x.unflatten(1, (size, -1)).transpose(0, 1) for x in (q, k, v)]  # [size, n, own, d]
        sent = torch.cat(parts, dim=2).flatten(0, 1)
        found = _exchange(sent, [len(q)] * size, self._sizes(0, self.tokens), self.group)
        mine_q, mine_k, mine_v = found.split([part.shape[2] for part in parts], dim=1)
        return mine_q, mine_k, mine_v

    def to_tokens(self, attended: Tensor) -> Tensor:
        """The way back: [N, own heads, d] → [n, heads, d]."""
        assert self.group is not None
        sizes = self._sizes(0, self.tokens)
        n, size = sizes[self.group.rank()], len(sizes)
        found = _exchange(attended, sizes, [n] * size, self.group)
        return found.unflatten(0, (size, n)).transpose(0, 1).flatten(1, 2)

    def _edge(self, rank: int) -> int:
        """The first token of a process."""
        assert self.group is not None
        return self.tokens * rank // self.group.size()

    def _sizes(self, first: int, last: int) -> list[int]:
        """How many of the tokens from `first` to before `last` each process holds."""
        assert self.group is not None
        edges = [min(max(self._edge(rank), first), last) for rank in range(self.group.size() + 1)]
        return [stop - start for start, stop in pairwise(edges)]


class _Exchange(torch.autograd.Function):
    """All-to-all of rows: `sent[i]` of them, in order, go to process i, `received[i]` come from it.

    The gradient goes the way back. Plain tensors, unlike those of torch's functional collectives, which come
    before what they hold.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.way = sent, received, group
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        sent, received, group = ctx.way
        return _exchange(grad, received, sent, group), None, None, None


def _exchange(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    return _Exchange.apply(x, sent, received, group)  # type: ignore[no-untyped-call]
