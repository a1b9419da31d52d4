"""One attention function; the pattern says which backend runs. It owns no weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from openlance.model.context_parallel import Share
from openlance.sequence.mask import Visibility, visible


@dataclass(frozen=True, eq=False)
class Full:
    """Every query sees every key: cached visual segments and targets."""


@dataclass(frozen=True, eq=False)
class CausalTail:
    """The queries are the last keys and see those up to themselves: cached text."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Samples as padded rows of token places, and who sees whom in each (see `PackedBatch`)."""

    rows: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Flex:
    """FlexAttention over the packed tokens, with a block mask; compiled, for CUDA training."""

    block_mask: object
    compiled: bool = True


@dataclass(frozen=True, eq=False)
class Alike:
    """Streams of equal shape that lie one behind the other in memory.

    queries: [streams, n] places among the queries. The keys of the first begin at `start`, those of the next
    `stride` further on, and so forth; each has `length` of them.
    """

    queries: Tensor
    start: int
    stride: int
    length: int


@dataclass(frozen=True, eq=False)
class Streams:
    """Every query sees every key of its own stream: several targets, or next words, in one pass.

    back: [N] where each query stands in the groups laid end to end. causal: a stream's queries are its last
    keys, and see those up to themselves.
    """

    groups: tuple[Alike, ...]
    back: Tensor
    causal: bool = False


@dataclass(frozen=True, eq=False)
class Shared:
    """The tokens lie on several processes (context parallelism): who sees whom among all of them, and which
    of them are here."""

    whole: Rows | Flex
    share: Share


@dataclass(frozen=True, eq=False)
class Gathered(Shared):
    """The same where the cache gathers the keys and values of all: the queries stay where they are.

    whole: whom the queries of this process see.
    """

    whole: Full | Streams  # type: ignore[assignment]


FEW_QUERIES = 64  # their mask is small beside the keys

Pattern = Full | CausalTail | Rows | Flex | Streams | Shared


def flex_pattern(visibility: Visibility) -> Flex:
    """The pattern of packed tokens for FlexAttention, from the predicate of the dense mask.

    Compiled on CUDA; elsewhere both the block mask and the attention run eagerly, for comparison.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    tokens, device = len(visibility.order), visibility.order.device

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return visible(q, k, visibility)

    compiled = device.type == "cuda"
    block_mask = create_block_mask(sees, None, None, tokens, tokens, device=device, _compile=compiled)
    return Flex(block_mask, compiled)


def attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    """Grouped-query attention: q [N, heads, d]; k, v [M, kv_heads, d] → [N, heads, d]."""
    if isinstance(pattern, Gathered):
        return attention(q, k, v, pattern.whole)
    if isinstance(pattern, Shared):
        q, k, v = pattern.share.to_heads(q, k, v)
        return pattern.share.to_tokens(attention(q, k, v, pattern.whole))
    if isinstance(pattern, Rows):
        return _padded_rows(q, k, v, pattern)
    if isinstance(pattern, Streams):
        return _streams(q, k, v, pattern)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    if isinstance(pattern, Flex):
        out = _flex(pattern.compiled)(q, k, v, block_mask=pattern.block_mask, enable_gqa=True)
    elif isinstance(pattern, CausalTail) and q.shape[2] > 1:
        out = _causal_tail(q, k, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return out[0].transpose(0, 1)


def _streams(q: Tensor, k: Tensor, v: Tensor, pattern: Streams) -> Tensor:
    """One call for all streams of a shape; their keys and values are views of where they lie."""
    outs = []
    for group in pattern.groups:
        count = len(group.queries)
        query = q[group.queries].transpose(1, 2)  # [streams, heads, n, d]
        key, value = (
            x[group.start : group.start + count * group.stride]
            .unflatten(0, (count, group.stride))[:, : group.length]
            .transpose(1, 2)
            for x in (k, v)
        )
        if pattern.causal and query.shape[2] > 1:
            out = _causal_tail(query, key, value)
        else:
            out = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)[pattern.back]


def _causal_tail(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, heads, n, d]; k, v [B, kv_heads, m, d] → [B, heads, n, d].

    A few queries stand behind each other for all heads that share keys, so that none is copied; of many, the
    keys are repeated for each head, which a kernel without a mask wants.
    """
    groups, queries = q.shape[1] // k.shape[1], q.shape[2]
    mask = _tail_mask(queries, k.shape[2], q.device)
    if queries > FEW_QUERIES:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    folded = q.unflatten(1, (-1, groups)).flatten(2, 3)  # [B, kv_heads, groups · n, d]
    out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask.repeat(groups, 1))
    return out.unflatten(2, (groups, queries)).flatten(1, 2)


def _tail_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Who sees whom in a causal tail, [queries, keys]; of many on CUDA, a stand-in that takes no memory."""
    if device.type != "cuda" or queries <= FEW_QUERIES:
        return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    from torch.nn.attention.bias import causal_lower_right  # not above: it loads torch's compiler

    return causal_lower_right(queries, keys)


def _padded_rows(q: Tensor, k: Tensor, v: Tensor, pattern: Rows) -> Tensor:
    """Dense attention inside each sample: O(sum of squares), not the square of the packed length."""
    heads, kv_heads, size = q.shape[1], k.shape[1], q.shape[2]
    places, outs = [], []
    for rows, mask in zip(pattern.rows, pattern.masks, strict=True):
        batch, longest = rows.shape
        place = rows.clamp(max=len(q) - 1)
        query = q[place].view(batch, longest, kv_heads, -1, size).permute(0, 2, 3, 1, 4)
        key, value = (x[place].transpose(1, 2)[:, :, None] for x in (k, v))  # [B, kv_heads, 1, L, d]
        if q.device.type == "cpu" and torch.is_grad_enabled():
            # Two products and a softmax: their backward beats that of SDPA on CPU (benchmarks/attention.py).
            hidden = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
            query = query.reshape(batch, kv_heads, -1, size) * size**-0.5
            score = query @ key.squeeze(2).transpose(-1, -2)  # [B, kv_heads, group · L, L]
            score = score.view(batch, heads, longest, longest) + hidden[:, None]
            out = score.softmax(-1).view(batch, kv_heads, -1, longest) @ value.squeeze(2)
        else:
            shape = query.shape
            out = F.scaled_dot_product_attention(
                query.flatten(1, 2), key.expand(shape).flatten(1, 2), value.expand(shape).flatten(1, 2),
                attn_mask=mask[:, None],
            )  # fmt: skip
        real = rows < len(q)
        outs.append(out.reshape(batch, heads, longest, size).transpose(1, 2)[real])
        places.append(rows[real])
    return torch.zeros_like(q).index_copy(0, torch.cat(places), torch.cat(outs))


def _flex(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    global _compiled_flex
    if not compiled:
        return flex_attention
    if _compiled_flex is None:
        _compiled_flex = torch.compile(flex_attention, dynamic=True)
    return _compiled_flex


_compiled_flex: Callable[..., Tensor] | None = None
