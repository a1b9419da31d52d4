"""Frames that tell which one they are, also after lossy coding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

Encode = Callable[..., Path]


def grey_levels(levels: Sequence[int], height: int = 48, width: int = 64) -> np.ndarray:
    """Frames [T, H, W, 3], each of one grey level."""
    return np.broadcast_to(np.array(levels, np.uint8)[:, None, None, None], (len(levels), height, width, 3))


def levels_of(frames: np.ndarray) -> list[int]:
    """The mean level of each frame, rounded."""
    return frames.mean((1, 2, 3)).round().astype(int).tolist()
