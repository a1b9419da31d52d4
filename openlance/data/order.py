"""The rows of a source in a seeded order, one lane's part of them, from any place on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple
from zlib import crc32

import numpy as np

from openlance.data.example import Record, Source
from openlance.errors import InputError


class Place(NamedTuple):
    """A place in the order: epoch, shard (counted in the epoch's order), the row at which the block begins,
    and how many rows of the block lie behind."""

    epoch: int = 0
    shard: int = 0
    row: int = 0
    taken: int = 0


@dataclass(frozen=True, eq=False)
class Order:
    """One lane's part of a source, in another order every epoch.

    Of every epoch a lane has the shards i with (i + epoch) % lanes == lane, or, where there are fewer shards
    than lanes, these rows of every shard: each row belongs to one lane, and to another in the next epoch.
    Shards are permuted, and rows within blocks of `block`, so that memory holds one block. name and seed
    choose the order.
    """

    source: Source
    name: str
    seed: int
    lane: int
    lanes: int
    block: int = 64

    def rows(self, place: Place) -> Iterator[tuple[Record, Place]]:
        """The rows from a place on, without end, each with the place behind it.

        Raises InputError where the source has no rows.
        """
        empty = 0
        while True:
            epoch, found = place.epoch, False
            shards = self._shards(epoch)
            for number in range(place.shard, len(shards)):
                for first, rows in self._blocks(shards[number], epoch, place.row):
                    found = True
                    for taken in range(place.taken, len(rows)):
                        yield rows[taken], Place(epoch, number, first, taken + 1)
                    place = Place(epoch)
                place = Place(epoch)
            place, empty = Place(epoch + 1), 0 if found else empty + 1
            if empty == self.lanes:  # every row was this lane's turn once
                raise InputError(f"{self.name}: the dataset has no rows")

    def _shards(self, epoch: int) -> list[int]:
        """The shards that this lane reads in an epoch, in their order."""
        count = len(self.source.shards)
        mine = [i for i in range(count) if not self._whole or self._is_mine(i, epoch)]
        return self._rng(epoch).permutation(mine).tolist()

    def _blocks(self, shard: int, epoch: int, start: int) -> Iterator[tuple[int, list[Record]]]:
        """(row at which the block begins, its rows in their order) from the block at `start` on."""
        first, rows = start, []
        for number, record in enumerate(self.source.read(shard, start), start):
            if self._whole or self._is_mine(number, epoch):
                rows.append(record)
            if len(rows) == self.block:
                yield first, self._mixed(rows, epoch, shard, first)
                first, rows = number + 1, []
        if rows:
            yield first, self._mixed(rows, epoch, shard, first)

    def _mixed(self, rows: list[Record], *at: int) -> list[Record]:
        return [rows[i] for i in self._rng(*at).permutation(len(rows))]

    @property
    def _whole(self) -> bool:
        """Whether lanes read whole shards."""
        return len(self.source.shards) >= self.lanes

    def _is_mine(self, number: int, epoch: int) -> bool:
        return (number + epoch) % self.lanes == self.lane

    def _rng(self, *at: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, crc32(self.name.encode()), self.lane, *at))
