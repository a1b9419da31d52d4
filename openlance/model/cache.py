"""The key/value cache: a chain of immutable chunks that forks without copying."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from itertools import accumulate, groupby

import torch
from torch import Tensor

from openlance.model.attention import Alike, CausalTail, Full, Pattern, Streams


class KVCache:
    """Keys and values of a context, [tokens, kv_heads, head_dim] a layer, as a list of shared chunks.

    Each forward pass with the cache appends one chunk. `prefix` forks at a chunk border: it copies the
    list, never a chunk. `frozen` gives a workspace for passes that must not grow the context.
    """

    def __init__(self, chunks: list[list[tuple[Tensor, Tensor]]] | None = None):
        self._chunks = chunks or []

    @property
    def length(self) -> int:
        return sum(len(chunk[0][0]) for chunk in self._chunks)

    def prefix(self, chunks: int) -> KVCache:
        """A cache that goes on from the first `chunks` chunks; they are shared."""
        return KVCache(self._chunks[:chunks])

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values; return all of them, old first."""
        if layer == 0:
            self._chunks.append([])
        self._chunks[-1].append((key, value))
        return self._joined(layer)

    def _joined(self, layer: int) -> tuple[Tensor, Tensor]:
        if len(self._chunks) == 1:
            return self._chunks[0][layer]
        keys, values = zip(*self.pieces(layer), strict=True)
        return torch.cat(keys), torch.cat(values)

    def pieces(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """A layer's keys and values, chunk by chunk."""
        return [chunk[layer] for chunk in self._chunks]

    @property
    def layers(self) -> int:
        return len(self._chunks[0]) if self._chunks else 0

    def frozen(self, room: int) -> Workspace:
        """One contiguous copy of the context with room for `room` more tokens."""
        return Workspace([self], [room])


class Workspace:
    """Contexts of one or several streams, laid out once in contiguous memory with room behind each.

    New tokens are written into that room, in place: each pass overwrites the last one's tokens unless `keep`
    was called, so that a denoising step copies nothing and text decoding grows without reallocation. A
    pass over several streams needs to know whose its tokens are, see `over`. Not for training.
    """

    def __init__(self, contexts: Sequence[KVCache], rooms: Sequence[int]):
        self.lengths = [context.length for context in contexts]
        sizes = [length + room for length, room in zip(self.lengths, rooms, strict=True)]
        self._starts = [0, *accumulate(sizes)]
        self._places: Tensor | None = None
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        for layer in range(contexts[0].layers):
            pieces = [context.pieces(layer) for context in contexts]
            for side, buffers in enumerate((self._keys, self._values)):
                some = pieces[0][0][side]
                buffer = some.new_empty(self._starts[-1], *some.shape[1:])
                for start, chunks in zip(self._starts, pieces, strict=False):
                    for chunk in chunks:
                        end = start + len(chunk[side])
                        buffer[start:end] = chunk[side]
                        start = end
                buffers.append(buffer)

    @property
    def length(self) -> int:
        """Tokens of all contexts."""
        return sum(self.lengths)

    def over(
        self, streams: Sequence[int], owner: Tensor, *, causal: bool = False
    ) -> tuple[Workspace, Pattern]:
        """What a pass over some of the streams writes to, and the pattern of its attention.

        owner: [N] int64 on the CPU, which of `streams` (counted from 0) each token of the pass belongs to.
        Each token sees the context of its own stream and all new tokens of it, or where it is causal those up
        to itself.
        """
        if len(self.lengths) == 1:
            return self, CausalTail() if causal else Full()
        device = self._keys[0].device
        counts = owner.bincount(minlength=len(streams)).tolist()
        order = owner.argsort(stable=True)
        behind = [self._starts[s] + self.lengths[s] for s in streams]
        places, back = torch.empty_like(order), torch.empty_like(order)
        places[order] = torch.cat([torch.arange(b, b + n) for b, n in zip(behind, counts, strict=True)])
        back[order] = torch.arange(len(order))

        def shape(index: int) -> tuple[int, ...]:
            """Equal for streams of equal shape that lie one behind the other."""
            start, end = self._starts[streams[index] : streams[index] + 2]
            return counts[index], self.lengths[streams[index]], end - start, start - index * (end - start)

        queries = order.split(counts)
        groups = []
        for (count, length, stride, _), members in groupby(range(len(streams)), shape):
            alike = list(members)
            rows = torch.stack([queries[index] for index in alike]).to(device)
            groups.append(Alike(rows, self._starts[streams[alike[0]]], stride, length + count))
        view = copy(self)  # the same memory and lengths
        view._places = places.to(device)
        return view, Streams(tuple(groups), back.to(device), causal)

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values behind their contexts; return views of all of them."""
        keys, values = self._keys[layer], self._values[layer]
        if self._places is not None:
            return keys.index_copy_(0, self._places, key), values.index_copy_(0, self._places, value)
        assert len(self.lengths) == 1, "a pass over several streams goes through `over`"
        end = self.length + len(key)
        keys[self.length : end] = key
        values[self.length : end] = value
        return keys[:end], values[:end]

    def keep(self, tokens: int, streams: Iterable[int] = (0,)) -> None:
        """Make the last pass's tokens, so many a stream, part of the contexts."""
        for stream in streams:
            self.lengths[stream] += tokens
