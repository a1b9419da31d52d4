"""Shared by the parity tests: the golden checkpoint and readers of the golden files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="session")
def golden_checkpoint(golden_file: Callable[[str], Path]) -> Path:
    """The tiny random checkpoint in the released layout."""
    return golden_file("checkpoint")


@pytest.fixture(scope="session")
def golden_json(golden_file: Callable[[str], Path]) -> Callable[[str], Any]:
    """A function from a name inside the golden folder to the parsed JSON."""
    return lambda name: json.loads(golden_file(name).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def golden_tensors(golden_file: Callable[[str], Path]) -> Callable[[str], dict[str, torch.Tensor]]:
    """A function from a name inside the golden folder to the tensors of that safetensors file."""
    return lambda name: load_file(golden_file(name))
