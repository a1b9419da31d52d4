"""A job: one request on its way, as whoever sent it sees it."""

from __future__ import annotations

import asyncio
import time
from asyncio import TimerHandle
from collections.abc import AsyncGenerator, Callable
from typing import Literal
from uuid import uuid4

from openlance.serve.jobs import Event, JobError, Outcome, Piece, Progress, Request, Started, Why

State = Literal["waiting", "running", "done", "failed"]


class Job:
    """One request on its way; to be used in the event loop's own thread.

    created, started, ended: seconds since the epoch. A job whose worker died goes back to waiting and starts
    a second time. progress: the last there was.
    """

    def __init__(self, request: Request, number: int, limit: float, cancel: Callable[[Job], None]):
        self.id = uuid4().hex
        self.request = request
        self.state: State = "waiting"
        self.created = time.time()
        self.started: float | None = None
        self.ended: float | None = None
        self.progress: Progress | None = None
        # The rest is the engine's. number: place in the order of submission. tries: times that a worker took
        # it up. stopping: why it was asked to end.
        self.number, self.limit = number, limit
        self.tries = 0
        self.spoke = False
        self.stopping: JobError | None = None
        self.timer: TimerHandle | None = None
        self._cancel = cancel
        self._outcome: Outcome | JobError | None = None
        self._over = asyncio.Event()
        self._listeners: list[asyncio.Queue[Event | None]] = []

    def cancel(self) -> None:
        """It ends as CANCELLED: at once where it waits, else after the next step or word."""
        self._cancel(self)

    def events(self) -> AsyncGenerator[Event, None]:
        """What happens from this call on, until the job ends, however it ends."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        if self._over.is_set():
            queue.put_nowait(None)
        else:
            self._listeners.append(queue)
        return self._follow(queue)

    async def result(self) -> Outcome:
        """What came of it. Raises JobError where nothing did."""
        await self.over()
        if isinstance(self._outcome, JobError):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome

    async def over(self) -> None:
        """Until the job has ended, however it ends."""
        await self._over.wait()

    # -- for the engine ------------------------------------------------------------------------------

    def start(self) -> None:
        self.state, self.started = "running", time.time()
        self.tries += 1
        self.tell(Started())

    def wait_again(self) -> None:
        self._stop_timer()
        self.state, self.started, self.progress = "waiting", None, None

    def tell(self, event: Event) -> None:
        if isinstance(event, Progress):
            self.progress = event
        self.spoke |= isinstance(event, Piece)
        for queue in self._listeners:
            queue.put_nowait(event)

    def end(self, outcome: Outcome | JobError) -> None:
        self._stop_timer()
        self.state, self.ended = ("failed" if isinstance(outcome, JobError) else "done"), time.time()
        self._outcome = outcome
        self._over.set()
        for queue in self._listeners:
            queue.put_nowait(None)
        self._listeners.clear()

    def fail(self, why: Why, message: str) -> None:
        self.end(JobError(why, message))

    def _stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    async def _follow(self, queue: asyncio.Queue[Event | None]) -> AsyncGenerator[Event, None]:
        try:
            while (event := await queue.get()) is not None:
                yield event
        finally:
            if queue in self._listeners:
                self._listeners.remove(queue)
