"""The engine: queues jobs and has them done by one worker process a device."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from bisect import insort
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch

from openlance.errors import InputError
from openlance.infer.device import default_device
from openlance.serve.batching import choose_batch
from openlance.serve.job import Job
from openlance.serve.jobs import Busy, JobError, Request, Why
from openlance.serve.process import WorkerProcess
from openlance.serve.settings import ServeConfig
from openlance.serve.wire import (
    Cancel,
    Ended,
    Failed,
    FromWorker,
    Idle,
    Memory,
    ModelInfo,
    Ready,
    Returned,
    Ticket,
    Told,
    Unusable,
)

__all__ = ["Engine", "Job", "ModelInfo", "WorkerState"]

log = logging.getLogger("openlance.serve")

TRIES = 2
GRACE = 30.0
"""Seconds that a worker may take to let go of a job; then it is killed. Decoding a clip cannot be stopped."""
LONGEST_PAUSE = 60.0
"""Seconds between two starts of a worker that cannot load any more."""
RECENT = 0.2  # weight of the last batch in the mean time that a job takes


@dataclass(frozen=True)
class WorkerState:
    """One worker now. alive: loaded, and takes jobs. memory_bytes: resident, and device_bytes: allocated on
    a CUDA device, both after its last batch. jobs_done: of all its lives, those that gave a result."""

    device: str
    alive: bool
    restarts: int
    memory_bytes: int
    device_bytes: int
    jobs_done: int


class _Worker:
    """A device, and the process that now works on it. batch: the jobs it has been given, by id."""

    def __init__(self, device: str):
        self.device = device
        self.process: WorkerProcess | None = None
        self.batch: dict[str, Job] = {}
        self.ready = False  # it has loaded
        self.idle = False  # it waits for a batch
        self.memory = Memory()
        self.restarts = self.jobs_done = 0
        self.failures = 0  # starts since it was last ready
        self.trouble = ""  # why it could not load
        self.taken, self.since = 0, 0.0  # the batch: how many jobs, and when it was given

    def say(self, message: list[Ticket] | Cancel) -> None:
        assert self.process is not None
        self.process.send(message)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()


class Engine:
    """`async with Engine(config) as engine`, or `start` and `stop`. To be used in one event loop's thread.

    model: what is served, known once it has started.

    A worker that is free takes the oldest job and those that go with it (`choose_batch`). The jobs of a
    worker that dies are tried once more, each alone, so that one bad job takes no others with it; not
    those that have spoken, for words cannot be unsaid. The worker is started again.
    """

    model: ModelInfo

    def __init__(self, config: ServeConfig):
        self.config = config
        self._workers = [_Worker(device) for device in config.devices or _all_devices()]
        self._queue: list[Job] = []  # in the order of submission
        self._submitted = 0
        self._seconds = 1.0  # that a worker needs for a job, a running mean
        self._stopping = False
        self._loaded: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Start the workers and wait until all have loaded; `stop` cancels this.

        Raises InputError for what cannot be loaded.
        """
        self._loaded = asyncio.get_running_loop().create_future()
        for worker in self._workers:
            self._launch(worker)
        try:
            await self._loaded
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Take no new jobs, finish those that were accepted, as far as `config.patience` goes, and end the
        workers. What is left ends as STOPPED."""
        self._stopping = True
        if self._loaded is not None and not self._loaded.done():
            self._loaded.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.config.patience):
                for job in self._accepted():
                    await job.over()
        for job in self._accepted():
            job.fail(Why.STOPPED, "the server is shutting down")
        self._queue.clear()
        processes = [worker.process for worker in self._workers if worker.process is not None]
        for worker in self._workers:
            worker.batch.clear()
            worker.kill()
        await asyncio.gather(*(process.ended() for process in processes))

    async def __aenter__(self) -> Engine:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def submit(self, request: Request, *, time_limit: float | None = None) -> Job:
        """Queue a request. time_limit: seconds that it may run, at most `config.time_limit`.

        Raises Busy where the queue is full, and JobError (STOPPED) when the engine stops.
        """
        if self._stopping:
            raise JobError(Why.STOPPED, "the server is shutting down")
        if len(self._queue) >= self.config.queue:
            raise Busy(self._retry_after())
        limit = self.config.time_limit if time_limit is None else min(time_limit, self.config.time_limit)
        self._submitted += 1
        job = Job(request, self._submitted, limit, self._cancel)
        self._queue.append(job)
        # Not at once: what is submitted in one go can then go together.
        asyncio.get_running_loop().call_soon(self._hand_out)
        return job

    @property
    def ready(self) -> bool:
        """Whether all workers have loaded and jobs are taken."""
        return not self._stopping and all(worker.ready for worker in self._workers)

    @property
    def waiting(self) -> int:
        """Jobs that no worker has."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Jobs that a worker has."""
        return sum(len(worker.batch) for worker in self._workers)

    @property
    def workers(self) -> list[WorkerState]:
        return [
            WorkerState(w.device, w.ready, w.restarts, w.memory.host, w.memory.device, w.jobs_done)
            for w in self._workers
        ]

    # -- jobs ----------------------------------------------------------------------------------------

    def _accepted(self) -> list[Job]:
        return [*(job for worker in self._workers for job in worker.batch.values()), *self._queue]

    def _hand_out(self) -> None:
        """Give batches to the workers that wait for one."""
        for worker in self._workers:
            if worker.idle and self._queue:
                self._give(worker, self._next())

    def _next(self) -> list[Job]:
        """Out of the queue. A job that is tried again goes alone: it may have been what killed the worker."""
        oldest = self._queue[0]
        if oldest.tries:
            return [self._queue.pop(0)]
        fresh = [job for job in self._queue if not job.tries]
        requests = [job.request for job in fresh]
        chosen = [fresh[i] for i in choose_batch(requests, self.config.batch, self.model.config.sampling)]
        self._queue = [job for job in self._queue if job not in chosen]
        return chosen

    def _give(self, worker: _Worker, jobs: Sequence[Job]) -> None:
        worker.idle, worker.taken, worker.since = False, len(jobs), time.monotonic()
        worker.batch = {job.id: job for job in jobs}
        worker.say([Ticket(job.id, job.request) for job in jobs])
        for job in jobs:
            late = JobError(Why.TIMED_OUT, f"it took more than {job.limit:g} seconds")
            job.timer = asyncio.get_running_loop().call_later(job.limit, self._ask_to_end, worker, job, late)
            job.start()

    def _take_back(self, job: Job) -> None:
        job.wait_again()
        insort(self._queue, job, key=lambda waiting: waiting.number)

    def _cancel(self, job: Job) -> None:
        cancelled = JobError(Why.CANCELLED, "cancelled")
        if job in self._queue:
            self._queue.remove(job)
            job.end(cancelled)
        for worker in self._workers:
            if job.id in worker.batch:
                self._ask_to_end(worker, job, cancelled)

    def _ask_to_end(self, worker: _Worker, job: Job, error: JobError) -> None:
        """Have a worker let go of a job, which will end with this error; the first one that asks counts."""
        if job.stopping is not None:
            return
        job.stopping = error
        worker.say(Cancel(job.id))
        if job.timer is not None:
            job.timer.cancel()
        job.timer = asyncio.get_running_loop().call_later(GRACE, worker.kill)

    def _retry_after(self) -> int:
        """Seconds until the queue may have moved on."""
        return max(1, math.ceil(self._seconds * self.waiting / len(self._workers)))

    # -- workers -------------------------------------------------------------------------------------

    def _launch(self, worker: _Worker) -> None:
        if self._stopping:
            return
        threads = max(1, torch.get_num_threads() // len(self._workers))
        hear, lost = partial(self._hear, worker), partial(self._lose, worker)
        worker.process = WorkerProcess(self.config, worker.device, threads, hear, lost)

    def _hear(self, worker: _Worker, message: FromWorker) -> None:
        match message:
            case Ready(model, memory):
                self.model, worker.memory = model, memory
                worker.ready = worker.idle = True
                worker.failures = 0
                self._note_loaded()
                self._hand_out()
            case Unusable(trouble):
                worker.trouble = trouble
            case Idle(memory):
                self._finish_batch(worker, memory)
            case _ if (job := worker.batch.get(message.id)) is not None:
                self._hear_of(worker, job, message)

    def _hear_of(self, worker: _Worker, job: Job, message: Told | Ended | Failed | Returned) -> None:
        if isinstance(message, Told):
            job.tell(message.event)
            return
        del worker.batch[job.id]
        match message:
            case Ended(_, outcome):
                worker.jobs_done += 1
                job.end(outcome)
            case Failed(_, Why.CANCELLED, _) if job.stopping is not None:
                job.end(job.stopping)
            case Failed(_, why, text):
                job.fail(why, text)
            case Returned():
                worker.taken -= 1
                job.tries -= 1
                if job.stopping is not None:
                    job.end(job.stopping)
                else:
                    self._take_back(job)

    def _finish_batch(self, worker: _Worker, memory: Memory) -> None:
        assert not worker.batch, "every job was answered"
        seconds = (time.monotonic() - worker.since) / worker.taken
        self._seconds += RECENT * (seconds - self._seconds)
        worker.idle, worker.memory = True, memory
        self._hand_out()

    def _note_loaded(self) -> None:
        if self._loaded is not None and not self._loaded.done() and self.ready:
            self._loaded.set_result(None)

    def _lose(self, worker: _Worker, code: int) -> None:
        """The process has ended: see to its jobs, and start it again."""
        jobs, worker.batch = list(worker.batch.values()), {}
        was_ready, worker.ready, worker.idle, worker.process = worker.ready, False, False, None
        worker.memory = Memory()
        for job in jobs:
            if job.stopping is not None:
                job.end(job.stopping)
            elif job.spoke or job.tries == TRIES:
                job.fail(Why.FAILED, "the worker died of this: the server's log may say why")
            else:
                self._take_back(job)
        if self._stopping:
            return
        trouble = worker.trouble or f"the worker for {worker.device} died (exit code {code})"
        if self._loaded is not None and not self._loaded.done():
            while_loading = "" if worker.trouble else " while it loaded the model: is there enough memory?"
            self._loaded.set_exception(InputError(trouble + while_loading))
            return
        worker.failures += not was_ready
        worker.restarts += 1
        pause = 0.0 if was_ready else min(LONGEST_PAUSE, 2.0**worker.failures)
        log.error("%s: it is started again in %g seconds", trouble, pause)
        worker.trouble = ""
        asyncio.get_running_loop().call_later(pause, self._launch, worker)


def _all_devices() -> tuple[str, ...]:
    """All CUDA devices, or the best there is."""
    return tuple(f"cuda:{index}" for index in range(torch.cuda.device_count())) or (default_device(),)
