"""Addresses of stored files: local paths, and whatever fsspec knows (s3://, hf://, memory://, ...)."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from types import ModuleType
from typing import Any

import fsspec

from openlance.errors import InputError


def find_files(address: str, suffixes: Iterable[str]) -> tuple[str, ...]:
    """The files at an address, sorted.

    address: a file, a folder (with all that is in it and below whose name ends in one of the suffixes, but
    for names that begin with a dot or an underscore) or a pattern: `{000..012}` and `{a,b}` for each of these
    in turn, `*`, `**` and `[ab]` as in a shell.
    Raises InputError where there is no such address.
    """
    found: set[str] = set()
    for part in expand_braces(address):
        found.update(_find(part, tuple(suffixes)))
    return tuple(sorted(found))


def expand_braces(pattern: str) -> list[str]:
    """ "a-{08..10}.tar" as a-08.tar, a-09.tar, a-10.tar; "{a,b}" as a, b; several multiply."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[piece] if place % 2 == 0 else _alternatives(piece) for place, piece in enumerate(pieces)]
    return ["".join(chosen) for chosen in product(*choices)]


def filesystem(address: str) -> tuple[Any, str]:
    """(fsspec's filesystem, the path in it). Raises InputError for a kind of address that is not known."""
    try:
        return fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise InputError(f"{address}: a library for this kind of address is missing ({error})") from error
    except ValueError as error:
        raise InputError(f"{address}: not an address that can be read ({error})") from error


@contextmanager
def reading(address: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn what reading a damaged or unreachable shard raises into an InputError with its address."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{address}: no such file") from error
    except (OSError, EOFError, *errors) as error:  # type: ignore[misc]
        raise InputError(
            f"{address}: damaged, cut short or out of reach ({error or type(error).__name__}): get it again"
        ) from error


def need(module: str, what: str) -> ModuleType:
    """A module that training needs and the rest does not. Raises InputError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{what} needs {module.split('.')[0]}: pip install 'openlance[train]'") from error


def _alternatives(inside: str) -> list[str]:
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if not bounds:
        return inside.split(",")
    first, last = int(bounds[1]), int(bounds[2])
    if last < first:
        raise InputError(f"{{{inside}}}: the numbers must go up")
    return [f"{number:0{len(bounds[1])}}" for number in range(first, last + 1)]


def _find(address: str, suffixes: tuple[str, ...]) -> list[str]:
    files, root = filesystem(address)
    with reading(address):
        if re.search(r"[*\[]", root):
            found = [path for path in files.glob(root) if files.isfile(path)]
        elif files.isdir(root):
            below = ((path, path.removeprefix(root)) for path in files.find(root))
            found = [p for p, name in below if name.lower().endswith(suffixes) and not _hidden(name)]
        else:
            found = [root] if files.exists(root) else []
            if not found:
                raise InputError(f"{address}: no such file or folder")
    if not found:
        raise InputError(f"{address}: no files there that end in {', '.join(suffixes)}")
    return [path if "file" in files.protocol else files.unstrip_protocol(path) for path in found]


def _hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) for part in path.split("/"))
