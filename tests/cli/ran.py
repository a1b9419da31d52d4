"""What a command line gave, and how to read it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def seed_of(ran: Ran) -> str:
    found = re.search(r"seed (\d+)", ran.out)
    assert found, ran.out
    return found[1]


def refused(ran: Ran, *words: str) -> None:
    """Exit code 2 and one line that holds the words."""
    assert ran.code == 2
    lines = ran.err.strip().splitlines()
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("openlance: error: ")
    for word in words:
        assert word in lines[0]
