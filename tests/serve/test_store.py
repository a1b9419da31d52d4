"""The table of jobs and the folder of results, on real files, memory and full disks."""

from __future__ import annotations

import asyncio
import os
import resource
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from openlance.errors import InputError
from openlance.serve.results import Results, StorageError
from openlance.serve.store import Store, VideoJob

T = TypeVar("T")


def job(name: str, owner: str = "a", **values: Any) -> VideoJob:
    request = {"method": "generate_video", "arguments": {"prompt": "a 狐狸", "seed": 1}}
    given = {"model": "nano", "prompt": "a 狐狸", "request": request, "created_at": 5.0, **values}
    return VideoJob(id=name, owner=owner, **given)


def using(address: str, work: Callable[[Store], Awaitable[T]]) -> T:
    async def inside() -> T:
        store = Store(address)
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(inside())


@pytest.fixture(params=["file", "memory"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/jobs.sqlite" if request.param == "file" else "sqlite://"


def test_a_job_is_its_owners_alone(address: str) -> None:
    async def work(store: Store) -> tuple[VideoJob | None, VideoJob | None]:
        await store.add(job("v1"))
        return await store.get("v1", "a"), await store.get("v1", "b")

    mine, theirs = using(address, work)
    assert mine is not None and theirs is None
    assert (mine.prompt, mine.status, mine.request["arguments"]["seed"]) == ("a 狐狸", "queued", 1)
    assert (mine.result, mine.error, mine.expires_at) == (None, None, None)


def test_pages_follow_each_other_in_both_orders(address: str) -> None:
    async def work(store: Store) -> None:
        for name in ("v1", "v2", "x1", "v3", "v4", "v5"):
            await store.add(job(name, owner="b" if name == "x1" else "a"))

        async def names(**options: Any) -> list[str]:
            return [found.id for found in await store.page("a", **options)]

        assert await names(limit=10) == ["v5", "v4", "v3", "v2", "v1"]
        assert await names(limit=2, newest_first=False) == ["v1", "v2"]
        second = await store.get("v2", "a")
        assert await names(limit=2, after=second, newest_first=False) == ["v3", "v4"]
        assert await names(limit=2, after=second) == ["v1"]

    using(address, work)


def test_jobs_end_and_expire(address: str) -> None:
    async def work(store: Store) -> None:
        for name in ("v1", "v2", "v3"):
            await store.add(job(name))
        await store.change("v1", status="completed", result="v1.mp4", expires_at=100.0)
        await store.change("v2", status="failed", error={"code": "failed", "message": "no"}, expires_at=50.0)
        assert [found.id for found in await store.unfinished()] == ["v3"]
        assert [found.id for found in await store.expired(99.0)] == ["v2"]
        assert [found.id for found in await store.expired(100.0)] == ["v1", "v2"]
        failed = await store.get("v2", "a")
        assert failed is not None and failed.error == {"code": "failed", "message": "no"}
        await store.remove("v1")
        assert await store.change("v3", size="96x96")
        assert not await store.change("v1", size="96x96")
        assert await store.get("v1", "a") is None

    using(address, work)


def test_what_was_kept_is_there_when_opened_again(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path}/jobs.sqlite"
    using(address, lambda store: store.add(job("v1")))
    assert [found.id for found in using(address, lambda store: store.unfinished())] == ["v1"]


def test_many_callers_at_once(address: str) -> None:
    async def work(store: Store) -> int:
        await asyncio.gather(*(store.add(job(f"v{index}")) for index in range(50)))
        return len(await store.unfinished())

    assert using(address, work) == 50


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("sqlite:////nowhere/at/all/jobs.sqlite", "unable to open database file"),
        ("no address", "cannot keep jobs there"),
        ("oracle+cx_oracle://me:secret@host/db", r"me:\*\*\*@host/db: a driver is missing"),
    ],
)
def test_databases_that_cannot_be_used(address: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        Store(address)
    assert "secret" not in str(caught.value)


def test_a_database_that_breaks_says_why_in_the_log_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(store: Store) -> None:
        with sqlite3.connect(tmp_path / "jobs.sqlite") as other:
            other.execute("DROP TABLE videos")
        with pytest.raises(StorageError, match="the database of jobs cannot be used: try again later"):
            await store.add(job("v1"))

    using(f"sqlite:///{tmp_path}/jobs.sqlite", work)
    assert caplog.messages == ["the database of jobs: no such table: videos"]  # and nothing of the job


@pytest.fixture(params=["folder", "memory"])
def results(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Results]:
    place = Results(str(tmp_path / "a" / "b") if request.param == "folder" else "memory://results")
    yield place
    place.files.rm(place.root, recursive=True)


def test_files_are_kept_read_in_parts_and_removed(results: Results) -> None:
    results.write("a.mp4", b"old")
    results.write("a.mp4", b"0123456789")
    assert results.read("a.mp4") == b"0123456789"
    assert results.read("a.mp4", 2, 5) == b"234"
    assert results.size("a.mp4") == 10
    assert [Path(path).name for path in results.files.ls(results.root, detail=False)] == ["a.mp4"]
    results.remove("a.mp4")
    results.remove("a.mp4")
    for read in (results.read, results.size):
        with pytest.raises(StorageError, match="could not read"):
            read("a.mp4")


def test_removing_takes_what_an_interrupted_write_left(tmp_path: Path) -> None:
    results = Results(str(tmp_path))
    (tmp_path / ".a.mp4.part").write_bytes(b"half")
    results.remove("a.mp4")
    assert os.listdir(tmp_path) == []


@contextmanager
def full_disk(after: int) -> Iterator[None]:
    """Let no file grow beyond `after` bytes: the system's own write errors, without filling a disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    results = Results(str(tmp_path))
    results.write("a.mp4", b"old")
    with full_disk(after=1000), pytest.raises(StorageError, match="could not keep 5000 bytes") as caught:
        results.write("a.mp4", bytes(5000))
    assert str(tmp_path) not in str(caught.value)
    assert results.read("a.mp4") == b"old"
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_places_that_cannot_hold_results(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot keep results there"):
        Results(str(tmp_path / "file" / "below"))
    with pytest.raises(InputError, match="nonsense://place"):
        Results("nonsense://place")
