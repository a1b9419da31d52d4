"""Rows of WebDataset shards: tar files in which neighbours with the same name but another suffix are one row.

`00042.jpg` with `00042.txt` is a picture with a caption. What stands between the name and the last suffix
names the column, and a number there the place in a list: `00042.output.jpg` is `output_image_bytes`,
`00042.reference.0.png` is the first of `reference_image_bytes`, `00042.caption_q.txt` is `caption_q`. The
members of a .json object are columns too.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import fsspec

from openlance.data.example import Record
from openlance.data.fields import UNREADABLE
from openlance.data.storage import find_files, reading

SUFFIXES = (".tar",)  # compressed ones can only be read from front to back
KINDS = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "avif", "jp2", "ppm"), "image"),
    **dict.fromkeys(("mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "gif"), "video"),
    "txt": "text",
    "json": "json",
}
"""What a suffix says; files of other suffixes are left unread."""


@dataclass(frozen=True)
class TarSource:
    """One shard a tar file. Rows before the first wanted one are passed over by their headers."""

    shards: tuple[str, ...]

    @classmethod
    def open(cls, address: str) -> TarSource:
        return cls(find_files(address, SUFFIXES))

    def read(self, shard: int, start: int = 0) -> Iterator[Record]:
        """The rows from `start` on. Raises InputError for a file that is no tar, or damaged."""
        address = self.shards[shard]
        with _archive(address) as archive:
            for row, members in islice(enumerate(_rows(archive)), start, None):
                yield Record(f"{address}:{row}", _columns(archive, members))

    def count(self, shard: int) -> int:
        """From the headers alone. Raises InputError as `read` does."""
        with _archive(self.shards[shard]) as archive:
            return sum(1 for _ in _rows(archive))


@contextmanager
def _archive(address: str) -> Iterator[tarfile.TarFile]:
    with (
        reading(address, tarfile.TarError),
        fsspec.open(address, "rb") as file,
        tarfile.open(fileobj=file, mode="r:") as archive,
    ):
        yield archive


def _rows(archive: tarfile.TarFile) -> Iterator[list[tarfile.TarInfo]]:
    """The files of each row. Raises ReadError for an archive that ends early."""
    files = (member for member in archive if member.isfile() and not _hidden(member.name))
    for _, members in groupby(files, key=lambda member: _split(member.name)[0]):
        yield list(members)
    file = archive.fileobj
    assert file is not None
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError("the mark at its end is missing")


def _hidden(path: str) -> bool:
    return path.rpartition("/")[2].startswith(".")


def _split(path: str) -> tuple[str, str]:
    """(folder and name up to the first dot, what follows): "a/00042.output.jpg" as a/00042 and output.jpg."""
    folder, slash, name = path.rpartition("/")
    stem, _, ending = name.partition(".")
    return folder + slash + stem, ending.lower()


def _columns(archive: tarfile.TarFile, members: list[tarfile.TarInfo]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    lists: dict[str, dict[int, bytes]] = {}
    for member in sorted(members, key=lambda member: not member.name.lower().endswith(".json")):
        *names, suffix = _split(member.name)[1].split(".")
        kind, file = KINDS.get(suffix), archive.extractfile(member)
        if kind is None or file is None:
            continue
        data = file.read()
        if kind in ("image", "video"):
            place = int(names.pop()) if names and names[-1].isdecimal() else None
            column = "media" if names == ["media"] else "_".join([*names, kind, "bytes"])
            if place is None:
                columns[column] = data
            else:
                lists.setdefault(column, {})[place] = data
            continue
        try:
            columns |= _words("_".join(names), kind, data)
        except ValueError as error:
            return {UNREADABLE: f"the .{suffix} file cannot be read ({error})"}
    return columns | {column: [found[place] for place in sorted(found)] for column, found in lists.items()}


def _words(name: str, kind: str, data: bytes) -> dict[str, Any]:
    """Columns of a .txt or .json file. Raises ValueError for what cannot be decoded."""
    if kind == "text":
        return {name or "caption": data.decode().strip()}
    value = json.loads(data)
    if name:
        return {name: value}
    if not isinstance(value, dict):
        raise ValueError(f"it holds {type(value).__name__}, not a JSON object")
    return value
