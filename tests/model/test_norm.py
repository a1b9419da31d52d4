"""The short way of the norm on the CPU gives what PyTorch's gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from openlance.model.norm import RMSNorm

ATOL = 1e-5  # float32, values up to about 20; the sum is rounded otherwise


def pair(size: int) -> tuple[RMSNorm, nn.RMSNorm]:
    """Ours and PyTorch's, with the same weights."""
    ours, theirs = RMSNorm(size, 1e-6), nn.RMSNorm(size, 1e-6)
    with torch.no_grad():
        ours.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("shape", [(0, 64), (1, 64), (72, 4, 16), (5, 2048)])
def test_both_ways_are_one(shape: tuple[int, ...], scale: float) -> None:
    ours, theirs = pair(shape[-1])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale
    with torch.inference_mode():
        short = ours(x)
        torch.testing.assert_close(short, theirs(x), atol=ATOL, rtol=0)
    torch.testing.assert_close(ours(x), short, atol=ATOL, rtol=0)  # with gradients, PyTorch's own


def test_zeros_stay_zeros() -> None:
    with torch.inference_mode():
        assert torch.equal(pair(8)[0](torch.zeros(3, 8)), torch.zeros(3, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 64), (1, 64), (72, 4, 16), (5, 2048)])
def test_halves_are_rounded_once(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ours, theirs = (norm.to(dtype) for norm in pair(shape[-1]))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.inference_mode():
        found, wanted = ours(x), theirs(x)
    assert found.dtype == dtype
    # The same numbers but for sums whose rounding decides that of the result: one step of the dtype.
    torch.testing.assert_close(found, wanted, atol=0, rtol=torch.finfo(dtype).eps)
    assert (found != wanted).float().mean() < 1e-3 or not found.numel()


def test_doubles_are_not_narrowed() -> None:
    ours, theirs = (norm.double() for norm in pair(8))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.inference_mode():
        assert torch.equal(ours(x), theirs(x))
