"""Datasets in memory whose rows say where they stand, and what the lanes make of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
from stored import jpeg
from tiny import config, tokenizer
from torch import Tensor

from openlance.data.example import Record
from openlance.data.lanes import Dataset, Lane, Plan, State
from openlance.data.mixture import Mixture, Schedule
from openlance.errors import InputError
from openlance.sequence.template import Task

TALK = Schedule.constant(Mixture(chat=1))


@dataclass(frozen=True)
class Talk:
    """Short conversations. counts: rows of each shard. Every `bad`th row cannot be read, every `long`th one
    is long; the shard `broken` cannot be read at all."""

    counts: tuple[int, ...]
    bad: int = 0
    long: int = 0
    broken: int | None = None

    @property
    def shards(self) -> tuple[str, ...]:
        return tuple(f"talk-{n}" for n in range(len(self.counts)))

    def read(self, shard: int, start: int = 0) -> Iterator[Record]:
        if shard == self.broken:
            raise InputError(f"talk-{shard}: damaged")
        for row in range(start, self.counts[shard]):
            yield Record(f"talk-{shard}:{row}", self.values(shard, row))

    def values(self, shard: int, row: int) -> dict[str, Any]:
        place = sum(self.counts[:shard]) + row
        if self.bad and place % self.bad == 0:
            return {"turns": "[]"}
        words = "What colour is the square? " * (20 if self.long and place % self.long == 1 else row % 3 + 1)
        turns = [{"role": "user", "content": words}, {"role": "assistant", "content": "Blue."}]
        return {"turns": json.dumps(turns)}


@dataclass(frozen=True)
class Pictures:
    """Grey pictures with captions."""

    count: int

    @property
    def shards(self) -> tuple[str, ...]:
        return ("pictures",)

    def read(self, shard: int, start: int = 0) -> Iterator[Record]:
        for row in range(start, self.count):
            values = {"caption": f"grey {row}", "image_bytes": jpeg(10 * row)}
            yield Record(f"pictures:{row}", values)


def talk(source: Any = None, name: str = "talk") -> Dataset:
    return Dataset(name, Talk((7, 5, 6, 9)) if source is None else source, (Task.CHAT,))


def plan(*datasets: Dataset, **changes: Any) -> Plan:
    settings = {"mixture": TALK, "lanes": 2, "budget": 200, "longest": 300, "block": 4} | changes
    return Plan(datasets or (talk(),), model=config(), tokenizer=tokenizer(), **settings)


def ids(lane: Lane, steps: range) -> list[list[str]]:
    return [lane.pack(step).ids for step in steps]


def content(value: Any) -> Any:
    """Everything that a pack holds, to be compared."""
    if is_dataclass(value):
        return {field.name: content(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    return [content(item) for item in value] if isinstance(value, (list, tuple)) else value


def stored(state: State) -> State:
    """A state as it comes back from a file."""
    return json.loads(json.dumps(state))
