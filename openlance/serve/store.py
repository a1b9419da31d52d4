"""The table of video jobs: what must survive a restart. SQLite, or any database that SQLAlchemy speaks to."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sqlalchemy import JSON, URL, Engine, Text, create_engine, delete, event, select, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Session, mapped_column

from openlance.errors import InputError
from openlance.serve.results import StorageError

T = TypeVar("T")

log = logging.getLogger("openlance.serve")


class Table(MappedAsDataclass, DeclarativeBase):
    """All tables."""


class VideoJob(Table, kw_only=True):
    """One clip that was asked for.

    owner: whose it is, a hash of the API key. request: the method and its arguments, media as the names of
    files. status: queued until it has ended, then completed or failed; what a job that runs is at, the engine
    knows. result: the name of its file. error: {"code", "message"}. Times in seconds since 1970.
    """

    __tablename__ = "videos"

    number: Mapped[int] = mapped_column(primary_key=True, init=False)  # in the order of arrival
    id: Mapped[str] = mapped_column(unique=True)
    owner: Mapped[str] = mapped_column(index=True)
    model: Mapped[str]
    prompt: Mapped[str] = mapped_column(Text)
    request: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[float]
    status: Mapped[str] = mapped_column(default="queued", index=True)
    size: Mapped[str | None] = mapped_column(default=None)
    frames: Mapped[int | None] = mapped_column(default=None)
    fps: Mapped[float | None] = mapped_column(default=None)
    completed_at: Mapped[float | None] = mapped_column(default=None)
    expires_at: Mapped[float | None] = mapped_column(default=None, index=True)
    error: Mapped[dict[str, str] | None] = mapped_column(JSON(none_as_null=True), default=None)
    result: Mapped[str | None] = mapped_column(default=None)
    settings: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True), default=None)


class Store:
    """The jobs. One thread talks to the database, in the order of the calls.

    All methods raise StorageError where the database does not do as it is told.
    """

    def __init__(self, address: str | URL):
        """Open, or make, the table. Raises InputError for a database that cannot be used."""
        self._thread = ThreadPoolExecutor(1, "store")
        try:
            self._database = _open(address)
            self._thread.submit(Table.metadata.create_all, self._database).result()
        except ImportError as error:
            raise InputError(f"{_shown(address)}: a driver is missing ({error}): install it") from error
        except SQLAlchemyError as error:
            raise InputError(f"{_shown(address)}: cannot keep jobs there ({_said(error)})") from error

    async def close(self) -> None:
        await asyncio.wrap_future(self._thread.submit(self._database.dispose))
        self._thread.shutdown()

    async def add(self, job: VideoJob) -> None:
        await self._do(lambda session: session.add(job))

    async def get(self, job_id: str, owner: str) -> VideoJob | None:
        """A job of this owner."""
        found = select(VideoJob).where(VideoJob.id == job_id, VideoJob.owner == owner)
        return await self._do(lambda session: session.scalar(found))

    async def page(
        self, owner: str, *, limit: int, after: VideoJob | None = None, newest_first: bool = True
    ) -> Sequence[VideoJob]:
        """Up to `limit` jobs of an owner, those that follow `after`."""
        number = VideoJob.number
        wanted = select(VideoJob).where(VideoJob.owner == owner).limit(limit)
        wanted = wanted.order_by(number.desc() if newest_first else number)
        if after is not None:
            wanted = wanted.where(number < after.number if newest_first else number > after.number)
        return await self._do(lambda session: session.scalars(wanted).all())

    async def unfinished(self) -> Sequence[VideoJob]:
        """Of all owners, in the order of arrival."""
        wanted = select(VideoJob).where(VideoJob.status == "queued").order_by(VideoJob.number)
        return await self._do(lambda session: session.scalars(wanted).all())

    async def expired(self, now: float) -> Sequence[VideoJob]:
        wanted = select(VideoJob).where(VideoJob.expires_at <= now).order_by(VideoJob.number)
        return await self._do(lambda session: session.scalars(wanted).all())

    async def change(self, job_id: str, **values: Any) -> bool:
        """Set columns of a job, and say whether there is one."""
        statement = update(VideoJob).where(VideoJob.id == job_id).values(**values).returning(VideoJob.id)
        return await self._do(lambda session: session.scalar(statement)) is not None

    async def remove(self, job_id: str) -> None:
        await self._do(lambda session: session.execute(delete(VideoJob).where(VideoJob.id == job_id)))

    async def _do(self, work: Callable[[Session], T]) -> T:
        """In a transaction of its own."""

        def inside() -> T:
            with Session(self._database, expire_on_commit=False) as session, session.begin():
                return work(session)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, inside)
        except SQLAlchemyError as error:
            log.error("the database of jobs: %s", _said(error))  # which may name hosts: not for clients
            raise StorageError("the database of jobs cannot be used: try again later") from error


def _open(address: str | URL) -> Engine:
    database = create_engine(address, pool_pre_ping=True)
    if database.dialect.name == "sqlite":

        @event.listens_for(database, "connect")
        def write_ahead(connection: Any, _: Any) -> None:
            connection.execute("PRAGMA journal_mode=WAL")  # a crash in the middle of a write loses nothing

    return database


def _shown(address: str | URL) -> str:
    """An address without its password."""
    try:
        return make_url(address).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return "the database"


def _said(error: SQLAlchemyError) -> str:
    """The driver's first line, without the statement and its values."""
    cause = getattr(error, "orig", None) or error
    return (str(cause).splitlines() or [type(cause).__name__])[0]
