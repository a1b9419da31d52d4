"""Rotary encoding: relative, axis by axis, as the formula says."""

from __future__ import annotations

import math

import torch

from openlance.config import BackboneConfig
from openlance.model.rope import rotary_table, rotate

SHAPE = BackboneConfig(hidden=64, heads=4, kv_heads=2, rope_sections=(2, 3, 3), rope_base=1e4)
SIZE, HALF = SHAPE.head_dim, SHAPE.head_dim // 2
AXIS = [0, 0, 1, 1, 1, 2, 2, 2]


def at(*position: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rotary_table(torch.tensor(position).view(3, 1), SHAPE, torch.float32)


def draw(seed: int) -> torch.Tensor:
    return torch.randn(1, 4, SIZE, generator=torch.Generator().manual_seed(seed))


def test_each_pair_turns_by_its_axis() -> None:
    x = draw(0)
    turned, position = rotate(x, at(3, 5, 7)), (3, 5, 7)
    for i in range(HALF):
        angle = position[AXIS[i]] * SHAPE.rope_base ** (-2 * i / SIZE)
        a, b = x[..., i], x[..., i + HALF]
        first = a * math.cos(angle) - b * math.sin(angle)
        second = b * math.cos(angle) + a * math.sin(angle)
        torch.testing.assert_close(turned[..., i], first)
        torch.testing.assert_close(turned[..., i + HALF], second)


def test_scores_depend_on_distances_only() -> None:
    q, k = draw(1), draw(2)

    def score(p: tuple[int, int, int], r: tuple[int, int, int]) -> torch.Tensor:
        return (rotate(q, at(*p)) * rotate(k, at(*r))).sum(-1)

    near = score((3, 5, 7), (1, 1, 1))
    # Angles up to 1000 in float32 are off by up to 6e-5 (2^-24 of the angle, rounded twice).
    torch.testing.assert_close(near, score((1003, 5, 7), (1001, 1, 1)), atol=1e-3, rtol=0)
    assert not torch.allclose(near, score((4, 5, 7), (1, 1, 1)), atol=1e-3)


def test_position_zero_turns_nothing_and_no_turn_changes_length() -> None:
    x = draw(3)
    assert torch.equal(rotate(x, at(0, 0, 0)), x)
    torch.testing.assert_close(rotate(x, at(9, 4, 2)).norm(dim=-1), x.norm(dim=-1))


def test_the_table_is_exact_before_it_is_rounded() -> None:
    """Angles are computed in float32 whatever the network's dtype."""
    positions = torch.tensor([[1001], [63], [17]])
    exact = rotary_table(positions, SHAPE, torch.float32)
    for ours, expected in zip(rotary_table(positions, SHAPE, torch.bfloat16), exact, strict=True):
        assert torch.equal(ours, expected.bfloat16())


def test_rotation_without_gradients_is_the_same() -> None:
    """It adds in place there."""
    x, table = draw(0), at(3, 14, 15)
    with torch.inference_mode():
        short = rotate(x, table)
    torch.testing.assert_close(short, rotate(x, table), atol=1e-6, rtol=0)
