"""Clips that are made while nobody waits: kept in a table and a folder, so that they outlive the server."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Literal, cast

from sqlalchemy import URL

from openlance.errors import InputError
from openlance.serve.engine import Engine, Job
from openlance.serve.jobs import Busy, JobError, Made, Request, Why
from openlance.serve.results import Results, StorageError
from openlance.serve.settings import ServeConfig
from openlance.serve.store import Store, VideoJob

Status = Literal["queued", "in_progress", "completed", "failed"]

log = logging.getLogger("openlance.serve")

SWEEP = 60.0
"""Seconds between two looks for what has expired, and before what the table refused is tried again."""
_FILE = "file"


class VideoJobs:
    """Jobs that make clips.

    The table holds what must survive: the request (media as files beside the results) until the job has
    ended, then what came of it. How far a job is, the engine knows. `start` submits again what had not ended
    when the server did, with the same seed, so the same clip comes of it. One server uses one table.
    """

    def __init__(self, config: ServeConfig, engine: Engine):
        """Open the folder and the table. Raises InputError where they cannot be used."""
        self.config, self.engine = config, engine
        self.results = Results(config.results)
        self.store = Store(config.database or _beside(self.results))
        self._live: dict[str, Job] = {}
        self._unsaved: dict[str, dict[str, Any]] = {}  # what the table could not take yet
        self._finishing: set[asyncio.Task[None]] = set()
        self._caring: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Submit what is unfinished, and remove what has expired, from now on."""
        self._caring = [asyncio.create_task(work) for work in (self._resume(), self._sweep_forever())]

    async def stop(self) -> None:
        """Finish what is running, as far as `config.patience` goes. The rest is done after the next start."""
        for task in self._caring:
            task.cancel()
        for job in self._live.values():
            if job.state == "waiting":
                job.cancel()
        if self._finishing:
            await asyncio.wait(self._finishing, timeout=self.config.patience)
        for task in [*self._finishing, *self._caring]:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await self.store.close()

    async def create(self, job: VideoJob, request: Request) -> None:
        """Keep and submit. Raises Busy, JobError or StorageError, and has then kept nothing."""
        job.request, files = _pack(job.id, request)
        await self.store.add(job)
        try:
            for name, data in files.items():
                await asyncio.to_thread(self.results.write, name, data)
            self._follow(job.id, self.engine.submit(request))
        except (Busy, JobError, StorageError):
            await self.remove(job)
            raise

    async def get(self, job_id: str, owner: str) -> VideoJob | None:
        """A job of this owner."""
        job = await self.store.get(job_id, owner)
        return None if job is None else self._current(job)

    async def page(self, owner: str, **wanted: Any) -> list[VideoJob]:
        """See `Store.page`."""
        return [self._current(job) for job in await self.store.page(owner, **wanted)]

    def progress(self, job: VideoJob) -> tuple[Status, int]:
        """(its status, percent)."""
        live = self._live.get(job.id)
        if job.status != "queued" or live is None or live.state == "waiting":
            return cast(Status, job.status), 100 if job.status == "completed" else 0
        step = live.progress
        return "in_progress", 0 if step is None else min(99, 100 * step.step // step.total)

    async def read(self, job: VideoJob, start: int | None = None, end: int | None = None) -> bytes:
        """The clip of a completed job, or part of it."""
        assert job.result is not None
        return await asyncio.to_thread(self.results.read, job.result, start, end)

    async def size(self, job: VideoJob) -> int:
        """Bytes of the clip of a completed job."""
        assert job.result is not None
        return await asyncio.to_thread(self.results.size, job.result)

    async def remove(self, job: VideoJob) -> None:
        """End and forget a job, and all files of it. Raises StorageError."""
        if (live := self._live.pop(job.id, None)) is not None:
            live.cancel()
        self._unsaved.pop(job.id, None)
        for name in [*_files_of(job.request), *([job.result] if job.result else [])]:
            await asyncio.to_thread(self.results.remove, name)
        await self.store.remove(job.id)

    async def sweep(self, now: float) -> None:
        """Remove what has expired, and save what could not be saved before."""
        for job_id, values in list(self._unsaved.items()):
            await self.store.change(job_id, **values)
            self._unsaved.pop(job_id, None)
        for job in await self.store.expired(now):
            await self.remove(job)

    # -- how it is done ------------------------------------------------------------------------------

    def _current(self, job: VideoJob) -> VideoJob:
        """With what the table could not take."""
        for name, value in self._unsaved.get(job.id, {}).items():
            setattr(job, name, value)
        return job

    async def _resume(self) -> None:
        """Submit what an earlier server left, one after another, as the queue has room."""
        try:
            for job in await self.store.unfinished():
                await self._resume_one(job)
        except StorageError as error:
            log.error("videos of an earlier server wait for its next start: %s", error.detail)

    async def _resume_one(self, job: VideoJob) -> None:
        while await self.store.get(job.id, job.owner) is not None:  # not deleted since
            try:
                request = await asyncio.to_thread(_unpack, job.request, self.results)
                return self._follow(job.id, self.engine.submit(request))
            except StorageError as error:
                await self._save(job.id, self._failed("storage", error.detail))
                return
            except Busy as busy:
                await asyncio.sleep(min(busy.retry_after, 5))
            except JobError:  # the server ends again
                return

    def _follow(self, job_id: str, live: Job) -> None:
        self._live[job_id] = live
        task = asyncio.create_task(self._finish(job_id, live))
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)

    async def _finish(self, job_id: str, live: Job) -> None:
        """Keep what comes of a job."""
        try:
            made = await live.result()
            assert isinstance(made, Made)
            values = await self._keep(job_id, made)
        except JobError as error:
            if error.why in (Why.STOPPED, Why.CANCELLED):
                return  # to be done after the next start, or removed
            values = self._failed(str(error.why), str(error))
        except StorageError as error:
            log.error("video %s: %s", job_id, error.detail)
            values = self._failed("storage", error.detail)
        there = await self._save(job_id, values)
        self._live.pop(job_id, None)
        if job_id not in self._unsaved:  # else the next server needs what was sent
            await self._tidy(job_id, live.request, None if there else values.get("result"))

    async def _keep(self, job_id: str, made: Made) -> dict[str, Any]:
        name = f"{job_id}.mp4"
        await asyncio.to_thread(self.results.write, name, made.media)
        height, width = made.size
        return {
            "status": "completed", "result": name, "size": f"{width}x{height}",
            "frames": made.frames, "fps": made.fps, "settings": dict(made.settings), **self._ended(),
        }  # fmt: skip

    def _failed(self, code: str, message: str) -> dict[str, Any]:
        return {"status": "failed", "error": {"code": code, "message": message}, **self._ended()}

    def _ended(self) -> dict[str, float]:
        now = time.time()
        return {"completed_at": now, "expires_at": now + 3600 * self.config.keep_hours}

    async def _save(self, job_id: str, values: dict[str, Any]) -> bool:
        """Into the table, or, while that cannot be, into memory. Whether there is such a job."""
        try:
            return await self.store.change(job_id, **values)
        except StorageError as error:
            log.error("video %s: %s; tried again later", job_id, error.detail)
            self._unsaved[job_id] = values
            return True

    async def _tidy(self, job_id: str, request: Request, orphan: str | None) -> None:
        """Remove what is not needed any more: the media that were sent, and a clip that nobody owns."""
        _, sent = _pack(job_id, request)
        try:
            for name in [*sent, *([orphan] if orphan else [])]:
                await asyncio.to_thread(self.results.remove, name)
        except StorageError as error:
            log.error("video %s: %s", job_id, error.detail)

    async def _sweep_forever(self) -> None:
        while True:
            try:
                await self.sweep(time.time())
            except StorageError as error:
                log.error("removing what has expired: %s", error.detail)
            await asyncio.sleep(SWEEP)


def _beside(results: Results) -> URL:
    """A database in the folder of results."""
    if results.folder is None:
        raise InputError("results outside of a folder need a --database: an SQLAlchemy address")
    return URL.create("sqlite", database=str(results.folder / "jobs.sqlite"))


def _pack(job_id: str, request: Request) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(the request as JSON, the files that it names)."""
    files: dict[str, bytes] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            name = f"{job_id}.{len(files)}.sent"
            files[name] = value
            return {_FILE: name}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    arguments = {name: plain(value) for name, value in request.arguments.items()}
    return {**asdict(request), "arguments": arguments}, files


def _unpack(stored: Mapping[str, Any], results: Results) -> Request:
    """The request again. Raises StorageError where a file of it is gone."""

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            return results.read(value[_FILE])
        return tuple(map(whole, value)) if isinstance(value, list) else value

    arguments = {name: whole(value) for name, value in stored["arguments"].items()}
    return Request(**{**stored, "arguments": arguments})


def _files_of(stored: Mapping[str, Any]) -> list[str]:
    """The names of the files that a stored request needs."""
    values = [item for value in stored["arguments"].values()
              for item in (value if isinstance(value, list) else [value])]  # fmt: skip
    return [value[_FILE] for value in values if isinstance(value, dict)]
