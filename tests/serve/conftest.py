"""A real server, in a process of its own, for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving import Server, serving


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of nano without a page; a module's own `SERVE`, fields of ServeConfig by name, changes it."""
    settings = getattr(request.module, "SERVE", {})
    with serving(tmp_path_factory.mktemp("server"), **settings) as running:
        yield running
