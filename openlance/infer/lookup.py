"""Guesses of what is said next, from what was said before."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle, islice

RUNS = (3, 2)
"""How many last ids must have stood before, most telling first."""


class Lookup:
    """What followed when the last ids stood there before: prompt lookup decoding, the n-gram case of
    speculative decoding (arXiv 2211.17192)."""

    def __init__(self, ids: Iterable[int]):
        self.ids: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}  # a run of ids -> the place after its last occurrence
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        """One more id was said."""
        for run in RUNS:
            if len(self.ids) >= run:
                self._behind[tuple(self.ids[-run:])] = len(self.ids)
        self.ids.append(token)

    def guess(self, most: int) -> list[int]:
        """The next ids, `most` of them or none. Where they run into the end, they begin again."""
        for run in RUNS:
            place = self._behind.get(tuple(self.ids[-run:]))
            if place is not None:
                return list(islice(cycle(self.ids[place:]), max(most, 0)))
        return []
