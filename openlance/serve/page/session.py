"""What one visitor has made and is having made. Nobody else sees it."""

from __future__ import annotations

import asyncio
import mimetypes
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from openlance.serve.engine import Job
from openlance.serve.jobs import Made
from openlance.serve.work import cancel

KEPT = 60
"""Results that the page lists; older ones leave the list."""


@dataclass(frozen=True)
class Item:
    """A picture or clip in the visitor's folder. settings: that it was made with; empty for one sent."""

    path: Path
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def clip(self) -> bool:
        """Of a result."""
        return self.settings.get("fps") is not None

    @property
    def caption(self) -> str:
        return f"{self.settings.get('prompt', '')} · seed {self.settings.get('seed')}"


def captioned(items: Iterable[Item]) -> list[tuple[str, str]]:
    """What a gallery shows of them."""
    return [(str(item.path), item.caption) for item in items]


@dataclass(frozen=True)
class Turn:
    """One state of what is being edited. parent: the turn that it was made from; None for what was sent."""

    item: Item
    parent: int | None = None


class Session:
    """items: results, the newest first; chosen: the one looked at. turns: of the edit; turn: where the next
    goes on; basis: where the one that runs began. talk: the conversation, as the chatbot shows it. asked: the
    turn to answer next, and what the box held. busy: tabs that are at work; running: their jobs."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.chosen = 0
        self.turns: list[Turn] = []
        self.turn = self.basis = 0
        self.talk: list[dict[str, Any]] = []
        self.asked: tuple[dict[str, Any], dict[str, Any]] | None = None
        self.busy: set[str] = set()
        self.running: dict[str, list[Job]] = {}
        self._folder: TemporaryDirectory | None = None
        self._files = 0

    async def add(self, made: Made) -> Item:
        """Keep what was made, in front of the others."""
        suffix = mimetypes.guess_extension(made.media_type) or ""
        path = await self.store(made.media, f"{made.settings['task']}-{made.settings['seed']}", suffix)
        item = Item(path, made.settings)
        self.items = [item, *self.items[: KEPT - 1]]
        self.chosen = 0
        return item

    async def store(self, data: bytes, stem: str, suffix: str) -> Path:
        """Write a file to the visitor's folder; its name is what a download gets."""
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="openlance-page-", ignore_cleanup_errors=True)
        self._files += 1
        path = Path(self._folder.name) / f"{self._files:03d}-{stem}{suffix}"
        await asyncio.to_thread(path.write_bytes, data)
        return path

    async def cancel(self, place: str) -> None:
        """Stop what a tab is having made. (Gradio runs plain functions in threads, where jobs may not go.)"""
        cancel(self.running.get(place, ()))

    def close(self) -> None:
        """The visitor has left: stop their jobs and remove their files."""
        for jobs in self.running.values():
            cancel(jobs)
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
