"""Where the tests find data that is not in the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

BESIDE_REPOSITORY = Path(__file__).resolve().parents[2] / "shared" / "golden"


def golden_folder(config: pytest.Config) -> Path | None:
    """The folder of golden data; None where there is none. Raises UsageError for a given one that is not."""
    given = config.getoption("--golden")
    folder = Path(given) if given else BESIDE_REPOSITORY
    if (folder / "MEANING.md").is_file() or (folder / "manifest.json").is_file():
        return folder
    if given:
        raise pytest.UsageError(f"--golden {given}: not a folder of golden data")
    return None
