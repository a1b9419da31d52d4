"""Which waiting jobs a worker takes up together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from openlance.config import SamplingConfig
from openlance.serve.jobs import Request


def choose_batch(waiting: Sequence[Request], most: int, sampling: SamplingConfig) -> list[int]:
    """Indices of the requests to take up next: the oldest, and up to `most` in all that go with it.

    waiting: the oldest first. sampling: what holds where a request says nothing.
    Answers go together, whatever is asked. Of what is made, the same method goes together where it is sampled
    alike: all then take their steps in the same forwards, and a picture never waits for a clip. What goes
    together has the same adapter.
    """
    kinds = [_kind(request, sampling) for request in waiting]
    return [index for index, kind in enumerate(kinds) if kind == kinds[0]][:most]


def _kind(request: Request, sampling: SamplingConfig) -> tuple[Any, ...]:
    """Equal for requests that go together."""
    if request.method == "chat":
        return (request.adapter, "chat")
    settings = asdict(sampling)
    chosen = {name: request.arguments.get(name, default) for name, default in settings.items()}
    clip = bool(request.arguments.get("video")) or (request.media_type or "").startswith("video/")
    return (request.adapter, request.method, clip, chosen)
