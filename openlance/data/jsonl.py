"""Rows of JSONL files, one JSON object a line, that name pictures and clips beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import fsspec

from openlance.data.example import Record
from openlance.data.fields import ALIASES, UNREADABLE
from openlance.data.storage import filesystem, find_files, reading

SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz")
PATHS = {name: column for name, column in ALIASES.items() if column.endswith("_bytes")} | {"media": "media"}
"""Columns that hold a path, or a list of paths, and the column that the bytes come to."""


@dataclass(frozen=True)
class JsonlSource:
    """One shard a file; empty lines are no rows. Media are read when their row is."""

    shards: tuple[str, ...]

    @classmethod
    def open(cls, address: str) -> JsonlSource:
        return cls(find_files(address, SUFFIXES))

    def read(self, shard: int, start: int = 0) -> Iterator[Record]:
        """The rows from `start` on; one that cannot be read has the one column `UNREADABLE`.

        An id ends in the number of the line, from 1. Raises InputError for a file that cannot be read.
        """
        address = self.shards[shard]
        folder = address.rpartition("/")[0]
        for number, line in islice(_lines(address), start, None):
            yield Record(f"{address}:{number}", _values(folder, line))

    def count(self, shard: int) -> int:
        """The lines that are not empty. Raises InputError as `read` does."""
        return sum(1 for _ in _lines(self.shards[shard]))


def _lines(address: str) -> Iterator[tuple[int, bytes]]:
    with reading(address), fsspec.open(address, "rb", compression="infer") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _values(folder: str, line: bytes) -> dict[str, Any]:
    try:
        row: Any = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        return {UNREADABLE: f"the line is not JSON ({error})"}
    if not isinstance(row, dict):
        return {UNREADABLE: f"the line holds {type(row).__name__}, not a JSON object"}
    names: list[str] = list(row)
    try:
        return {PATHS.get(name, name): _read(folder, name, row[name]) for name in names}
    except ValueError as error:
        return {UNREADABLE: str(error)}


def _read(folder: str, name: str, value: Any) -> Any:
    """The value, or what the files hold that it names. Raises ValueError for one that cannot be read."""
    if name not in PATHS or value is None:
        return value
    if isinstance(value, list):
        return [_read(folder, name, path) for path in value]
    if not isinstance(value, str):
        raise ValueError(f"{name} holds {type(value).__name__}, not a path")
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts or "\\" in value or "://" in value:
        raise ValueError(f"{name}: {value!r} does not stay inside the folder of the JSONL file")
    files, root = filesystem(folder)
    try:
        return files.cat_file(f"{root}/{path}")
    except OSError as error:
        raise ValueError(
            f"{name}: {value!r} cannot be read ({error.strerror or type(error).__name__})"
        ) from error
