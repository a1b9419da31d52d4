"""Shared by all tests: where the golden data of the released model is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from folders import golden_folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        metavar="DIR",
        default=None,
        help="folder with golden data of the released model (default: ../shared/golden)",
    )


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Path:
    """The folder of golden data; the test is skipped where there is none."""
    folder = golden_folder(request.config)
    if folder is None:
        pytest.skip("no golden data: give its folder with --golden DIR")
    return folder


@pytest.fixture(scope="session")
def golden_file(golden: Path) -> Callable[[str], Path]:
    """A function from a name inside the golden folder to its path; skips by name what this set lacks."""

    def find(name: str) -> Path:
        path = golden / name
        if not path.exists():
            pytest.skip(f"this golden set has no {name}")
        return path

    return find


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the released layout with random weights, small enough to run anywhere."""
    from tiny import config, network, tokenizer, vae

    from openlance.model.checkpoint import save_pretrained

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_pretrained(folder, model=network(), vae=vae(), tokenizer=tokenizer(), config=config())
    return folder
