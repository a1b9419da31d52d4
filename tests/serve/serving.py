"""Start and stop a server as a user does, in a process of its own, and talk to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
from PIL import Image

PATIENCE = 240  # seconds for a start, on machines that do other things too
_RUN = """
import json, sys
from openlance.errors import InputError
from openlance.serve.run import run
from openlance.serve.settings import ServeConfig
given = json.loads(sys.argv[1])
lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
try:
    run(ServeConfig(**given | lists))
except InputError as error:
    sys.exit(f"InputError: {error}")
"""


@dataclass(frozen=True)
class Server:
    """address: http://127.0.0.1:PORT. folder: where it runs, its output in out.log and err.log."""

    address: str
    process: subprocess.Popen[bytes]
    folder: Path

    def openai(self, key: str = "none", **options: Any) -> openai.OpenAI:
        """The real client, which tries nothing twice."""
        options = {"max_retries": 0, "timeout": 200} | options
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, **options)

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.address, **{"timeout": 200, "trust_env": False} | options)

    def log(self) -> list[dict[str, Any]]:
        """The lines of its log."""
        return [json.loads(line) for line in (self.folder / "err.log").read_text().splitlines()]

    def metric(self, name: str) -> float:
        """The value of a line of /metrics; 0 where there is none."""
        with self.http() as http:
            lines = http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == name)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Have it end; gives its exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


@contextmanager
def serving(folder: Path, *, ready: bool = True, **settings: Any) -> Iterator[Server]:
    """A server of nano on the CPU, on a free port and without the page; settings: fields of ServeConfig.

    ready: wait until it takes jobs.
    """
    settings = {"devices": ["cpu"], "port": 0, "page": False, "patience": 20} | settings
    with (folder / "out.log").open("wb") as out, (folder / "err.log").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-c", _RUN, json.dumps(settings)],
            cwd=folder,
            stdout=out,
            stderr=err,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        server = Server(_address(process, folder), process, folder)
        if ready:
            _wait_until_ready(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()


def _address(process: subprocess.Popen[bytes], folder: Path) -> str:
    for _ in _while_alive(process, folder):
        for line in (folder / "out.log").read_text().splitlines():
            if line.startswith("API"):
                return line.split()[1].removesuffix("/v1")
    raise AssertionError("unreachable")


def _wait_until_ready(server: Server) -> None:
    with server.http() as http:
        for _ in _while_alive(server.process, server.folder):
            if http.get("/readyz").status_code == 200:
                return


def _while_alive(process: subprocess.Popen[bytes], folder: Path) -> Iterator[None]:
    """Again and again, until it has ended or taken too long: then the test fails with what it said."""
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        yield
        time.sleep(0.1)
    said = (folder / "err.log").read_text()[-2000:]
    raise AssertionError(f"no server (exit code {process.poll()}): {said}")


def png(height: int = 48, width: int = 48, seed: int = 0) -> bytes:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def gif(frames: int = 4, side: int = 32) -> bytes:
    """A clip whose frames differ."""
    pictures = [Image.new("RGB", (side, side), (60 * n % 256, 90, 200)) for n in range(frames)]
    file = BytesIO()
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=100)
    return file.getvalue()


def address_of(data: bytes, media_type: str = "image/png") -> str:
    """A data: address."""
    return f"data:{media_type};base64,{b64encode(data).decode()}"
