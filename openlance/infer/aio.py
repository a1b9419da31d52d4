"""The pipeline for asyncio: one thread does the work, and requests that wait for it go together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from typing_extensions import Unpack

from openlance.data.media import Source
from openlance.errors import InputError
from openlance.infer.generate import Cancelled, OnStep, Step
from openlance.infer.messages import question as asked
from openlance.infer.orders import Order, TextOptions
from openlance.infer.pipeline import TOKENS_TOGETHER, LancePipeline, Options, Result
from openlance.infer.prepare import Size
from openlance.infer.result import Answer, Generated

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(eq=False)
class _Request:
    """make: the order, its media decoded and encoded. result: done where nobody wants it any more.

    on_step: told of steps. pieces: where words go as they come.
    """

    make: Callable[[], Order]
    result: asyncio.Future[Result]
    on_step: OnStep | None = None
    pieces: asyncio.Queue[str | None] | None = None

    def step(self, step: Step) -> None:
        if not self.result.done() and self.on_step is not None and self.on_step(step) is False:
            self.result.set_exception(Cancelled(f"stopped after step {step.number} of {step.total}"))

    def say(self, piece: str) -> None:
        if self.pieces is not None and piece:  # "" where a word is not decided yet
            self.pieces.put_nowait(piece)

    def end(self, found: Result | BaseException) -> None:
        if self.result.done():
            return
        if isinstance(found, BaseException):
            self.result.set_exception(found)
        else:
            self.result.set_result(found)


class AsyncLance:
    """The methods of a pipeline, to be awaited:

        async with AsyncLance(lance) as aio:
            one, two = await asyncio.gather(aio.generate_image("a red star"), aio.ask("Why?"))

    The event loop stays free meanwhile. While one batch runs, requests wait; then all that wait go together,
    as `LancePipeline.run_each` takes them (`max_tokens_together` is its own). Where a task is cancelled, its
    work stops after the next step or word, and the others go on. `on_step` is called in the event loop, soon
    after the step. Leaving the block cancels what has not come. Nothing else may use the pipeline meanwhile,
    but through `call`.
    """

    def __init__(self, lance: LancePipeline, *, max_tokens_together: int = TOKENS_TOGETHER):
        self.lance, self.max_tokens_together = lance, max_tokens_together
        self._waiting: list[_Request] = []
        self._running: list[_Request] = []
        self._more = asyncio.Event()
        self._thread: ThreadPoolExecutor | None = None

    async def __aenter__(self) -> AsyncLance:
        if self._thread is not None:
            raise InputError("this AsyncLance is open already: make another")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lance")
        self._pump = asyncio.create_task(self._work())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        thread, self._thread = self._thread, None
        assert thread is not None
        for request in (*self._running, *self._waiting):
            request.result.cancel()
        self._pump.cancel()
        await asyncio.to_thread(thread.shutdown, cancel_futures=True)

    async def generate_image(
        self, prompt: str, *, size: Size | int | None = None, **options: Unpack[Options]
    ) -> Generated:
        """Text to image."""
        return await self._make(self.lance.order.generate_image, options, prompt, size=size)

    async def generate_video(
        self,
        prompt: str,
        *,
        size: Size | int | None = None,
        frames: int | None = None,
        **options: Unpack[Options],
    ) -> Generated:
        """Text to video."""
        return await self._make(self.lance.order.generate_video, options, prompt, size=size, frames=frames)

    async def animate(
        self,
        image: Source | Generated,
        prompt: str,
        *,
        last: Source | Generated | None = None,
        frames: int | None = None,
        **options: Unpack[Options],
    ) -> Generated:
        """Image to video."""
        return await self._make(self.lance.order.animate, options, image, prompt, last=last, frames=frames)

    async def edit(
        self,
        source: Source | Generated,
        prompt: str,
        *,
        keep_history: bool = False,
        **options: Unpack[Options],
    ) -> Generated:
        """Change a picture or clip."""
        return await self._make(self.lance.order.edit, options, source, prompt, keep_history=keep_history)

    async def subject(
        self,
        references: Source | Generated | Sequence[Source | Generated],
        prompt: str,
        *,
        video: bool = False,
        size: Size | int | None = None,
        frames: int | None = None,
        **options: Unpack[Options],
    ) -> Generated:
        """Draw (or film) the subjects of reference pictures."""
        own = {"video": video, "size": size, "frames": frames}
        return await self._make(self.lance.order.subject, options, references, prompt, **own)

    async def ask(
        self,
        question: str = "",
        media: Source | Generated | Sequence[Source | Generated] = (),
        **options: Unpack[TextOptions],
    ) -> Answer:
        """Answer a question."""
        return await self.chat(asked(question, media), **options)

    def stream(
        self,
        question: str = "",
        media: Source | Generated | Sequence[Source | Generated] = (),
        **options: Unpack[TextOptions],
    ) -> AsyncText:
        """Like `ask`, in pieces as they come: `async for piece in aio.stream(…)`."""
        return self.chat_stream(asked(question, media), **options)

    async def chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[TextOptions]) -> Answer:
        """Continue a conversation."""
        found = await self._request(partial(self.lance.order.chat, messages, **options)).result
        assert isinstance(found, Answer)
        return found

    def chat_stream(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[TextOptions]) -> AsyncText:
        """Like `chat`, in pieces as they come."""
        return AsyncText(partial(self._request, partial(self.lance.order.chat, messages, **options)))

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run anything else that uses the pipeline, such as a method of a `Conversation`, in its turn.

        Where the task is cancelled after it began, it goes on to its end.
        """
        work = partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._open(), work)

    # -- how it is done ------------------------------------------------------------------------------

    def _open(self) -> ThreadPoolExecutor:
        if self._thread is None:
            raise InputError("AsyncLance is not open: use it inside `async with AsyncLance(lance) as aio:`")
        return self._thread

    def _request(
        self,
        make: Callable[[], Order],
        on_step: OnStep | None = None,
        pieces: asyncio.Queue[str | None] | None = None,
    ) -> _Request:
        self._open()
        request = _Request(make, asyncio.get_running_loop().create_future(), on_step, pieces)
        self._waiting.append(request)
        self._more.set()
        return request

    async def _make(
        self, order: Callable[..., Order], options: Options, *given: Any, **own: Any
    ) -> Generated:
        choices = {name: value for name, value in options.items() if name != "on_step"}
        make = partial(order, *given, **own, **choices)
        found = await self._request(make, options.get("on_step")).result
        assert isinstance(found, Generated)
        return found

    async def _work(self) -> None:
        """Batch after batch, until this task is cancelled."""
        while True:
            await self._more.wait()
            self._more.clear()
            self._running, self._waiting = self._waiting, []
            await self._run(self._running)
            self._running = []

    async def _run(self, batch: list[_Request]) -> None:
        """Whatever is raised goes to those who wait for it."""
        makes = [self.call(_make_unless_gone, request) for request in batch]
        made = await asyncio.gather(*makes, return_exceptions=True)
        requests: list[_Request] = []
        orders: list[Order] = []
        for request, order in zip(batch, made, strict=True):
            if isinstance(order, BaseException):
                request.end(order)
            elif order is not None:
                requests.append(request)
                orders.append(order)
        loop = asyncio.get_running_loop()
        ran = self.call(self._run_together, requests, orders, loop)
        for failure in await asyncio.gather(ran, return_exceptions=True):
            if failure is not None:
                for request in requests:
                    request.end(failure)

    def _run_together(
        self, requests: list[_Request], orders: list[Order], loop: asyncio.AbstractEventLoop
    ) -> None:
        """On the thread: what happens is told in the event loop."""

        def tell(index: int, what: Callable[[T], None], news: T) -> bool:
            wanted = not requests[index].result.done()
            if wanted:
                loop.call_soon_threadsafe(what, news)
            return wanted

        def on_step(step: Step) -> bool:
            return tell(step.order, requests[step.order].step, replace(step, order=0))

        def on_text(index: int, piece: str) -> bool:
            return tell(index, requests[index].say, piece)

        most = self.max_tokens_together
        for index, result in self.lance.run_each(
            orders, on_step=on_step, on_text=on_text, max_tokens_together=most
        ):
            tell(index, requests[index].end, result)


class AsyncText:
    """`async for` its pieces, once; afterwards `answer` is the whole. Who stops listening stops the work."""

    def __init__(self, start: Callable[..., _Request]):
        self.answer: Answer | None = None
        self._start = start

    async def __aiter__(self) -> AsyncIterator[str]:
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        result = self._start(pieces=pieces).result
        result.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            found = await result
            assert isinstance(found, Answer)
            self.answer = found
        finally:
            result.cancel()


def _make_unless_gone(request: _Request) -> Order | None:
    return None if request.result.done() else request.make()
