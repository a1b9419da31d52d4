"""Jobs of one HTTP request: handed to the engine together, and cancelled when nobody waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import TypeVar

from fastapi import Request as HTTPRequest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from openlance.serve.engine import Engine, Job
from openlance.serve.jobs import Busy, Event, JobError, Outcome, Request, Why

T = TypeVar("T")


def submit(engine: Engine, requests: Sequence[Request]) -> list[Job]:
    """One job each, or none: raises Busy, or JobError while the server stops."""
    jobs: list[Job] = []
    try:
        for request in requests:
            jobs.append(engine.submit(request))
    except (Busy, JobError):
        cancel(jobs)
        raise
    return jobs


def cancel(jobs: Sequence[Job]) -> None:
    """Cancel those that have not ended."""
    for job in jobs:
        if job.ended is None:
            job.cancel()


async def results(request: HTTPRequest, jobs: Sequence[Job]) -> list[Outcome]:
    """What came of the jobs. Where one fails, or the client goes away, the others are cancelled.

    Raises the first JobError.
    """
    try:
        return await while_listening(request, asyncio.gather(*(job.result() for job in jobs)))
    finally:
        cancel(jobs)


async def while_listening(request: HTTPRequest, work: Awaitable[T]) -> T:
    """What the work gives, unless the client goes away first: then it is cancelled. The request's body must
    have been read. Raises JobError for a client that went away."""
    gone, doing = asyncio.ensure_future(_gone(request)), asyncio.ensure_future(work)
    try:
        await asyncio.wait({gone, doing}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise JobError(Why.CANCELLED, "the client went away")
    finally:
        gone.cancel()
        doing.cancel()


async def happenings(
    events: Sequence[tuple[Job, AsyncIterator[Event]]],
) -> AsyncIterator[tuple[int, Event | Outcome]]:
    """What jobs tell as it comes, with the number of the job, and last of each its outcome.

    events: of each job, asked for before anything was awaited. Raises the first JobError.
    """
    heard: asyncio.Queue[tuple[int, Event | Outcome | JobError]] = asyncio.Queue()

    async def hear(number: int, job: Job, told: AsyncIterator[Event]) -> None:
        async for event in told:
            heard.put_nowait((number, event))
        try:
            heard.put_nowait((number, await job.result()))
        except JobError as error:
            heard.put_nowait((number, error))

    hearing = [asyncio.create_task(hear(number, *pair)) for number, pair in enumerate(events)]
    left = len(hearing)  # each ends with its job
    while left:
        number, event = await heard.get()
        if isinstance(event, JobError):
            raise event
        left -= isinstance(event, Outcome)
        yield number, event


class EventStream(StreamingResponse):
    """Server-sent events about jobs, which are cancelled when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[str], jobs: Sequence[Job]):
        super().__init__(content, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._jobs = jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            cancel(self._jobs)


async def _gone(request: HTTPRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
