"""A server under load: many clients that ask for words, pictures and clips in turns; nothing may be lost.

    python benchmarks/serve_load.py                              # nano, 64 clients, 60 s, a server of its own
    python benchmarks/serve_load.py --address http://host:8000 --key KEY --clients 16

Each client asks again as soon as it was answered. One that is told to come back later (429) waits as long as
it was told, and asks again; that wait is part of its latency. What ends otherwise than with its result is
lost. Memory is the server's and its workers', resident.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import openai
import psutil
import torch
from machine import about, describe, write
from PIL import Image, ImageDraw

SETTINGS = {"steps": 4}
COLORS = ("red", "green", "blue", "yellow")


@dataclass
class Load:
    """What the clients saw. seconds: of each answer, by kind. lost: what ended otherwise, by kind."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    told_to_wait: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    memory: list[float] = field(default_factory=list)


def picture() -> bytes:
    canvas = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(canvas).ellipse((30, 30, 66, 66), fill="red")
    file = BytesIO()
    canvas.save(file, "PNG")
    return file.getvalue()


async def words(client: openai.AsyncOpenAI, model: str, number: int) -> None:
    address = f"data:image/png;base64,{base64.b64encode(picture()).decode()}"
    shown = {"type": "image_url", "image_url": {"url": address}}
    asked = {"type": "text", "text": "what color is the circle?"}
    messages = [{"role": "user", "content": [shown, asked]}]
    stream = await client.chat.completions.create(
        model=model, messages=messages, max_tokens=8, seed=number, stream=True
    )
    finished = [chunk.choices[0].finish_reason async for chunk in stream if chunk.choices]
    assert finished[-1] in ("stop", "length")


async def drawn(client: openai.AsyncOpenAI, model: str, number: int) -> None:
    prompt = f"a {COLORS[number % len(COLORS)]} circle on white"
    found = await client.images.generate(model=model, prompt=prompt, extra_body={"seed": number} | SETTINGS)
    Image.open(BytesIO(base64.b64decode(found.data[0].b64_json))).verify()


async def edited(client: openai.AsyncOpenAI, model: str, number: int) -> None:
    given = ("circle.png", picture(), "image/png")
    found = await client.images.edit(
        model=model, image=given, prompt="make the circle blue", extra_body={"seed": number} | SETTINGS
    )
    Image.open(BytesIO(base64.b64decode(found.data[0].b64_json))).verify()


async def filmed(client: openai.AsyncOpenAI, model: str, number: int) -> None:
    asked = {"seed": number, "frames": 5} | SETTINGS
    video = await client.videos.create(model=model, prompt="a red circle moving right", extra_body=asked)
    while video.status in ("queued", "in_progress"):
        await asyncio.sleep(0.5)
        video = await client.videos.retrieve(video.id)
    assert video.status == "completed", video.error
    content = await client.videos.download_content(video.id)
    assert content.read()[4:8] == b"ftyp"
    await client.videos.delete(video.id)


Ask = Callable[[openai.AsyncOpenAI, str, int], Awaitable[None]]
MIX: tuple[Ask, ...] = (words, drawn, words, edited, drawn, words, filmed, drawn)


async def one_client(load: Load, client: openai.AsyncOpenAI, model: str, first: int, end: float) -> None:
    number = first
    while time.monotonic() < end:
        ask, start = MIX[number % len(MIX)], time.monotonic()
        number += 1
        while True:
            try:
                await ask(client, model, number)
                load.seconds[ask.__name__].append(time.monotonic() - start)
            except openai.RateLimitError as busy:
                load.told_to_wait[ask.__name__] += 1
                await asyncio.sleep(float(busy.response.headers["Retry-After"]))
                continue
            except (openai.APIError, AssertionError) as error:
                load.lost[f"{ask.__name__}: {type(error).__name__} {error}"[:160]] += 1
            break


async def watch(load: Load, process: psutil.Process | None) -> None:
    while process is not None:
        family = [process, *process.children(recursive=True)]
        load.memory.append(sum(member.memory_info().rss for member in family) / 2**20)
        await asyncio.sleep(2)


async def press(address: str, key: str, clients: int, seconds: float, process: psutil.Process | None) -> Load:
    load = Load()
    async with openai.AsyncOpenAI(
        base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=600
    ) as client:
        model = (await client.models.list()).data[0].id
        watching = asyncio.create_task(watch(load, process))
        end = time.monotonic() + seconds
        await asyncio.gather(*(one_client(load, client, model, n, end) for n in range(clients)))
        watching.cancel()
    return load


@contextmanager
def served(model: str) -> Iterator[tuple[str, psutil.Process]]:
    """A server of its own on a free port."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "openlance", "serve", "--port", "0", "--no-page", "--model", model]
        with (Path(folder) / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder)
            try:
                assert process.stdout is not None
                line = next(line for line in process.stdout if line.startswith("API"))
                found = re.search(r"http://\S+(?=/v1)", line)
                assert found
                wait(found[0])
                yield found[0], psutil.Process(process.pid)
            finally:
                process.terminate()
                process.wait()


def wait(address: str) -> None:
    import httpx

    while httpx.get(f"{address}/readyz", trust_env=False).status_code != 200:
        time.sleep(0.2)


def table(load: Load, seconds: float) -> dict[str, object]:
    found: dict[str, object] = {"seconds": seconds, "lost": dict(load.lost)}
    for kind, times in load.seconds.items():
        p50, p95 = np.percentile(times, (50, 95)).round(2).tolist()
        found[kind] = {"answered": len(times), "p50 s": p50, "p95 s": p95,
                       "429": load.told_to_wait[kind]}  # fmt: skip
    if load.memory:
        third = max(1, len(load.memory) // 3)
        parts = load.memory[third : 2 * third], load.memory[-third:]
        found["memory MiB, middle and last third"] = [round(float(np.mean(part))) for part in parts]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", help="of a server that runs; default one of its own")
    parser.add_argument("--key", default="none")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    start = time.monotonic()
    if args.address:
        load = asyncio.run(press(args.address, args.key, args.clients, args.seconds, None))
    else:
        with served(args.model) as (address, process):
            start = time.monotonic()
            load = asyncio.run(press(address, args.key, args.clients, args.seconds, process))
    found = table(load, round(time.monotonic() - start, 1))
    machine = about(torch.device("cpu"))
    print(describe(machine))
    for name, value in found.items():
        print(f"{name}: {value}")
    write(args.out, {"machine": machine, "results": found})
    sys.exit(1 if load.lost else 0)


if __name__ == "__main__":
    main()
