"""Datasets by address: Parquet, WebDataset, JSONL beside its media, and streams of Hugging Face datasets."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

from openlance.data import hub, jsonl, parquet, webdataset
from openlance.data.example import Source
from openlance.data.storage import find_files
from openlance.errors import InputError


class Shards(Source, Protocol):
    """What `open_source` gives: a source that may know how long its shards are."""

    def count(self, shard: int) -> int | None:
        """The number of rows of a shard; None where only reading it would tell."""
        ...


FORMATS: dict[str, Callable[[str], Shards]] = {
    "parquet": parquet.ParquetSource.open,
    "webdataset": webdataset.TarSource.open,
    "jsonl": jsonl.JsonlSource.open,
    "datasets": hub.DatasetStream.open,
}
_SUFFIXES = {
    "parquet": parquet.SUFFIXES,
    "webdataset": webdataset.SUFFIXES,
    "jsonl": jsonl.SUFFIXES,
    "datasets": hub.SUFFIXES,
}


def open_source(address: str, *, format: str | None = None) -> Shards:
    """The dataset at an address.

    address: a file, a folder or a pattern (`find_files`), local or of any kind that fsspec knows; or
    `hf://datasets/NAME?config=…&split=…` for a stream of a Hugging Face dataset.
    format: one of `FORMATS`, where the names of the files do not tell; "datasets" reads a local folder
    through the library of that name.
    Raises InputError where there is nothing, nothing that can be read, or not a single row.
    """
    format = _recognise(address) if format is None else format
    if format not in FORMATS:
        raise InputError(f"unknown format {format!r}: choose one of {', '.join(FORMATS)}")
    source = FORMATS[format](address)
    if all(next(source.read(shard), None) is None for shard in range(len(source.shards))):
        raise InputError(f"{address}: there are no rows")
    return source


def _recognise(address: str) -> str:
    """The format, from the form of the address or the names of its files."""
    if re.fullmatch(rf"{hub.HUB}[^/?*]+(/[^/?*]+)?(\?.*)?", address):
        return "datasets"
    known = [suffix for suffixes in _SUFFIXES.values() for suffix in suffixes]
    files = find_files(address, known)
    found = [name for name, suffixes in _SUFFIXES.items() if any(file.endswith(suffixes) for file in files)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise InputError(f"{address}: the name tells no format: give one of {', '.join(FORMATS)}")
    raise InputError(
        f"{address}: holds {' and '.join(found)}: give the format, or a pattern such as *.parquet"
    )
