"""Rows of Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fsspec

from openlance.data.example import Record
from openlance.data.storage import find_files, need, reading

SUFFIXES = (".parquet",)
ROWS = 8  # decoded at a time: a row may hold a whole clip
BUFFER = 2**20


@dataclass(frozen=True)
class ParquetSource:
    """One shard a file. Row groups before the first wanted row are not read."""

    shards: tuple[str, ...]

    @classmethod
    def open(cls, address: str) -> ParquetSource:
        need("pyarrow", "reading Parquet")
        return cls(find_files(address, SUFFIXES))

    def read(self, shard: int, start: int = 0) -> Iterator[Record]:
        """The rows from `start` on. Raises InputError for a file that is no Parquet, or damaged."""
        arrow, parquet = need("pyarrow", "reading Parquet"), need("pyarrow.parquet", "reading Parquet")
        address = self.shards[shard]
        with reading(address, arrow.ArrowException), fsspec.open(address, "rb") as raw:
            file = parquet.ParquetFile(raw, buffer_size=BUFFER, pre_buffer=False)
            groups, row = _from(file.metadata, start)
            for batch in file.iter_batches(ROWS, row_groups=groups):
                wanted = batch.slice(max(0, start - row))
                row += len(batch) - len(wanted)
                for values in wanted.to_pylist():
                    yield Record(f"{address}:{row}", values)
                    row += 1

    def count(self, shard: int) -> int:
        """From the file's footer. Raises InputError as `read` does."""
        arrow, parquet = need("pyarrow", "reading Parquet"), need("pyarrow.parquet", "reading Parquet")
        address = self.shards[shard]
        with reading(address, arrow.ArrowException), fsspec.open(address, "rb") as raw:
            return parquet.read_metadata(raw).num_rows


def _from(metadata: Any, start: int) -> tuple[list[int], int]:
    """(the row groups that hold row `start` and what follows, the first row of these)."""
    first = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if start < first + rows:
            return list(range(group, metadata.num_row_groups)), first
        first += rows
    return [], first
