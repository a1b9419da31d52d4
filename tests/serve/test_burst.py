"""Ten thousand requests at once: each is answered or told when to come back, and the server lives on."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from serving import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CONNECTIONS, EACH = 250, 40
SERVE = {"queue": 16}
BODY = {"model": "nano", "messages": [{"role": "user", "content": "what color is it?"}], "max_tokens": 1}

Told = tuple[int, dict[str, str], Any]


async def client(host: str, port: int) -> list[Told]:
    """Status, headers and body of each answer. By hand: client libraries take longer than the server."""
    reader, writer = await asyncio.open_connection(host, port)
    body = json.dumps(BODY).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    told = []
    for _ in range(EACH):
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        answer = json.loads(await reader.readexactly(int(headers["content-length"])))
        told.append((int(first.split()[1]), headers, answer))
    writer.close()
    return told


async def burst(address: str) -> list[Told]:
    at = urlsplit(address)
    assert at.hostname and at.port
    found = await asyncio.gather(*(client(at.hostname, at.port) for _ in range(CONNECTIONS)))
    return [told for each in found for told in each]


def test_none_of_ten_thousand_requests_is_lost(server: Server) -> None:
    process = psutil.Process(server.process.pid)
    with server.http() as http:
        assert http.post("/v1/chat/completions", json=BODY).status_code == 200
    before = process.memory_info().rss
    told = asyncio.run(burst(server.address))
    counted = Counter(status for status, _, _ in told)
    assert set(counted) <= {200, 429}
    assert counted[200] >= SERVE["queue"]
    assert counted.total() == CONNECTIONS * EACH == 10_000
    refused = [(headers, answer) for status, headers, answer in told if status == 429]
    assert all(int(headers["retry-after"]) >= 1 and answer["error"]["message"] for headers, answer in refused)
    with server.http() as http:
        assert http.get("/readyz").status_code == 200
        assert http.post("/v1/chat/completions", json=BODY).status_code == 200
    assert server.metric("openlance_jobs_waiting") == 0
    assert process.memory_info().rss - before < 200 * 2**20
