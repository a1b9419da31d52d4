"""An OpenAI-compatible service for tests: what it is asked is kept, and it answers as it is told."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class Service:
    """An OpenAI-compatible service. answers: each of a text, a status, or seconds to sleep before a text."""

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any]], str | int | float] = lambda body: "{}"
        self.bodies: list[dict[str, Any]] = []
        self.url = ""


@contextmanager
def serving() -> Iterator[Service]:
    told = Service()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told.bodies.append(body | {"path": self.path, "key": self.headers.get("Authorization")})
            answer = told.answer(body)
            if isinstance(answer, float):
                time.sleep(answer)
                answer = "too late"
            status = answer if isinstance(answer, int) else 200
            content = json.dumps({"choices": [{"message": {"content": str(answer)}}]}).encode()
            try:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                pass  # whoever asked did not wait

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    told.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield told
    server.shutdown()
    server.server_close()
    thread.join()
