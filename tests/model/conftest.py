"""Shared by the tests of the model: a tiny release in the released layout."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from released import TINY, Tiny

from openlance.model.lance import Lance
from openlance.model.vae import VAE
from openlance.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a red circle"], 278)
    config = replace(TINY, tokens=tokenizer.special)
    return Tiny(config, Lance(config), VAE(config.vae), tokenizer)


@pytest.fixture(scope="session")
def saved(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "tiny"
    tiny.save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved release, for a test to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "release"))
