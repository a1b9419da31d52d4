"""One attention function; the pattern says which backend runs. It owns no weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


@dataclass(frozen=True, eq=False)
class Full:
    """Every query sees every key: cached visual segments and targets."""


@dataclass(frozen=True, eq=False)
class CausalTail:
    """The queries are the last keys and see those up to themselves: cached text."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Samples as padded rows [B, longest] of token places (padding = N), and who sees whom in each,
    mask [B, longest, longest]."""

    rows: Tensor
    mask: Tensor


@dataclass(frozen=True, eq=False)
class Flex:
    """FlexAttention over the packed tokens, with a block mask; compiled, for CUDA training."""

    block_mask: object
    compiled: bool = True


Pattern = Full | CausalTail | Rows | Flex


def attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    """Grouped-query attention: q [N, heads, d]; k, v [M, kv_heads, d] → [N, heads, d]."""
    if isinstance(pattern, Rows):
        return _padded_rows(q, k, v, pattern)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    if isinstance(pattern, Flex):
        out = _flex(pattern.compiled)(q, k, v, block_mask=pattern.block_mask, enable_gqa=True)
    elif isinstance(pattern, CausalTail) and q.shape[2] > 1:
        bias = causal_lower_right(q.shape[2], k.shape[2])
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return out[0].transpose(0, 1)


def _padded_rows(q: Tensor, k: Tensor, v: Tensor, pattern: Rows) -> Tensor:
    """Dense attention inside each sample: O(sum of squares), not the square of the packed length."""
    heads, kv_heads, size = q.shape[1], k.shape[1], q.shape[2]
    rows, mask = pattern.rows, pattern.mask
    batch, longest = rows.shape
    place = rows.clamp(max=len(q) - 1)

    def gather(x: Tensor, per_group: int) -> Tensor:
        return x[place].view(batch, longest, kv_heads, per_group, size).permute(0, 2, 3, 1, 4)

    grouped = gather(q, heads // kv_heads)  # [B, kv, group, L, d]
    key, value = gather(k, 1), gather(v, 1)
    if q.device.type == "cpu" and torch.is_grad_enabled():
        # Two products and a softmax: their backward beats that of SDPA on CPU (benchmarks/attention.py).
        score = (grouped * size**-0.5) @ key.transpose(-1, -2)
        score = score.masked_fill(~mask[:, None, None], float("-inf"))
        out = score.softmax(-1) @ value
    else:
        shape = grouped.shape
        out = F.scaled_dot_product_attention(
            grouped.flatten(1, 2), key.expand(shape).flatten(1, 2), value.expand(shape).flatten(1, 2),
            attn_mask=mask[:, None],
        ).view(shape)  # fmt: skip
    out = out.permute(0, 3, 1, 2, 4).reshape(batch, longest, heads, size)
    real = rows < len(q)
    return torch.zeros_like(q).index_copy(0, rows[real], out[real])


def _flex(compiled: bool):  # type: ignore[no-untyped-def]
    from torch.nn.attention.flex_attention import flex_attention

    global _compiled_flex
    if not compiled:
        return flex_attention
    if _compiled_flex is None:
        _compiled_flex = torch.compile(flex_attention, dynamic=True)
    return _compiled_flex


_compiled_flex = None
