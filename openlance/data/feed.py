"""The packs of one process of a run, read ahead by worker processes where wanted."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import replace
from io import BytesIO
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from openlance.data.lanes import Lane, Pack, Plan, State
from openlance.data.tally import Tally
from openlance.data.tasks import encode_rows, to_sample
from openlance.errors import InputError

if TYPE_CHECKING:
    from openlance.model.vae import VAE

log = logging.getLogger("openlance")

AHEAD = 2
"""Steps that a worker reads ahead."""

Served = Iterator[tuple[Pack, State]]
"""The packs of one step, each with its lane's state behind it."""


class Feed:
    """The packs of one process (`rank` of `world`): it has the lanes l with l % world == rank.

    vae: encodes what the data has as pixels; needed where pictures are generated and the data is not
    encoded yet. posterior: draw latents from the VAE's posterior, instead of taking its mean. workers:
    processes that read ahead, each for whole lanes, so no more than there are lanes; 0 reads in this one.
    Raises InputError where the lanes cannot be shared evenly.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        vae: VAE | None = None,
        posterior: bool = False,
    ) -> None:
        if plan.lanes % world:
            raise InputError(f"{plan.lanes} lanes cannot be shared evenly by {world} processes")
        self.plan, self.vae, self.posterior = plan, vae, posterior
        self.lanes = tuple(range(rank, plan.lanes, world))
        self.workers = min(workers, len(self.lanes))
        self._states = {lane: Lane(plan, lane).state() for lane in self.lanes}
        self._served: Iterator[Served] | None = None
        self._next: int | None = None
        if plan.missing and rank == 0:
            log.warning("no data for %s: their share goes to the others", ", ".join(plan.missing))

    def packs(self, step: int) -> Iterator[Pack]:
        """This process's packs of a step, in the order of their lanes, ready for the network.

        Steps must follow each other. Raises InputError where a dataset cannot be read, and where latents are
        missing and there is no VAE to make them.
        """
        if self._next not in (None, step):
            raise ValueError(f"step {self._next} comes next, not {step}")
        if self._served is None:
            self._served = _serve(self.plan, self._states, step, self.workers)
        states = {}
        for pack, state in next(self._served):
            states[pack.lane] = state
            yield self._ready(pack)
        self._states, self._next = states, step + 1

    def state(self) -> dict[str, State]:
        """Where this process's lanes stand after the last step whose packs were all taken, by lane."""
        return {str(lane): state for lane, state in self._states.items()}

    def restore(self, states: Mapping[str, State]) -> None:
        """Go on from the states of all lanes, however many processes they come from.

        Raises InputError for another number of lanes.
        """
        if len(states) != self.plan.lanes:
            raise InputError(f"the checkpoint's data has {len(states)} lanes, not {self.plan.lanes}")
        self._states = {lane: states[str(lane)] for lane in self.lanes}
        self._next = self._states[self.lanes[0]]["next"]
        self._served = None

    @property
    def tally(self) -> Tally:
        """What this process's lanes have read up to their state."""
        return sum((Tally.of(state["tally"]) for state in self._states.values()), Tally())

    def _ready(self, pack: Pack) -> Pack:
        """The pack with its samples, latents included."""
        rows = pack.rows
        if self.vae is not None:
            rows = encode_rows(rows, self.vae, self._generator(pack) if self.posterior else None)
        bare = next((row.id for row in rows if not all(view.encoded for view in row.views())), None)
        if bare is not None:
            raise InputError(f"{bare} is not encoded: load the VAE, or run `openlance data encode` first")
        encode = self.plan.tokenizer.encode_with_offsets
        return replace(pack, rows=rows, samples=[to_sample(row, encode, self.plan.model) for row in rows])

    def _generator(self, pack: Pack) -> torch.Generator:
        """Of its own for every pack, so that it does not depend on the packs before."""
        seed = np.random.default_rng((self.plan.seed, pack.step, pack.lane)).integers(2**63)
        return torch.Generator().manual_seed(int(seed))


def _serve(plan: Plan, states: Mapping[int, State], step: int, workers: int) -> Iterator[Served]:
    """The packs of these lanes, step by step without end. Raises InputError as `Lane.pack`."""
    if not workers:
        yield from _in_step(plan, states, step)
    loader = DataLoader(
        _Share(plan, states, step),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        prefetch_factor=AHEAD,
        multiprocessing_context="spawn",  # a fork would copy locks that reading threads hold
        generator=torch.Generator(),  # else it draws from the run's own
    )
    items = iter(loader)
    while True:  # the workers take turns, so these are the lanes of one step
        yield _merged([next(items) for _ in range(workers)], tuple(states))


def _in_step(plan: Plan, states: Mapping[int, State], step: int) -> Iterator[Served]:
    """The packs of these lanes by step, made when they are taken."""
    lanes = [Lane(plan, number, state) for number, state in states.items()]
    for now in count(step):
        yield ((lane.pack(now), lane.state()) for lane in lanes)


class _Share(IterableDataset):
    """What a worker process makes: for every step a list of its lanes' packs, pickled; or the error."""

    def __init__(self, plan: Plan, states: Mapping[int, State], step: int) -> None:
        self.plan, self.states, self.step = plan, states, step

    def __iter__(self) -> Iterator[list[Tensor] | InputError]:
        worker = get_worker_info()
        assert worker is not None
        mine = dict(list(self.states.items())[worker.id :: worker.num_workers])
        try:
            for served in _in_step(self.plan, mine, self.step):
                yield [_to_bytes(item) for item in served]
        except InputError as error:
            yield error  # raised over there, its message would be a traceback


def _merged(shares: list[list[Tensor] | InputError], lanes: tuple[int, ...]) -> Served:
    """The workers' packs of one step in the order of their lanes, each unpickled when it is taken."""
    for place in range(len(lanes)):
        share = shares[place % len(shares)]
        if isinstance(share, InputError):
            raise share
        yield pickle.loads(share[place // len(shares)].numpy().data)


class _Pickler(pickle.Pickler):
    """Tensors as arrays: pickled so, thousands of small ones need no file of shared memory each."""

    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, Tensor) else NotImplemented


def _to_bytes(value: object) -> Tensor:
    """uint8 [n]; a tensor, since these reach the other process without a copy."""
    buffer = BytesIO()
    _Pickler(buffer, protocol=5).dump(value)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def _as_it_is(value: object) -> object:
    return value
