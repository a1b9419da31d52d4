"""The order of a lane's rows: nothing is left out or seen twice, and any place can be gone on from."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from memory import Talk

from openlance.data.order import Order, Place
from openlance.errors import InputError

SOURCES = {
    "whole shards": Talk((7, 5, 6, 9, 1)),
    "rows of shards": Talk((11, 4)),
    "fewer rows than lanes": Talk((2,)),
}


def order(source: Talk, lane: int = 0, **changes: Any) -> Order:
    return Order(source, "talk", **({"seed": 0, "lanes": 3, "block": 4} | changes), lane=lane)


def epoch(found: Order, number: int) -> list[str]:
    rows = itertools.takewhile(lambda item: item[1].epoch <= number, found.rows(Place(number)))
    return [record.id for record, place in rows if place.epoch == number]


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_lanes_of_an_epoch_have_each_row_once(source: Talk, number: int) -> None:
    found = [row for lane in range(3) for row in epoch(order(source, lane), number)]
    rows = [record.id for shard in range(len(source.counts)) for record in source.read(shard)]
    assert sorted(found) == sorted(rows)


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_a_lane_has_each_row_once_in_as_many_epochs_as_lanes(source: Talk) -> None:
    found = [row for number in range(3) for row in epoch(order(source), number)]
    assert len(found) == len(set(found)) == sum(source.counts)


def test_epochs_seeds_and_names_are_in_orders_of_their_own() -> None:
    source = Talk((40,))
    orders = [
        epoch(order(source, lanes=1), 0),
        epoch(order(source, lanes=1), 1),
        epoch(order(source, lanes=1, seed=1), 0),
        epoch(Order(source, "other", 0, 0, 1, 4), 0),
    ]
    assert all(a != b and sorted(a) == sorted(b) for a, b in itertools.combinations(orders, 2))
    assert epoch(order(source, lanes=1), 0) == orders[0]


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_any_place_can_be_gone_on_from(source: Talk) -> None:
    rows = list(itertools.islice(order(source, 1).rows(Place()), 40))
    for taken in range(30):
        place = rows[taken][1]
        again = itertools.islice(order(source, 1).rows(Place(*place)), 10)
        assert [(record.id, p) for record, p in again] == [
            (record.id, p) for record, p in rows[taken + 1 : taken + 11]
        ]


def test_a_source_without_rows_is_refused() -> None:
    with pytest.raises(InputError, match="talk: the dataset has no rows"):
        next(order(Talk((0, 0))).rows(Place()))
