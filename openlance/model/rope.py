"""Multimodal rotary encoding: each rotary pair turns by the position on one of three axes."""

from __future__ import annotations

import torch
from torch import Tensor

from openlance.config import BackboneConfig


def rotary_table(positions: Tensor, config: BackboneConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [N, 1, head_dim], of positions [3, N] (time, height, width).

    Pair i has frequency base^(-2i / head_dim) and reads the axis whose section holds i (Qwen2.5-VL,
    arXiv 2502.13923). Angles are computed in float32 and given in `dtype`.
    """
    half = config.head_dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=positions.device) / half
    frequency = config.rope_base**-exponent
    sections = torch.tensor(config.rope_sections, device=positions.device)
    axis = torch.repeat_interleave(torch.arange(3, device=positions.device), sections, output_size=half)
    angle = positions.float()[axis].T * frequency  # [N, half]
    angle = torch.cat([angle, angle], dim=-1)[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn x [N, heads, head_dim] by a rotary table; pair i is (i, i + head_dim / 2)."""
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
