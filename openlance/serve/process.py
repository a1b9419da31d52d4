"""A worker as the engine sees it: a process, a pipe, and two threads that wait for the event loop."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread

from openlance.serve.settings import ServeConfig
from openlance.serve.wire import Cancel, FromWorker, Ticket
from openlance.serve.worker import work

ToWorker = list[Ticket] | Cancel

LEAVE = 5.0
"""Seconds that a worker may take to end once it has let go of the pipe."""


class WorkerProcess:
    """One worker process, from its start to its end.

    hear: called in the event loop with each thing it says; lost: once, after all of them, when the process
    has ended, with its exit code.
    """

    def __init__(
        self,
        config: ServeConfig,
        device: str,
        threads: int,
        hear: Callable[[FromWorker], None],
        lost: Callable[[int], None],
    ):
        spawn = multiprocessing.get_context("spawn")  # CUDA cannot be used in a forked process
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(
            target=work, args=(theirs, config, device, threads), name=f"openlance-{device}", daemon=True
        )
        self._process.start()
        theirs.close()  # so that the pipe ends with the process
        self._outbox: SimpleQueue[ToWorker | None] = SimpleQueue()
        self._loop, self._hear, self._lost = asyncio.get_running_loop(), hear, lost
        self._listener = Thread(target=self._listen, name=f"listen-{device}", daemon=True)
        self._writer = Thread(target=self._write, name=f"write-{device}", daemon=True)
        self._listener.start()
        self._writer.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def send(self, message: ToWorker) -> None:
        """Without waiting; what is said to a worker that has died is lost."""
        self._outbox.put(message)

    def kill(self) -> None:
        self._process.kill()

    async def ended(self) -> None:
        """Until the process has ended and `lost` is called."""
        await asyncio.to_thread(self._listener.join)

    def _listen(self) -> None:
        try:
            while True:
                self._loop.call_soon_threadsafe(self._hear, self._connection.recv())
        except (EOFError, OSError):  # the latter where it died in the middle of a message
            pass
        self._process.join(LEAVE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._outbox.put(None)
        self._writer.join()
        self._connection.close()
        self._loop.call_soon_threadsafe(self._lost, self._process.exitcode or 0)

    def _write(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                self._connection.send(message)
        except OSError:  # it has died, as the listener will notice
            pass
