"""Lanes of packs: within the budget, the same for every number of processes, and resumed bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from memory import Pictures, Talk, content, ids, plan, stored, talk
from tiny import config, vae

from openlance.data.example import Record
from openlance.data.feed import Feed
from openlance.data.lanes import Dataset, Lane, Plan
from openlance.data.mixture import Mixture, Schedule
from openlance.data.tally import TOO_LONG, Skipped
from openlance.errors import InputError
from openlance.sequence.segment import Role
from openlance.sequence.template import Task

PICTURES = Dataset("pictures", Pictures(5), (Task.T2I, Task.X2T_IMAGE))
MIXED = Schedule(((0, Mixture(chat=60)), (3, Mixture(chat=20, images=(50, 25, 25)))))


def mixed(**changes: Any) -> Plan:
    """Words and pictures, with rows that cannot be used among them."""
    words = talk(Talk((7, 5, 6, 9), bad=5, long=7))
    return plan(words, PICTURES, **({"mixture": MIXED, "lanes": 4, "budget": 150, "longest": 200} | changes))


def test_packs_keep_the_budget_unless_one_sample_is_longer() -> None:
    lane = Lane(plan(talk(Talk((40,), long=4)), budget=120, longest=1000), 0)
    packs = [lane.pack(step) for step in range(30)]
    for pack in packs:
        assert pack.tokens <= 120 or len(pack.rows) == 1
    assert any(len(pack.rows) > 1 for pack in packs) and any(pack.tokens > 120 for pack in packs)


def test_a_pack_is_filled_until_the_next_row_does_not_fit() -> None:
    feed = Feed(plan(lanes=1))
    packs = [pack for step in range(6) for pack in feed.packs(step)]
    for pack, after in pairwise(packs):
        assert pack.tokens == sum(len(segment) for sample in pack.samples for segment in sample)
        assert pack.tokens + sum(map(len, after.samples[0])) > 200


def test_what_does_not_fit_begins_the_next_pack() -> None:
    """No row is lost or doubled: the packs laid end to end are the order of the rows."""
    source = Talk((30,))
    small, large = (Lane(plan(talk(source), lanes=1, budget=budget), 0) for budget in (90, 6000))
    rows = [row for pack in ids(small, range(30)) for row in pack]
    assert rows == ids(large, range(1))[0][: len(rows)]
    assert len(set(rows[:30])) == 30


@pytest.mark.parametrize("world", [2, 4])
def test_the_packs_of_a_step_do_not_depend_on_the_number_of_processes(world: int) -> None:
    alone = Feed(mixed(), vae=vae())
    ranks = [Feed(mixed(), rank=rank, world=world, vae=vae()) for rank in range(world)]
    for step in range(3):
        together = {pack.lane: content(pack) for pack in alone.packs(step)}
        shared = {pack.lane: content(pack) for rank in ranks for pack in rank.packs(step)}
        assert shared == together


def test_a_lane_goes_on_bit_for_bit_from_any_step() -> None:
    lane = Lane(mixed(), 1)
    states, packs = [lane.state()], []
    for step in range(8):
        packs.append(content(lane.pack(step)))
        states.append(stored(lane.state()))
    for start, state in enumerate(states):
        again = Lane(mixed(), 1, state)
        assert [content(again.pack(step)) for step in range(start, 8)] == packs[start:]
        assert stored(again.state()) == states[-1]


def test_a_run_goes_on_with_another_number_of_processes() -> None:
    before = [Feed(mixed(), rank=rank, world=2, vae=vae(), posterior=True) for rank in range(2)]
    for step in range(3):
        for feed in before:
            list(feed.packs(step))
    states = stored(before[0].state() | before[1].state())
    expected = {p.lane: content(p) for feed in before for p in feed.packs(3)}
    alone = Feed(mixed(), vae=vae(), posterior=True)
    alone.restore(states)
    assert {pack.lane: content(pack) for pack in alone.packs(3)} == expected


def test_a_state_is_of_the_last_whole_step() -> None:
    feed = Feed(plan())
    list(feed.packs(0))
    state = feed.state()
    packs = feed.packs(1)
    next(packs)
    assert feed.state() == state
    list(packs)
    assert feed.state() != state


def test_seeds_and_lanes_are_in_orders_of_their_own() -> None:
    lanes = [Lane(plan(seed=seed, lanes=2), lane) for seed in (0, 1) for lane in (0, 1)]
    found = [tuple(map(tuple, ids(lane, range(4)))) for lane in lanes]
    assert len(set(found)) == 4
    assert ids(Lane(plan(seed=1), 1), range(4)) == list(map(list, found[3]))


def test_the_mixture_is_drawn() -> None:
    shares = Schedule.constant(Mixture(chat=50, image_generation=40, image_understanding=10))
    lane = Lane(plan(talk(), PICTURES, mixture=shares, lanes=1, budget=30_000), 0)
    tasks = [row.task for row in lane.pack(0).rows]
    for task, share in ((Task.CHAT, 0.5), (Task.T2I, 0.4), (Task.X2T_IMAGE, 0.1)):
        spread = (share * (1 - share) / len(tasks)) ** 0.5
        assert abs(tasks.count(task) / len(tasks) - share) < 4 * spread


def test_rows_that_cannot_be_used_are_passed_over_and_counted() -> None:
    source = Talk((24,), bad=6, long=8)
    feed = Feed(plan(talk(source), lanes=1, longest=200))
    rows: list[str] = []
    step = 0
    while len(rows) < 60:
        rows += [row for pack in feed.packs(step) for row in pack.ids]
        step += 1
    unusable = {f"talk-0:{row}" for row in (0, 6, 12, 18, 1, 9, 17)}
    assert set(rows) == {f"talk-0:{row}" for row in range(24)} - unusable
    assert feed.tally.rows == len(rows)
    reasons = dict(feed.tally.skipped)
    long = reasons.pop(TOO_LONG)
    (bad,) = reasons.values()
    assert isinstance(bad, Skipped) and set(bad.first) <= {f"talk-0:{row}" for row in (0, 6, 12, 18)}
    assert set(long.first) == {f"talk-0:{row}" for row in (1, 9, 17)}
    epochs = len(rows) / 17
    assert 4 * int(epochs) <= bad.count <= 4 * (int(epochs) + 1)


def test_a_dataset_of_nothing_usable_stops_the_run_with_the_reason() -> None:
    lane = Lane(plan(talk(Talk((3,), bad=1))), 0)
    with pytest.raises(InputError, match=r"chat:talk: 1000 rows .* cannot be used.*talk-0:\d"):
        lane.pack(0)


def test_a_shard_that_cannot_be_read_stops_the_run() -> None:
    with pytest.raises(InputError, match="talk-0: damaged"):
        Lane(plan(talk(Talk((3,), broken=0))), 0).pack(0)


def test_an_error_that_nobody_foresaw_names_the_row() -> None:
    class Odd(Talk):
        def read(self, shard: int, start: int = 0) -> Iterator[Record]:
            yield Record("odd:3", None)  # type: ignore[arg-type]

    with pytest.raises(TypeError) as error:
        Lane(plan(talk(Odd((1,)))), 0).pack(0)
    assert error.value.__notes__ == ["while reading row odd:3"]


def test_latents_come_from_the_vae() -> None:
    pictures = plan(PICTURES, mixture=Schedule.constant(Mixture()), lanes=1, longest=1000)
    with pytest.raises(InputError, match=r"pictures:\d is not encoded: load the VAE"):
        list(Feed(pictures).packs(0))

    def latents(**how: Any) -> torch.Tensor:
        (pack,) = Feed(pictures, vae=vae(), **how).packs(0)
        targets = [s for sample in pack.samples for s in sample if s.role is Role.TARGET]
        assert all(s.latents is not None and tuple(s.latents.shape[:3]) == s.grid for s in targets)
        return targets[0].latents  # type: ignore[return-value]

    assert torch.equal(latents(), latents())
    assert torch.equal(latents(posterior=True), latents(posterior=True))
    assert not torch.equal(latents(), latents(posterior=True))


def test_sizes_follow_their_schedule() -> None:
    """What was left over before a change keeps its size."""
    sizes = Schedule(((0, replace(config().sizes, image=32)), (2, config().sizes)))
    shares = Schedule.constant(Mixture())
    drawn = Dataset("pictures", Pictures(5), (Task.T2I,))
    lane = Lane(plan(drawn, mixture=shares, lanes=1, budget=1000, longest=1000, sizes=sizes), 0)
    found = [[row.target.pixels.shape[1:3] for row in lane.pack(step).rows] for step in range(3)]  # type: ignore
    small, large = {(32, 48)}, {(48, 64)}
    assert set(found[0]) == set(found[1]) == {found[2][0]} == small
    assert set(found[2][1:]) == large


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(InputError, match="2 lanes cannot be shared evenly by 3 processes"):
        Feed(plan(), world=3)
    with pytest.raises(InputError, match="has 2 lanes, not 4"):
        Feed(plan(lanes=4)).restore(Feed(plan()).state())
    with pytest.raises(InputError, match=r"data are chat:talk, now they are chat:talk, t2i:pictures"):
        Lane(mixed(), 0, Lane(plan(), 0).state())
    with pytest.raises(InputError, match="two datasets have one name"):
        plan(talk(), talk())
    with pytest.raises(InputError, match="draws none of the tasks that there is data for \\(chat\\)"):
        plan(mixture=Schedule.constant(Mixture()))
    feed = Feed(plan())
    list(feed.packs(5))
    with pytest.raises(ValueError, match="step 6 comes next, not 5"):
        list(feed.packs(5))


def test_tasks_without_data_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    Feed(plan(talk(), mixture=Schedule.constant(Mixture(chat=1))))
    Feed(plan(talk(), mixture=Schedule.constant(Mixture(chat=1))), rank=1, world=2)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["no data for t2v, x2t_video, t2i, x2t_image: their share goes to the others"]


@pytest.mark.slow
def test_workers_change_nothing() -> None:
    """Three lanes on two workers: one has two. A state does not see what was read ahead."""
    lanes = mixed(lanes=3)
    alone, helped = Feed(lanes, vae=vae()), Feed(lanes, workers=2, vae=vae())
    for step in range(4):
        expected = [content(pack) for pack in alone.packs(step)]
        assert [content(pack) for pack in helped.packs(step)] == expected
        assert stored(helped.state()) == stored(alone.state())
    helped.restore(stored(alone.state()))
    assert [content(pack) for pack in helped.packs(4)] == [content(pack) for pack in alone.packs(4)]


@pytest.mark.slow
def test_a_worker_s_error_comes_as_it_is() -> None:
    feed = Feed(plan(talk(Talk((3, 3), broken=1))), workers=2)
    with pytest.raises(InputError) as error:
        for step in range(9):
            list(feed.packs(step))
    assert str(error.value) == "talk-1: damaged"


@pytest.mark.slow
def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time\n"
        "from memory import plan\n"
        "from openlance.data.feed import Feed\n"
        "if __name__ == '__main__':\n"
        "    feed = Feed(plan(), workers=2)\n"
        "    list(feed.packs(0))\n"
        "    children = open(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read()\n"
        "    print(children, flush=True)\n"
        "    time.sleep(600)\n"
    )
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here, here.parent, here.parent.parent)))
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) >= 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until = time.monotonic() + 60
    while any(map(alive, children)) and time.monotonic() < until:
        time.sleep(0.5)
    assert not any(map(alive, children))


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
