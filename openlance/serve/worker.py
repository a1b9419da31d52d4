"""The worker: a process that has the model on one device and does batches of jobs, one after another."""

from __future__ import annotations

import importlib
import inspect
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

import psutil
import torch
from PIL import Image

from openlance.data.media import Video
from openlance.errors import InputError
from openlance.infer.generate import Cancelled, Step
from openlance.infer.orders import PARTS_OF, GenerateOrder, Order
from openlance.infer.pipeline import LancePipeline
from openlance.infer.result import Answer, Generated
from openlance.model.adapters import disabled
from openlance.serve.encode import encode_preview, encode_result, media_type_for
from openlance.serve.jobs import Outcome, Piece, Progress, Request, Spoken, Why
from openlance.serve.settings import ServeConfig
from openlance.serve.wire import (
    Cancel,
    Ended,
    Failed,
    FromWorker,
    Idle,
    Memory,
    ModelInfo,
    Ready,
    Returned,
    Ticket,
    Told,
    Unusable,
)

Safety = Callable[[str | None, Image.Image | Video | None], str | None]
"""(prompt, what was made of it) → why it is refused, or None. Words that were said come as a prompt."""

METHODS = ("generate_image", "generate_video", "animate", "edit", "subject", "chat")
DTYPES = ("float32", "bfloat16", "float16")

CANCELLED = "cancelled"
NO_MEMORY = "there is not enough memory for this: ask for a smaller size, fewer frames or fewer words"


def work(connection: Connection, config: ServeConfig, device: str, threads: int) -> None:
    """All that a worker process does: load, then batch after batch, until the pipe closes.

    threads: of torch, unless OMP_NUM_THREADS says otherwise.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the engine decides when we end
    inbox = Inbox(connection)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    try:
        safety, lance = load_safety(config.safety), load(config, device)
    except InputError as error:
        connection.send(Unusable(str(error)))
        return
    worker = Worker(lance, config, safety, connection.send, inbox.cancelled)
    connection.send(Ready(describe(lance, config), memory(lance)))
    while True:
        batch = inbox.batches.get()
        worker.do(batch)
        inbox.cancelled.difference_update(ticket.id for ticket in batch)
        connection.send(Idle(memory(lance)))


class Inbox:
    """Listens to the engine in a thread, so that a cancel is known while the device computes.

    Ends the process when the pipe closes: the engine is gone, however it went.
    """

    def __init__(self, connection: Connection):
        self.batches: SimpleQueue[list[Ticket]] = SimpleQueue()
        self.cancelled: set[str] = set()
        self._connection = connection
        Thread(target=self._listen, name="inbox", daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                os._exit(0)
            if isinstance(message, Cancel):
                self.cancelled.add(message.id)
            else:
                self.batches.put(message)


def load(config: ServeConfig, device: str) -> LancePipeline:
    """The model with its adapters. Raises InputError for what cannot be loaded."""
    if config.dtype is not None and config.dtype not in DTYPES:
        raise InputError(f"unknown dtype {config.dtype!r}: choose one of {', '.join(DTYPES)}")
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    lance = LancePipeline.from_pretrained(
        config.model, variant=config.variant, device=device, dtype=dtype, quantize=config.quantize,
        max_memory=config.max_memory,
    )  # fmt: skip
    if lance.model.device.type == "cuda":
        torch.cuda.set_device(lance.model.device)
    for name, folder in config.adapters.items():
        lance.load_adapter(folder, name)
    return lance


def load_safety(address: str | None) -> Safety | None:
    """The function at package.module:name. Raises InputError where there is none."""
    if address is None:
        return None
    module, _, name = address.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"safety {address!r}: {error}; give a function as package.module:name") from error
    if not callable(found):
        raise InputError(f"safety {address!r} is no function: give one as package.module:name")
    return found


def describe(lance: LancePipeline, config: ServeConfig) -> ModelInfo:
    have = lance.model.parts | ({"vae"} if lance.vae is not None else set())
    tasks = frozenset(task for task, parts in PARTS_OF.items() if parts <= have)
    with disabled(lance.model):
        return ModelInfo(config.name or lance.config.name, tasks, lance.config, tuple(config.adapters))


def memory(lance: LancePipeline) -> Memory:
    device = lance.model.device
    allocated = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return Memory(psutil.Process().memory_info().rss, allocated)


@dataclass(eq=False)
class Assignment:
    """A job of the batch that is being done. spoke: whether words of it were sent. over: it was answered."""

    ticket: Ticket
    order: Order
    spoke: bool = False
    over: bool = False


class Worker:
    """Does batches. post: takes what the engine is told. cancelled: jobs to stop; others add to it."""

    def __init__(
        self,
        lance: LancePipeline,
        config: ServeConfig,
        safety: Safety | None,
        post: Callable[[FromWorker], None],
        cancelled: AbstractSet[str],
    ):
        self.lance, self.config, self.safety = lance, config, safety
        self.post, self.cancelled = post, cancelled

    def do(self, batch: Sequence[Ticket]) -> None:
        """Jobs with the same adapter; each is answered with Ended, Failed or Returned."""
        try:
            adapter = self._adapter(batch[0].request.adapter)
        except InputError as error:
            for ticket in batch:
                self.post(Failed(ticket.id, Why.REFUSED, str(error)))
            return
        with adapter:
            tasks = self._prepare(batch)
            if tasks and not self._enough_memory(tasks):
                self._one_by_one(tasks)

    def _adapter(self, name: str | None) -> AbstractContextManager[None]:
        """Within it this adapter is active, or none."""
        if name is None:
            return disabled(self.lance.model)
        self.lance.set_adapters(name)
        return nullcontext()

    def _prepare(self, batch: Sequence[Ticket]) -> list[Assignment]:
        """As many as have room together; what comes after them goes back to the queue."""
        tasks: list[Assignment] = []
        room = self.config.tokens_together
        for index, ticket in enumerate(batch):
            order = self._order(ticket)
            if order is None:
                continue
            if tasks and order.tokens > room:
                for late in batch[index:]:
                    self.post(Returned(late.id))
                break
            tasks.append(Assignment(ticket, order))
            room -= order.tokens
        return tasks

    def _order(self, ticket: Ticket) -> Order | None:
        """None where the job was answered: it cannot be done, or nobody wants it any more."""
        if ticket.id in self.cancelled:
            self.post(Failed(ticket.id, Why.CANCELLED, CANCELLED))
            return None
        try:
            return self._make(ticket.request)
        except InputError as error:
            self.post(Failed(ticket.id, Why.REFUSED, str(error)))
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            self.post(Failed(ticket.id, Why.FAILED, NO_MEMORY))
        return None

    def _make(self, request: Request) -> Order:
        if request.method not in METHODS:
            raise InputError(f"unknown method {request.method!r}: choose from {', '.join(METHODS)}")
        method = getattr(self.lance.order, request.method)
        try:
            inspect.signature(method).bind(**request.arguments)
        except TypeError as error:
            raise InputError(f"{request.method}: {error}") from error
        order: Order = method(**request.arguments)
        if isinstance(order, GenerateOrder):
            media_type_for(request.media_type, clip=order.task.video)
        self._ask(words(request.arguments), None)
        return order

    def _ask(self, prompt: str | None, made: Image.Image | Video | None) -> None:
        """Raises InputError where the safety function refuses."""
        reason = None if self.safety is None else self.safety(prompt, made)
        if reason is not None:
            raise InputError(f"refused: {reason}")

    def _one_by_one(self, tasks: list[Assignment]) -> None:
        """What is left of tasks that had not enough memory together; sent words cannot be unsaid."""
        for task in [task for task in tasks if not task.over]:
            if len(tasks) == 1 or task.spoke or not self._enough_memory([task]):
                self._fail(task, Why.FAILED, NO_MEMORY)

    def _enough_memory(self, tasks: list[Assignment]) -> bool:
        """Do them together, and say whether there was memory for it."""
        try:
            self._run(tasks)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
        else:
            return True
        if self.lance.model.device.type == "cuda":  # only now: the error held on to tensors
            torch.cuda.empty_cache()
        return False

    def _run(self, tasks: list[Assignment]) -> None:
        def on_step(step: Step) -> bool:
            return self._stepped(tasks[step.order], step)

        def on_text(index: int, piece: str) -> bool:
            return self._said(tasks[index], piece)

        results = self.lance.run_each(
            [task.order for task in tasks],
            on_step=on_step,
            on_text=on_text,
            max_tokens_together=self.config.tokens_together,
        )
        for index, result in results:
            if not self._stopped(tasks[index]):
                assert not isinstance(result, Cancelled), "it was stopped"
                self._answer(tasks[index], result)

    def _stepped(self, task: Assignment, step: Step) -> bool:
        if self._stopped(task):
            return False
        every, preview = task.ticket.request.preview_every, None
        if every and step.number % every == 0 and step.number < step.total:
            assert self.lance.vae is not None
            preview = encode_preview(step.clean, self.lance.vae)
        self.post(Told(task.ticket.id, Progress(step.number, step.total, preview)))
        return True

    def _said(self, task: Assignment, piece: str) -> bool:
        if self._stopped(task):
            return False
        if piece and task.ticket.request.streamed:
            task.spoke = True
            self.post(Told(task.ticket.id, Piece(piece)))
        return True

    def _stopped(self, task: Assignment) -> bool:
        """Whether the job was answered already, as it is where it has been cancelled."""
        if not task.over and task.ticket.id in self.cancelled:
            self._fail(task, Why.CANCELLED, CANCELLED)
        return task.over

    def _answer(self, task: Assignment, result: Generated | Answer) -> None:
        try:
            outcome = self._outcome(task, result)
        except InputError as error:
            self._fail(task, Why.REFUSED, str(error))
        else:
            task.over = True
            self.post(Ended(task.ticket.id, outcome))

    def _outcome(self, task: Assignment, result: Generated | Answer) -> Outcome:
        if isinstance(result, Generated):
            self._ask(result.settings["prompt"], result.media)
            return encode_result(result, task.ticket.request.media_type)
        self._ask(result.text, None)
        shown = sum(map(len, task.order.sample))
        return Spoken(result.text, shown, result.tokens, result.finish, result.settings, result.seconds)

    def _fail(self, task: Assignment, why: Why, message: str) -> None:
        task.over = True
        self.post(Failed(task.ticket.id, why, message))


def words(arguments: Mapping[str, Any]) -> str:
    """All that a request says."""
    if "prompt" in arguments:
        return arguments["prompt"]
    contents = [message["content"] for message in arguments["messages"]]
    parts = [part for content in contents for part in ([content] if isinstance(content, str) else content)]
    texts = [part if isinstance(part, str) else part.get("text", "") for part in parts]
    return "\n".join(filter(None, texts))


def ran_out_of_memory(error: BaseException) -> bool:
    """On CUDA there is an exception for it; the CPU's allocator only says so."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
