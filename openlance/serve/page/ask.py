"""Questions about pictures and clips, answered word by word."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import gradio as gr

from openlance.errors import InputError
from openlance.sequence.template import Task
from openlance.serve.jobs import Busy, JobError, Request, Spoken, Why
from openlance.serve.page.controls import QUIET, Page, Values, sent
from openlance.serve.page.examples import Examples
from openlance.serve.page.follow import Watched, follow, note
from openlance.serve.page.making import warn
from openlance.serve.page.session import Item, Session
from openlance.serve.security import plain_text
from openlance.serve.settings import ServeConfig

_PLACE = "ask"
_TOKENS = 256  # of an answer, until the visitor says otherwise


class AskTab:
    """taken: what `take` fills."""

    TASKS = (Task.X2T_IMAGE, Task.X2T_VIDEO, Task.CHAT)

    def __init__(self, page: Page, examples: Examples | None):
        self.page = page
        self.chat = gr.Chatbot(
            label="Conversation",
            height="55vh",
            feedback_options=None,
            buttons=["copy"],
            allow_file_downloads=False,
        )
        self.box = gr.MultimodalTextbox(
            label="Question, with pictures or clips", placeholder="ask, and attach what it is about",
            file_types=["image", "video"], file_count="multiple",
        )  # fmt: skip
        self.said = gr.HTML(elem_classes="progress", padding=False)
        with gr.Row():
            self.stop = gr.Button("Stop", interactive=False, min_width=120)
            self.clear = gr.Button("Clear", min_width=120)
        with gr.Accordion("Advanced", open=False), gr.Row():
            most = page.config.max_tokens
            self.tokens = gr.Slider(1, most, min(_TOKENS, most), step=1, label="Tokens, at most")
            self.temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature; 0: the likeliest words")
        if examples:
            examples.offer(examples.ask, [self.box])
        self.taken = [self.box]
        self._wire()

    async def take(self, session: Session, item: Item) -> dict[Any, Any]:
        """Attach a result of this visit to the next question."""
        return {self.box: {"text": "", "files": [str(item.path)]}}

    def _wire(self) -> None:
        session = self.page.session
        asked = self.box.submit(
            self._take_up, [session, self.box], [self.box, self.said], trigger_mode="multiple", **QUIET
        )
        asked.then(
            self._answer, {session, self.tokens, self.temperature},
            [self.chat, self.box, self.said, self.stop], trigger_mode="multiple", **QUIET,
        )  # fmt: skip
        self.stop.click(self._stop, session, queue=False, **QUIET)
        gr.on([self.clear.click, self.chat.clear], self._clear, session, [self.chat, self.said], **QUIET)

    async def _take_up(self, session: Session, box: dict[str, Any]) -> dict[Any, Any]:
        """Take the question out of its box, for `_answer`."""
        if _PLACE in session.busy:
            return {self.said: gr.skip()}
        session.busy.add(_PLACE)
        try:
            session.asked = await self._question(session, box), box
        except InputError as error:
            return {self.said: warn(str(error))}
        finally:
            if session.asked is None:
                session.busy.discard(_PLACE)
        return {self.box: None, self.said: note("sending …", busy=True)}

    async def _answer(self, values: Values) -> AsyncGenerator[dict[Any, Any], None]:
        session, engine = values[self.page.session], self.page.engine
        if session.asked is None:
            yield {self.said: gr.skip()}
            return
        (question, box), session.asked = session.asked, None
        before = session.talk
        talk, watched = before, list[Watched]()
        try:
            request = await self._request([*before, question], values)
            async with aclosing(follow(engine, session, _PLACE, [request])) as states:
                async for watched in states:
                    talk = [*before, question, {"role": "assistant", "content": watched[0].text}]
                    said = _state(watched[0], engine.waiting)
                    yield {self.chat: talk, self.said: said, self.stop: gr.Button(interactive=True)}
            said = _ending(watched[0])
        except (InputError, Busy, JobError) as error:
            said = warn(str(error))
        finally:
            session.busy.discard(_PLACE)
        answered = bool(watched) and bool(watched[0].outcome or watched[0].text)
        if answered and session.talk is before:  # not cleared meanwhile
            session.talk = talk
        yield {
            self.chat: session.talk,
            self.said: said,
            self.stop: gr.Button(interactive=False),
            self.box: gr.skip() if answered else box,
        }

    async def _question(self, session: Session, box: dict[str, Any]) -> dict[str, Any]:
        """The visitor's turn: what is attached, kept in their folder, then the words."""
        text = [box["text"]] if box["text"].strip() else []
        if not text and not box["files"]:
            raise InputError("nothing is asked: write a question, or attach a picture or clip")
        found = await sent(box["files"], self.page.config)
        kept = [
            await session.store(data, "sent", Path(path).suffix)
            for path, data in zip(box["files"], found, strict=True)
        ]
        return {"role": "user", "content": [*({"path": str(path)} for path in kept), *text]}

    async def _request(self, talk: Sequence[dict[str, Any]], values: Values) -> Request:
        """Of a conversation as the chatbot shows it."""
        config = self.page.config
        messages = await asyncio.to_thread(_messages, talk, config)
        options = {"max_tokens": int(values[self.tokens]), "temperature": values[self.temperature]}
        return Request("chat", {"messages": messages, **options}, streamed=True)

    async def _stop(self, session: Session) -> None:
        await session.cancel(_PLACE)

    async def _clear(self, session: Session) -> tuple[list[Any], str]:
        await session.cancel(_PLACE)
        session.talk = []
        return [], ""


def _messages(talk: Sequence[Mapping[str, Any]], config: ServeConfig) -> list[dict[str, Any]]:
    """A conversation as the chatbot shows it, as the model takes it. Raises InputError for too long a one."""
    turns = [(turn["role"], turn["content"]) for turn in talk]
    parts = [part for _, content in turns for part in ([content] if isinstance(content, str) else content)]
    files = [part for part in parts if isinstance(part, dict)]
    if len(files) > config.max_pictures:
        raise InputError(f"a conversation holds at most {config.max_pictures} pictures and clips: clear it")
    letters = sum(len(part) for part in parts if isinstance(part, str))
    if letters > config.max_text:
        raise InputError(f"a conversation holds at most {config.max_text} characters: clear it")
    return [
        {"role": role, "content": plain_text(content) if isinstance(content, str) else [*map(_part, content)]}
        for role, content in turns
    ]


def _part(part: str | dict[str, str]) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": plain_text(part)}
    return {"type": "media", "media": Path(part["path"]).read_bytes()}


def _state(watched: Watched, waiting: int) -> str:
    if watched.text:
        return note("answering …")
    words = "reading …" if watched.job.state == "running" else f"waiting: {waiting} in the queue"
    return note(words, busy=True)


def _ending(watched: Watched) -> str:
    """How many words, or why there are no more."""
    if watched.error is not None:
        return note("stopped") if watched.error.why is Why.CANCELLED else warn(str(watched.error))
    assert isinstance(watched.outcome, Spoken)
    cut = ", cut off there: allow more" if watched.outcome.finish == "length" else ""
    return note(f"{watched.outcome.tokens} tokens{cut}")
