"""What a row of a dataset says, before anything is resized or encoded: words and media."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from openlance.data.media import Media
from openlance.sequence.template import Task


@dataclass(frozen=True, eq=False)
class Turn:
    """An earlier exchange: what the user showed and said, and what came back, words or media."""

    prompt: str
    reply: str | Media
    sources: tuple[Media, ...] = ()


@dataclass(frozen=True, eq=False)
class Example:
    """One example to learn from.

    prompt: the user's words ("" for a plain caption). sources: the pictures and clips that the user shows, in
    order. answer: the words to learn, of an understanding task; target: the picture or clip to generate, of
    the others. fixed_frames: latent frames of the target that are given (image-to-video). history: earlier
    turns, oldest first.
    """

    id: str
    task: Task
    prompt: str
    answer: str | None = None
    sources: tuple[Media, ...] = ()
    target: Media | None = None
    fixed_frames: tuple[int, ...] = ()
    history: tuple[Turn, ...] = ()


@dataclass(frozen=True, eq=False)
class Record:
    """One stored row: `id` names its place in messages ("folder/a.parquet:17"), `values` are its columns."""

    id: str
    values: Mapping[str, Any]


class Source(Protocol):
    """A dataset as a list of shards, each a list of rows in stored order."""

    @property
    def shards(self) -> tuple[str, ...]:
        """Their addresses, sorted."""
        ...

    def read(self, shard: int, start: int = 0) -> Iterator[Record]:
        """The rows of a shard from row `start` on. Raises InputError for a shard that cannot be read."""
        ...
