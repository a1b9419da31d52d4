"""A server in this process, until it is told to stop."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from openlance.errors import InputError
from openlance.serve.app import Running, create_app
from openlance.serve.logs import write_json_lines
from openlance.serve.security import Local
from openlance.serve.settings import ServeConfig

CLOSING = 5
"""Seconds that open connections have for their last bytes, when all jobs have ended."""


def run(config: ServeConfig) -> None:
    """Serve until Ctrl-C or SIGTERM, which let accepted jobs finish within `config.patience`.

    The addresses of the page and the API go to stdout, the log as JSON to stderr. Port 0 takes a free one.
    Raises InputError for a configuration that cannot be, a port that is taken, or a model that does not load.
    """
    app = create_app(config)
    if not config.api_keys:
        app.add_middleware(Local)
    running: Running = app.state.running
    with listen(config.host, config.port) as listener:
        write_json_lines()
        server = _Server(
            uvicorn.Config(
                app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=CLOSING
            ),
            running,
        )
        running.on_failure = server.end
        _say_where(config, listener)
        with _stops_are_expected():
            server.run(sockets=[listener])
    if running.failure is not None:
        raise running.failure


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises InputError where that cannot be."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {port} is in use: choose another with --port (0: any)") from None
        raise InputError(
            f"cannot listen on {host}, port {port} ({error}): change --host or --port"
        ) from error


class _Server(uvicorn.Server):
    """Ends the jobs first, while connections are still served, and then the connections."""

    def __init__(self, config: uvicorn.Config, running: Running):
        super().__init__(config)
        self._running = running

    def end(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stopping = asyncio.create_task(self._running.stop())
        while not stopping.done() and not self.force_exit:  # set by a second Ctrl-C
            await asyncio.wait({stopping}, timeout=0.2)
        await super().shutdown(sockets)


@contextmanager
def _stops_are_expected() -> Iterator[None]:
    """uvicorn raises the signal that stopped it again, when it is done; here that was no failure."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say_where(config: ServeConfig, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    if config.page:
        print(f"page {address}/")
    print(f"API  {address}/v1", flush=True)
