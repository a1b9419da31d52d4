"""Multimodal rotary encoding: each rotary pair turns by the position on one of three axes."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from openlance.config import BackboneConfig


def rotary_table(positions: Tensor, config: BackboneConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [N, 1, head_dim], of positions [3, N] (time, height, width).

    Pair i has frequency base^(-2i / head_dim) and reads the axis whose section holds i (Qwen2.5-VL,
    arXiv 2502.13923). Angles are computed in float32 and given in `dtype`.
    """
    axis, frequency = _pairs(config, positions.device)
    angle = positions.float()[axis].T * frequency  # [N, half]
    angle = torch.cat([angle, angle], dim=-1)[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept may be used in training
def _pairs(config: BackboneConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """(axis, frequency) of each rotary pair, [head_dim / 2]; every word that is spoken asks for them."""
    half = config.head_dim // 2
    sections = torch.tensor(config.rope_sections, device=device)
    axis = torch.repeat_interleave(torch.arange(3, device=device), sections, output_size=half)
    return axis, config.rope_base ** -(torch.arange(half, dtype=torch.float32, device=device) / half)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn x [N, heads, head_dim] by a rotary table; pair i is (i, i + head_dim / 2)."""
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    if torch.is_grad_enabled():
        return x * cos + torch.cat([-second, first], dim=-1) * sin
    turned, half = x * cos, sin[..., : first.shape[-1]]  # both halves of a table are equal
    turned[..., : first.shape[-1]].addcmul_(second, half, value=-1)
    turned[..., first.shape[-1] :].addcmul_(first, half)
    return turned
