"""A reward that another machine computes."""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from io import BytesIO
from typing import Any

from PIL import Image

from openlance.errors import InputError
from openlance.rl.rewards.base import Media, Metadata

FIRST_PAUSE = 0.5  # seconds before the second try; doubled before each further one


class Remote:
    """The reward of an HTTP service, asked in batches.

    It gets a POST with JSON {"prompts": [...], "media": [...], "metadata": [...]}, media being words, or the
    list of a picture's or clip's frames as PNG in base64, and answers {"scores": [...]}, one for each prompt.
    Metadata must be plain enough for JSON. A service that cannot be reached, is busy (429) or fails (5xx) is
    asked again, `tries` times in all; `timeout`: seconds to wait for an answer.
    """

    def __init__(self, url: str, *, batch: int = 16, timeout: float = 60.0, tries: int = 4):
        if not url.startswith(("http://", "https://")):
            raise InputError(f"{url}: a remote reward is an address that begins with http:// or https://")
        self.url, self.batch, self.timeout, self.tries = url, batch, timeout, tries

    def __call__(
        self, prompts: Sequence[str], media: Sequence[Media], metadata: Sequence[Metadata]
    ) -> Sequence[float]:
        found: list[float] = []
        for start in range(0, len(prompts), self.batch):
            part = slice(start, start + self.batch)
            words = list(prompts[part])
            asked = {
                "prompts": words,
                "media": [_plain(shown) for shown in media[part]],
                "metadata": [dict(data) for data in metadata[part]],
            }
            found += self._scores(json.dumps(asked).encode(), len(words))
        return found

    def _scores(self, body: bytes, count: int) -> list[float]:
        answer = self._ask(body)
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list) or len(scores) != count:
            raise InputError(f'{self.url}: the answer must be {{"scores": [...]}} with {count} numbers')
        return [float(score) for score in scores]

    def _ask(self, body: bytes) -> Any:
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        for tried in range(1, self.tries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                if error.code != 429 and error.code < 500:
                    raise InputError(f"{self.url}: refused with {error.code} {error.reason}") from error
                failed: Exception = error
            except (OSError, json.JSONDecodeError) as error:
                failed = error
            if tried < self.tries:
                time.sleep(FIRST_PAUSE * 2 ** (tried - 1))
        raise InputError(f"{self.url}: no answer after {self.tries} tries ({failed})") from failed


def _plain(shown: Media) -> str | list[str]:
    if isinstance(shown, str):
        return shown
    found = []
    for frame in shown:
        buffer = BytesIO()
        Image.fromarray(frame).save(buffer, "PNG")
        found.append(base64.b64encode(buffer.getvalue()).decode())
    return found
