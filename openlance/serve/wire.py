"""What the engine and its workers say to each other: plain data, pickled over a pipe."""

from __future__ import annotations

from dataclasses import dataclass

from openlance.config import ModelConfig
from openlance.sequence.template import Task
from openlance.serve.jobs import Outcome, Piece, Progress, Request, Why


@dataclass(frozen=True)
class ModelInfo:
    """What is served: its name, the tasks it can do, its configuration, the names of its adapters."""

    name: str
    tasks: frozenset[Task]
    config: ModelConfig
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Memory:
    """Bytes that a worker holds: resident in the host's memory, and allocated on a CUDA device."""

    host: int = 0
    device: int = 0


# -- to a worker -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ticket:
    """One job of a batch; a batch is a list of them, and is sent to a worker that is idle."""

    id: str
    request: Request


@dataclass(frozen=True)
class Cancel:
    """Stop a job of the batch that was sent last; the worker answers with Ended or Failed."""

    id: str


# -- from a worker ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """Loaded, and idle."""

    model: ModelInfo
    memory: Memory


@dataclass(frozen=True)
class Unusable:
    """What was to be loaded cannot be: the user has to mend the configuration. The worker ends."""

    message: str


@dataclass(frozen=True)
class Told:
    """News of a job."""

    id: str
    event: Progress | Piece


@dataclass(frozen=True)
class Ended:
    """A job is done."""

    id: str
    outcome: Outcome


@dataclass(frozen=True)
class Failed:
    """A job came to nothing; see `JobError`."""

    id: str
    why: Why
    message: str


@dataclass(frozen=True)
class Returned:
    """A job for which the batch had no room; not begun."""

    id: str


@dataclass(frozen=True)
class Idle:
    """Every job of the batch has been answered."""

    memory: Memory


FromWorker = Ready | Unusable | Told | Ended | Failed | Returned | Idle
