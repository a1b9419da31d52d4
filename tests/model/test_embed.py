"""Embedded times and the fixed table of latent places, against the formulas written out."""

from __future__ import annotations

import math

import pytest
import torch

from openlance.model.embed import TIME_FEATURES, TimeEmbed, place_features, time_features


def test_time_features() -> None:
    times = [0.0, 0.3, 1.0]
    half = TIME_FEATURES // 2
    angles = [[t * 10000 ** (-i / half) for i in range(half)] for t in times]
    expected = [[*map(math.cos, row), *map(math.sin, row)] for row in angles]
    torch.testing.assert_close(time_features(torch.tensor(times)), torch.tensor(expected))


def test_time_embedding_has_the_dtype_of_its_weights() -> None:
    embed = TimeEmbed(16)
    times = torch.tensor([0.0, 0.5])
    assert embed(times).shape == (2, 16)
    assert embed.bfloat16()(times).dtype == torch.bfloat16


@pytest.mark.parametrize("hidden", [24, 32, 64])
def test_place_features(hidden: int) -> None:
    """Frame and row get an even third of the width each, columns the rest; sines before cosines."""
    grid = torch.tensor([[0, 3], [2, 0], [5, 61]])
    third = 2 * (hidden // 6)
    widths = (third, third, hidden - 2 * third)
    for token, row in zip(grid.T.tolist(), place_features(grid, hidden).tolist(), strict=True):
        expected = []
        for place, width in zip(token, widths, strict=True):
            angles = [place * 10000 ** (-i / (width // 2)) for i in range(width // 2)]
            expected += [*map(math.sin, angles), *map(math.cos, angles)]
        assert row == pytest.approx(expected, abs=1e-6)


def test_no_two_places_look_the_same() -> None:
    axes = torch.meshgrid(torch.arange(4), torch.arange(8), torch.arange(8), indexing="ij")
    features = place_features(torch.stack(axes).flatten(1), 32)
    distance = torch.cdist(features, features) + torch.eye(len(features)) * 9
    assert float(distance.min()) > 0.1
