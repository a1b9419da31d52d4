"""The key/value cache: a chain of immutable chunks that forks without copying."""

from __future__ import annotations

import torch
from torch import Tensor


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
        keys, values = zip(*(chunk[layer] for chunk in self._chunks), strict=True)
        return torch.cat(keys), torch.cat(values)

    def frozen(self, room: int) -> Workspace:
        """One contiguous copy of the context with room for `room` more tokens."""
        layers = len(self._chunks[0]) if self._chunks else 0
        return Workspace([self._joined(layer) for layer in range(layers)], self.length, room)


class Workspace:
    """A context laid out once in contiguous memory; new tokens are written behind it, in place.

    Each pass overwrites the last one's tokens unless `keep` was called, so that a denoising step copies
    nothing and text decoding grows without reallocation. Not for training: writes are in place.
    """

    def __init__(self, context: list[tuple[Tensor, Tensor]], length: int, room: int):
        self.length = length
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        for key, value in context:
            for buffers, tensor in ((self._keys, key), (self._values, value)):
                buffer = tensor.new_empty(length + room, *tensor.shape[1:])
                buffer[:length] = tensor
                buffers.append(buffer)

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values behind the context; return views of all of them."""
        end = self.length + len(key)
        self._keys[layer][self.length : end] = key
        self._values[layer][self.length : end] = value
        return self._keys[layer][:end], self._values[layer][:end]

    def keep(self, tokens: int) -> None:
        """Make the last pass's tokens part of the context."""
        self.length += tokens
