"""Rows of Hugging Face datasets, as streams: nothing is stored but what the library caches itself.

An address is `hf://datasets/NAME`, or the path of a folder that `datasets` can load or has saved, with
`?config=…&split=…&revision=…` behind it as wanted; the split is `train` unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import fsspec

from openlance.data.example import Record
from openlance.data.storage import need
from openlance.errors import InputError

HUB = "hf://datasets/"
OPTIONS = ("config", "split", "revision")
SUFFIXES = (".arrow",)  # of a dataset that the library saved


@dataclass(frozen=True)
class DatasetStream:
    """One shard a file of the stream. `dataset` is a `datasets.IterableDataset`, its media not decoded."""

    shards: tuple[str, ...]
    dataset: Any

    @classmethod
    def open(cls, address: str) -> DatasetStream:
        """Raises InputError for options that are not known, and whatever the library cannot load."""
        need("datasets", "reading Hugging Face datasets")
        name, _, query = address.partition("?")
        options = dict(parse_qsl(query, keep_blank_values=True))
        if unknown := sorted(set(options) - set(OPTIONS)):
            raise InputError(
                f"{address}: unknown option {', '.join(unknown)}: choose of {', '.join(OPTIONS)}"
            )
        dataset = _load(address, name, **options)
        if dataset.features:  # else the library does not know of media either
            dataset = dataset.decode(False)
        return cls(tuple(f"{address}#{n:05}" for n in range(dataset.num_shards)), dataset)

    def read(self, shard: int, start: int = 0) -> Iterator[Record]:
        """The rows from `start` on. Raises InputError where the stream breaks off."""
        address = self.shards[shard]
        part = self.dataset.shard(num_shards=len(self.shards), index=shard).skip(start)
        with _loading(address):
            # `iter` and not `iter()`: the latter would split the rows once more among torch's workers.
            for row, batch in enumerate(part.iter(batch_size=1), start):
                yield Record(f"{address}:{row}", {name: _plain(values[0]) for name, values in batch.items()})

    def count(self, shard: int) -> None:
        """Not known before the rows are read."""


def _load(
    address: str, name: str, config: str | None = None, split: str = "train", revision: str | None = None
) -> Any:
    """The split as a stream."""
    import datasets

    saved = _saved(Path(name), split)
    with _loading(address):
        if saved is not None:
            stored = datasets.load_from_disk(str(saved))
            return stored.to_iterable_dataset(num_shards=max(1, len(stored.cache_files)))
        return datasets.load_dataset(
            name.removeprefix(HUB), config, split=split, revision=revision, streaming=True
        )


def _saved(folder: Path, split: str) -> Path | None:
    """The folder of a split that `save_to_disk` wrote; None where it did not."""
    if (folder / "dataset_dict.json").is_file():
        return folder / split
    return folder if (folder / "state.json").is_file() else None


@contextmanager
def _loading(address: str) -> Iterator[None]:
    """Turn what the library raises for data that it cannot find, reach or understand into an InputError."""
    import pyarrow
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, DatasetsError, pyarrow.ArrowException) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{address}: cannot be read as a Hugging Face dataset ({reason})") from error


def _plain(value: Any) -> Any:
    """The bytes of what the library holds as {"bytes": …, "path": …}; other values as they are."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, dict) or set(value) != {"bytes", "path"}:
        return value
    if value["bytes"] is not None or value["path"] is None:
        return value["bytes"]
    with fsspec.open(value["path"], "rb") as file:
        return file.read()
