"""One attention function, its backends against the formula written out."""

from __future__ import annotations

import pytest
import torch
from tiny import config, samples
from torch import Tensor

from openlance.model.attention import CausalTail, Flex, Full, Pattern, Rows, attention, flex_pattern
from openlance.sequence.mask import dense_mask
from openlance.sequence.pack import pack

ATOL = 1e-5  # float32, other order of operations; measured worst case 3e-6
HEADS, KV_HEADS, SIZE = 4, 2, 8


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k / sqrt d) v, head by head; each group of query heads shares a key/value head."""
    heads = []
    for head in range(q.shape[1]):
        shared = head // (q.shape[1] // k.shape[1])
        score = q[:, head] @ k[:, shared].T / q.shape[2] ** 0.5
        heads.append(score.masked_fill(~mask, float("-inf")).softmax(-1) @ v[:, shared])
    return torch.stack(heads, dim=1)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=0)


BATCH = pack(list(samples().values()), config())
WHOLE = dense_mask(BATCH.visibility)


def packed() -> tuple[Tensor, Tensor, Tensor]:
    n = BATCH.tokens
    shapes = ((n, HEADS, SIZE), (n, KV_HEADS, SIZE), (n, KV_HEADS, SIZE))
    return tuple(draw(*shape, seed=i) for i, shape in enumerate(shapes))  # type: ignore[return-value]


@pytest.mark.parametrize("grad", [True, False], ids=["two products", "sdpa"])
def test_rows(grad: bool) -> None:
    """With gradients the CPU takes two products and a softmax, without them SDPA."""
    q, k, v = packed()
    with torch.set_grad_enabled(grad):
        assert_near(attention(q, k, v, Rows(BATCH.rows, BATCH.masks)), naive(q, k, v, WHOLE))


def test_gradients_of_rows() -> None:
    weight = draw(BATCH.tokens, HEADS, SIZE, seed=9)
    found = []
    for run in (
        lambda q, k, v: attention(q, k, v, Rows(BATCH.rows, BATCH.masks)),
        lambda q, k, v: naive(q, k, v, WHOLE),
    ):
        given = [x.requires_grad_() for x in packed()]
        (run(*given) * weight).sum().backward()
        found.append([x.grad for x in given])
    for ours, expected in zip(*found, strict=True):
        assert_near(ours, expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex() -> None:
    """The block mask comes from the same predicate as the dense one."""
    q, k, v = packed()
    pattern = flex_pattern(BATCH.visibility)
    assert isinstance(pattern, Flex) and not pattern.compiled
    with torch.no_grad():
        assert_near(attention(q, k, v, pattern), naive(q, k, v, WHOLE))


@pytest.mark.parametrize("new, old", [(1, 0), (1, 7), (5, 0), (5, 7)])
@pytest.mark.parametrize("pattern", [Full(), CausalTail()])
def test_behind_a_cache(pattern: Pattern, new: int, old: int) -> None:
    q, k, v = draw(new, HEADS, SIZE), *(draw(new + old, KV_HEADS, SIZE, seed=i) for i in (1, 2))
    mask = torch.ones(new, new + old, dtype=torch.bool)
    if isinstance(pattern, CausalTail):
        mask = mask.tril(diagonal=old)
    assert_near(attention(q, k, v, pattern), naive(q, k, v, mask))
