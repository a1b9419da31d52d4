"""Shared by the tests of inference: a pipeline on the tiny checkpoint, and pictures to give it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from openlance.infer.pipeline import LancePipeline


@pytest.fixture(scope="session")
def lance(tiny_checkpoint: Path) -> LancePipeline:
    return LancePipeline.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="session")
def picture() -> NDArray[np.uint8]:
    """A red disc on white, [48, 64, 3]."""
    rows, columns = np.mgrid[:48, :64]
    disc = (rows - 24) ** 2 + (columns - 20) ** 2 < 150
    return np.where(disc[..., None], [220, 20, 20], 255).astype(np.uint8)


@pytest.fixture(scope="session")
def clip(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The disc moving right, [8, 48, 64, 3]."""
    return np.stack([np.roll(picture, 4 * i, axis=1) for i in range(8)])
