"""The engine when things go wrong: workers that die, hang or run out of memory, and a server that stops."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from openlance.errors import InputError
from openlance.serve import engine as engine_module
from openlance.serve.engine import Engine, Job
from openlance.serve.jobs import Event, JobError, Made, Piece, Request, Spoken, Started, Why
from openlance.serve.settings import ServeConfig
from openlance.serve.worker import load, load_safety

CONFIG = ServeConfig(devices=("cpu",), safety="faults:act")
LONG_ANSWER = {"max_tokens": 1000, "temperature": 5.0, "seed": 1}

# Starts an engine, says the worker's process id, and waits to be killed.
SERVER = """
import asyncio, multiprocessing
from openlance.serve.engine import Engine
from openlance.serve.settings import ServeConfig

async def main():
    async with Engine(ServeConfig(devices=("cpu",))):
        [worker] = multiprocessing.active_children()
        print(worker.pid, flush=True)
        await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


def picture(prompt: str = "a red circle", **arguments: Any) -> Request:
    return Request("generate_image", {"prompt": prompt, "size": 48, "steps": 2, "seed": 1, **arguments})


def chat(*, streamed: bool, **arguments: Any) -> Request:
    messages = [{"role": "user", "content": "describe a red circle"}]
    return Request("chat", {"messages": messages, **arguments}, streamed=streamed)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engine(loop: asyncio.Runner) -> Iterator[Engine]:
    engine = Engine(CONFIG)
    loop.run(engine.start())
    yield engine
    loop.run(engine.stop())


def worker_pid() -> int:
    [worker] = multiprocessing.active_children()
    assert worker.pid is not None
    return worker.pid


def restarts(engine: Engine) -> int:
    return engine.workers[0].restarts


async def failure(job: Job) -> JobError:
    with pytest.raises(JobError) as error:
        await job.result()
    return error.value


# -- faults that a worker survives -----------------------------------------------------------------------


def test_safety_is_asked_about_words_and_pictures(loop: asyncio.Runner, engine: Engine) -> None:
    asked = {"role": "user", "content": [{"type": "text", "text": "something forbidden"}]}
    requests = {
        "refused: it is forbidden": [picture("a forbidden star"), Request("chat", {"messages": [asked]})],
        "refused: it is too small": [picture(size=16)],
    }

    async def all_of_them() -> list[tuple[str, JobError]]:
        return [(why, await failure(engine.submit(r))) for why, each in requests.items() for r in each]

    for why, error in loop.run(all_of_them()):
        assert (error.why, str(error)) == (Why.REFUSED, why)


def test_running_out_of_memory_fails_the_job_alone(loop: asyncio.Runner, engine: Engine) -> None:
    async def two() -> JobError:
        jobs = [engine.submit(picture(prompt)) for prompt in ("take all memory", "a star")]
        assert isinstance(await jobs[1].result(), Made)
        return await failure(jobs[0])

    error = loop.run(two())
    assert error.why is Why.FAILED and "not enough memory" in str(error)
    assert restarts(engine) == 0


def test_a_worker_that_takes_nothing_in_does_not_hold_up_the_event_loop(
    loop: asyncio.Runner, engine: Engine
) -> None:
    """A request larger than the pipe's buffer; were the loop to wait for it, the worker never went on."""
    large = Request("edit", {"source": bytes(20 * 2**20), "prompt": "make it blue"})

    async def one() -> JobError:
        os.kill(worker_pid(), signal.SIGSTOP)
        job = engine.submit(large)
        await asyncio.sleep(0.2)
        os.kill(worker_pid(), signal.SIGCONT)
        return await failure(job)

    assert loop.run(one()).why is Why.REFUSED


# -- faults that kill a worker ---------------------------------------------------------------------------


def test_a_killed_worker_s_jobs_are_tried_again(loop: asyncio.Runner, engine: Engine) -> None:
    """But for the one that has spoken; the one that waited comes after them."""

    async def three() -> tuple[JobError, list[Event], list[Any], list[Job]]:
        before = restarts(engine)
        spoke = engine.submit(chat(streamed=True, **LONG_ANSWER))
        silent = engine.submit(chat(streamed=False, **LONG_ANSWER | {"max_tokens": 200}))
        waiting = engine.submit(picture())
        heard = silent.events()
        async for event in spoke.events():
            if isinstance(event, Piece):
                os.kill(worker_pid(), signal.SIGKILL)
                break
        error = await failure(spoke)
        assert not engine.ready and (silent.state, waiting.state) == ("waiting", "waiting")
        results = [await silent.result(), await waiting.result()]
        assert engine.ready and restarts(engine) == before + 1
        return error, [event async for event in heard], results, [silent, waiting]

    error, events, (answer, made), (silent, waiting) = loop.run(three())
    assert error.why is Why.FAILED and "died" in str(error)
    assert isinstance(answer, Spoken) and isinstance(made, Made)
    assert events == [Started(), Started()]
    assert silent.ended is not None and waiting.started is not None and silent.ended <= waiting.started


@pytest.mark.slow  # two restarts
def test_a_job_that_kills_its_worker_takes_no_others_with_it(loop: asyncio.Runner, engine: Engine) -> None:
    async def three() -> tuple[JobError, list[Any]]:
        before = restarts(engine)
        first, bad, last = (engine.submit(picture(prompt)) for prompt in ("a star", "die", "a circle"))
        results = [await first.result(), await last.result()]
        error = await failure(bad)
        assert restarts(engine) == before + 2
        return error, results

    error, results = loop.run(three())
    assert error.why is Why.FAILED
    assert all(isinstance(result, Made) for result in results)


@pytest.mark.slow  # a restart
def test_a_worker_that_hangs_is_killed(
    loop: asyncio.Runner, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job that hung has timed out; the one that was taken up with it is tried again."""
    monkeypatch.setattr(engine_module, "GRACE", 0.5)

    async def two() -> tuple[JobError, Any]:
        before = restarts(engine)
        hung = engine.submit(picture("hang"), time_limit=0.5)
        other = engine.submit(picture())
        result = failure(hung), await other.result()
        assert restarts(engine) == before + 1
        return await result[0], result[1]

    error, result = loop.run(two())
    assert error.why is Why.TIMED_OUT and isinstance(result, Made)


# -- start and stop --------------------------------------------------------------------------------------


@pytest.mark.slow  # its own engine
def test_stopping_finishes_what_was_accepted(loop: asyncio.Runner) -> None:
    """As far as patience goes."""

    async def whole_life() -> tuple[Any, JobError]:
        engine = Engine(ServeConfig(devices=("cpu",), patience=6.0))
        await engine.start()
        endless = {"prompt": "it moves", "size": 256, "frames": 33, "steps": 200}
        short, long = engine.submit(picture()), engine.submit(Request("generate_video", endless))
        stopping = asyncio.create_task(engine.stop())
        await asyncio.sleep(0)
        with pytest.raises(JobError) as refused:
            engine.submit(picture())
        assert refused.value.why is Why.STOPPED and not engine.ready
        result, error = await short.result(), await failure(long)
        await stopping
        await engine.stop()  # a second time does nothing
        return result, error

    workers = len(multiprocessing.active_children())
    result, error = loop.run(whole_life())
    assert isinstance(result, Made) and error.why is Why.STOPPED
    assert len(multiprocessing.active_children()) == workers


def test_stopping_while_it_loads(loop: asyncio.Runner) -> None:
    async def short_life() -> None:
        engine = Engine(ServeConfig(devices=("cpu",)))
        starting = asyncio.create_task(engine.start())
        await asyncio.sleep(0.2)
        assert len(multiprocessing.active_children()) == workers + 1 and not engine.ready
        await engine.stop()
        with pytest.raises(asyncio.CancelledError):
            await starting

    workers = len(multiprocessing.active_children())
    loop.run(short_life())
    assert len(multiprocessing.active_children()) == workers


@pytest.mark.slow  # its own engine
def test_a_worker_ends_with_its_server(tmp_path: Path) -> None:
    """Also where the server has no time to say so."""
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    server = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    worker = psutil.Process(int(server.stdout.readline()))
    assert worker.is_running()
    server.kill()
    server.wait()
    worker.wait(timeout=10)
    assert not worker.is_running()


@pytest.mark.slow  # its own engine
def test_what_cannot_be_loaded_is_said_by_start(loop: asyncio.Runner) -> None:
    engine = Engine(ServeConfig(devices=("cpu",), model="/no/such/folder"))
    with pytest.raises(InputError, match="/no/such/folder"):
        loop.run(engine.start())


@pytest.mark.parametrize(
    "address", ["faults:missing", "no_such_module:act", "faults", ":act", "faults:signal"]
)
def test_a_safety_function_that_is_not_there(address: str) -> None:
    with pytest.raises(InputError, match=f"safety '{address}'.*package.module:name"):
        load_safety(address)


def test_settings_that_load_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown dtype 'int8'"):
        load(ServeConfig(dtype="int8"), "cpu")
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        load(ServeConfig(adapters={"style": str(tmp_path)}), "cpu")
