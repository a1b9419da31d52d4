"""The stream of training data: lanes of packs, the same however many processes share them.

A run has a number of lanes, the micro-batches of a step. Each lane is a stream of its own: it reads its part
of every dataset in a seeded order, draws from which one the next row comes, and fills packs up to a budget of
tokens. Step k takes pack k of every lane. A lane's state is a small dictionary; a lane that is given it
back goes on with exactly the pack that would have come.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from openlance.config import ModelConfig, Sizes
from openlance.data.encode import is_encoded, to_encoded_row
from openlance.data.example import Record, Source
from openlance.data.mixture import Mixture, Schedule
from openlance.data.order import Order, Place
from openlance.data.schemas import BadRow, to_example
from openlance.data.tally import TOO_LONG, Tally
from openlance.data.tasks import Row, to_row, to_sample
from openlance.errors import InputError
from openlance.sequence.segment import Sample
from openlance.sequence.template import Task
from openlance.tokenizer import Tokenizer

PATIENCE = 1000
"""Rows of one dataset that may be skipped in a row before the run is stopped."""

State = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A source, and the tasks that its rows can serve. weight: against other sources of the same task."""

    name: str
    source: Source
    tasks: tuple[Task, ...]
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class Plan:
    """What a run reads, the same for all its lanes.

    budget: tokens of a pack; only a single sample may be longer. longest: tokens of a sample; a longer one
    is skipped. block: rows that are mixed among each other, see `Order`. Raises InputError for two datasets
    of one name, and where the mixture draws nothing that is there.
    """

    datasets: tuple[Dataset, ...]
    mixture: Schedule[Mixture]
    model: ModelConfig
    tokenizer: Tokenizer
    lanes: int
    budget: int
    longest: int
    sizes: Schedule[Sizes] | None = None  # default: the checkpoint's own
    seed: int = 0
    block: int = 64

    def __post_init__(self) -> None:
        names = [dataset.name for dataset in self.datasets]
        if len(set(names)) < len(names):
            raise InputError(f"two datasets have one name: {', '.join(sorted(names))}")
        if any(dataset.weight <= 0 for dataset in self.datasets):
            raise InputError("the weight of a dataset must be above 0: leave it out instead")
        for mixture in self.mixture.values:
            mixture.over(self.tasks)

    @property
    def tasks(self) -> frozenset[Task]:
        """What there is data for."""
        return frozenset(task for dataset in self.datasets for task in dataset.tasks)

    @property
    def missing(self) -> tuple[Task, ...]:
        """The tasks that the mixture would draw and that there is no data for."""
        found = dict.fromkeys(task for mixture in self.mixture.values for task in mixture.missing(self.tasks))
        return tuple(found)

    def sizes_at(self, step: int) -> Sizes:
        return self.model.sizes if self.sizes is None else self.sizes.at(step)

    def streams(self) -> dict[str, tuple[Task, Dataset]]:
        """Each task of each dataset, by name."""
        return {f"{task}:{data.name}": (task, data) for data in self.datasets for task in data.tasks}

    def chances(self, step: int) -> list[float]:
        """The probability of each stream, in the order of `streams`."""
        shares, streams = self.mixture.at(step).over(self.tasks), self.streams().values()
        whole = {task: sum(data.weight for other, data in streams if other is task) for task in self.tasks}
        return [shares.get(task, 0.0) * data.weight / whole[task] for task, data in streams]


@dataclass(frozen=True, eq=False)
class Pack:
    """Samples that go through the network together. tokens: of all of them."""

    lane: int
    step: int
    rows: list[Row]
    tokens: int
    samples: list[Sample] = field(default_factory=list)

    @property
    def ids(self) -> list[str]:
        return [row.id for row in self.rows]


class _Stream:
    """One task of one dataset as a lane reads it: where it stands, and the rows from there."""

    def __init__(self, task: Task, order: Order, place: Place) -> None:
        self.task, self.place = task, place
        self._rows = order.rows(place)

    def next(self) -> Record:
        record, self.place = next(self._rows)
        return record


class Lane:
    """One stream of packs. state: of an earlier lane of this number, to go on from.

    Raises InputError where the state is of other datasets.
    """

    def __init__(self, plan: Plan, number: int, state: State | None = None) -> None:
        self.plan, self.number = plan, number
        self.tally = Tally.of(state["tally"] if state else {})
        self._rng = np.random.default_rng((plan.seed, number))
        streams = plan.streams()
        places = dict.fromkeys(streams, Place()) if state is None else state["places"]
        if set(places) != set(streams):
            raise InputError(
                f"the checkpoint's data are {', '.join(sorted(places))}, now they are "
                f"{', '.join(sorted(streams))}: go on with the same datasets, or begin a new run"
            )
        self._streams = [
            _Stream(task, self._order(name, data), Place(*places[name]))
            for name, (task, data) in streams.items()
        ]
        self._names = list(streams)
        self._chances: dict[Mixture, list[float]] = {}
        self._left: tuple[Row, int] | None = None
        if state is not None:
            self._rng.bit_generator.state = state["rng"]
        self._state = self._snapshot(None, None) if state is None else state
        if self._state["left"] is not None:
            self._left = self._draw(self._state["left"])

    def _order(self, name: str, data: Dataset) -> Order:
        plan = self.plan
        return Order(data.source, name, plan.seed, self.number, plan.lanes, plan.block)

    def pack(self, step: int) -> Pack:
        """The pack of a step: rows up to the budget. What did not fit begins the next one.

        Raises InputError where a dataset cannot be read, or gives nothing that can be used.
        """
        rows: list[Row] = []
        total = 0
        while True:
            before = self._snapshot(step, step + 1)
            row, tokens = self._left or self._draw(step)
            if rows and total + tokens > self.plan.budget:
                self._left, self._state = (row, tokens), before
                return Pack(self.number, step, rows, total)
            self._left = None
            rows.append(row)
            total += tokens

    def state(self) -> State:
        """Where the lane stands after the last pack, plain enough for JSON."""
        return self._state

    def _snapshot(self, left: int | None, following: int | None) -> State:
        """Where the lane stands now. left: the step by whose rules the sample that is left over is drawn
        (again); following: the step of the next pack."""
        return {
            "next": following,
            "left": left,
            "rng": self._rng.bit_generator.state,
            "places": {n: list(s.place) for n, s in zip(self._names, self._streams, strict=True)},
            "tally": self.tally.as_dict(),
        }

    def _draw(self, step: int) -> tuple[Row, int]:
        """(the next row by the mixture of a step, its tokens); rows that cannot be used are passed over."""
        mixture = self.plan.mixture.at(step)
        if mixture not in self._chances:
            self._chances[mixture] = self.plan.chances(step)
        place = int(self._rng.choice(len(self._streams), p=self._chances[mixture]))
        stream = self._streams[place]
        for _ in range(PATIENCE):
            record = stream.next()
            with _named(record):
                found = self._use(record, stream.task, step)
            if found is not None:
                self.tally.rows += 1
                return found
        raise InputError(
            f"{self._names[place]}: {PATIENCE} rows one after the other cannot be used; {self.tally}"
        )

    def _use(self, record: Record, task: Task, step: int) -> tuple[Row, int] | None:
        """(the record as a row, its tokens); None, and counted, where it cannot be used."""
        plan = self.plan
        try:
            if is_encoded(record):
                row = to_encoded_row(record, task)
            else:
                sizes = plan.sizes_at(step)
                row = to_row(to_example(record, sizes, self._rng, task), plan.model, sizes)
        except BadRow as error:
            self.tally.skip(record.id, error.reason)
            return None
        except InputError as error:
            self.tally.skip(record.id, str(error))
            return None
        tokens = sum(map(len, to_sample(row, plan.tokenizer.encode_with_offsets, plan.model)))
        if tokens > plan.longest:
            self.tally.skip(record.id, TOO_LONG)
            return None
        return row, tokens


@contextmanager
def _named(record: Record) -> Iterator[None]:
    """An error that nobody foresaw goes on, with the row that it came from."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while reading row {record.id}")
        raise
