"""The key/value cache: forks share what they have in common and never disturb each other."""

from __future__ import annotations

import torch
from torch import Tensor

from openlance.model.cache import KVCache

LAYERS = 2


def chunk(tokens: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(tokens, 2, 4, generator=generator), torch.randn(tokens, 2, 4, generator=generator))
        for _ in range(LAYERS)
    ]


def append(cache, new: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [cache.update(layer, *pair) for layer, pair in enumerate(new)]


def joined(*chunks: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [
        tuple(torch.cat(parts) for parts in zip(*(c[layer] for c in chunks), strict=True))  # type: ignore[misc]
        for layer in range(LAYERS)
    ]


def assert_equal(actual: list, expected: list) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_each_pass_sees_all_before_it() -> None:
    cache = KVCache()
    first, second = chunk(3, 1), chunk(2, 2)
    assert_equal(append(cache, first), first)
    assert_equal(append(cache, second), joined(first, second))
    assert cache.length == 5


def test_forks_share_the_prefix_and_nothing_else() -> None:
    trunk = KVCache()
    first, second, left, right = (chunk(n, n) for n in (3, 2, 4, 1))
    append(trunk, first)
    append(trunk, second)
    one, other = trunk.prefix(1), trunk.prefix(1)
    assert_equal(append(one, left), joined(first, left))
    assert_equal(append(other, right), joined(first, right))
    assert (trunk.length, one.length, other.length) == (5, 7, 4)
    assert_equal(append(trunk, left), joined(first, second, left))
    assert_equal(append(other, left), joined(first, right, left))


def test_a_fork_copies_nothing() -> None:
    trunk = KVCache()
    first = chunk(3, 1)
    append(trunk, first)
    fork = trunk.prefix(1)
    assert fork._chunks[0][0][0] is trunk._chunks[0][0][0] is first[0][0]


def test_a_workspace_writes_over_the_last_pass_unless_it_is_kept() -> None:
    cache = KVCache()
    first, one, two = chunk(3, 1), chunk(2, 2), chunk(2, 3)
    append(cache, first)
    space = cache.frozen(room=4)
    assert_equal(append(space, one), joined(first, one))
    assert_equal(append(space, two), joined(first, two))
    space.keep(2)
    assert space.length == 5
    assert_equal(append(space, one), joined(first, two, one))
    assert_equal(append(cache.prefix(1), one), joined(first, one))  # the context itself is untouched
    assert cache.length == 3


def test_a_step_in_a_workspace_allocates_no_context() -> None:
    cache = KVCache()
    append(cache, chunk(3, 1))
    space = cache.frozen(room=2)
    places = [append(space, chunk(2, seed))[0][0].data_ptr() for seed in (2, 3)]
    assert places[0] == places[1]
