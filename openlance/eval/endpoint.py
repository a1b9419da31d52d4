"""Ask an OpenAI-compatible service."""

from __future__ import annotations

import base64
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from io import BytesIO
from typing import Any

from PIL import Image

from openlance.errors import InputError
from openlance.eval.settings import Endpoint

FIRST_PAUSE = 0.5  # seconds before the second try; doubled before each further one


class NoAnswerError(InputError):
    """The service gave no answer to one request, however often it was asked."""


def ask(
    service: Endpoint, words: str, pictures: Sequence[Image.Image] = (), *, system: str = "",
    temperature: float = 0.0, max_tokens: int = 512,
) -> str:  # fmt: skip
    """What the service answers to pictures and words.

    What is busy (429), fails (5xx) or takes too long is asked again, `service.tries` times in all; then
    NoAnswerError. Raises InputError for a service that refuses the request, cannot be reached or answers in
    another form.
    """
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in pictures
    ]
    content: Any = [*parts, {"type": "text", "text": words}] if parts else words
    messages = [{"role": "system", "content": system}] if system else []
    body = {
        "model": service.model,
        "messages": [*messages, {"role": "user", "content": content}],
        "temperature": temperature,
        "max_tokens": max_tokens,
    }
    answer = _post(service, json.dumps(body).encode())
    try:
        said = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise InputError(f"{service.url}: no answer of a chat: {str(answer)[:200]}") from None
    return said if isinstance(said, str) else ""


def _post(service: Endpoint, body: bytes) -> Any:
    headers = {"Content-Type": "application/json"}
    if service.key:
        if service.key not in os.environ:
            raise InputError(f"{service.url}: its key is to be in the environment variable {service.key}")
        headers["Authorization"] = f"Bearer {os.environ[service.key]}"
    request = urllib.request.Request(f"{service.url.rstrip('/')}/chat/completions", body, headers)
    for tried in range(1, service.tries + 1):
        try:
            with urllib.request.urlopen(request, timeout=service.timeout) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            if error.code != 429 and error.code < 500:
                said = error.read(300).decode(errors="replace").strip()
                raise InputError(
                    f"{service.url}: refused with {error.code} {said or error.reason}"
                ) from error
            failed: Exception = error
        except (OSError, json.JSONDecodeError) as error:
            if isinstance(getattr(error, "reason", None), ConnectionRefusedError):
                raise InputError(f"{service.url}: nothing answers there") from error
            failed = error
        if tried < service.tries:
            time.sleep(FIRST_PAUSE * 2 ** (tried - 1))
    raise NoAnswerError(f"{service.url}: no answer after {service.tries} tries ({failed})") from failed


def _data_url(picture: Image.Image) -> str:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
