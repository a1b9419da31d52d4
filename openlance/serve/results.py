"""Files that the server keeps: clips that were made, and media that wait to be used."""

from __future__ import annotations

from pathlib import Path

from openlance.data.storage import filesystem
from openlance.errors import InputError
from openlance.serve.errors import ApiError


class StorageError(ApiError):
    """Something cannot be kept or read: a full disk, a database that is away. Clients hear of it as 507."""

    def __init__(self, message: str):
        super().__init__(507, message, code="storage")


class Results:
    """Files by name, in a folder or at an fsspec address (s3://, memory://, …).

    A file appears under its name only when it is complete. All methods block, and raise StorageError where
    the storage does not do as it is told.
    """

    def __init__(self, address: str):
        """Make the folder. Raises InputError for an address that cannot be used."""
        self.files, self.root = filesystem(address)
        try:
            self.files.makedirs(self.root, exist_ok=True)
        except OSError as error:
            raise InputError(f"{address}: cannot keep results there ({_said(error)})") from error

    @property
    def folder(self) -> Path | None:
        """Where that is on this machine's disk, if it is."""
        return Path(self.root) if "file" in self.files.protocol else None

    def write(self, name: str, data: bytes) -> None:
        """Keep a file; one of this name is replaced."""
        part = self._path(f".{name}.part")
        try:
            self.files.pipe_file(part, data)
            self.files.mv(part, self._path(name))
        except OSError as error:
            self._remove(part)
            raise StorageError(f"the server could not keep {len(data)} bytes ({_said(error)})") from error

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """A file, or its bytes from `start` to before `end`."""
        try:
            return self.files.cat_file(self._path(name), start=start, end=end)
        except OSError as error:
            raise StorageError(f"the server could not read what it kept ({_said(error)})") from error

    def size(self, name: str) -> int:
        """In bytes."""
        try:
            return int(self.files.size(self._path(name)))
        except OSError as error:
            raise StorageError(f"the server could not read what it kept ({_said(error)})") from error

    def remove(self, name: str) -> None:
        """Remove a file, and what an interrupted `write` left of it; there need be none."""
        try:
            self._remove(self._path(name))
            self._remove(self._path(f".{name}.part"))
        except OSError as error:
            raise StorageError(f"the server could not remove {name} ({_said(error)})") from error

    def _remove(self, path: str) -> None:
        if self.files.exists(path):
            self.files.rm_file(path)

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"


def _said(error: OSError) -> str:
    """In words, without the server's paths."""
    return error.strerror or type(error).__name__
