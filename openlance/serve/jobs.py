"""What the server asks of a worker, and what it hears back: plain data that travels between processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


@dataclass(frozen=True)
class Request:
    """One call of a method of `LancePipeline.order`.

    method: generate_image, generate_video, animate, edit, subject or chat. arguments: its own, by name; media
    as the bytes of a file, already checked against the server's limits. adapter: a LoRA adapter by the name
    that the server gave it. media_type: what is made is encoded as: image/png, video/mp4 …; default by
    the task. preview_every: steps between pictures of what is being denoised; 0 for none. streamed: whether
    words are wanted as they come.
    """

    method: str
    arguments: Mapping[str, Any]
    adapter: str | None = None
    media_type: str | None = None
    preview_every: int = 0
    streamed: bool = False


@dataclass(frozen=True)
class Started:
    """A worker has taken the job up."""


@dataclass(frozen=True)
class Progress:
    """One denoising step done, from 1, of how many. preview: a PNG, now and then."""

    step: int
    total: int
    preview: bytes | None = None


@dataclass(frozen=True)
class Piece:
    """Words, as they come."""

    text: str


Event = Started | Progress | Piece


@dataclass(frozen=True)
class Made:
    """A picture or clip, encoded, its settings inside. size: (height, width). seconds: time by phase."""

    media: bytes
    media_type: str
    size: tuple[int, int]
    frames: int
    fps: float | None
    settings: Mapping[str, Any]
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Spoken:
    """Words. prompt_tokens: of what was said and shown; tokens: of the answer; finish: "stop" or "length"."""

    text: str
    prompt_tokens: int
    tokens: int
    finish: str
    settings: Mapping[str, Any]
    seconds: Mapping[str, float] = field(default_factory=dict)


Outcome = Made | Spoken


class Why(StrEnum):
    """Why a job has no outcome."""

    REFUSED = "refused"  # the request cannot be done: its sender can mend it
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"
    STOPPED = "stopped"  # the server is shutting down
    FAILED = "failed"  # the worker died of it, or ran out of memory


class JobError(Exception):
    """A job that came to nothing. The message is fit for whoever sent it."""

    def __init__(self, why: Why, message: str):
        super().__init__(message)
        self.why = why


class Busy(Exception):
    """The queue is full. retry_after: seconds, a guess from how long jobs take."""

    def __init__(self, retry_after: int):
        super().__init__(f"the server is busy: try again in {retry_after} seconds")
        self.retry_after = retry_after
