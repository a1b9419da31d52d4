"""Shared by the tests of evaluation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from service import Service, serving


@pytest.fixture
def service() -> Iterator[Service]:
    with serving() as told:
        yield told
