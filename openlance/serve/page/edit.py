"""A picture or clip, changed turn by turn; every turn is kept, and any can be gone on from."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import gradio as gr

from openlance.errors import InputError
from openlance.sequence.template import Task
from openlance.serve.jobs import Request
from openlance.serve.page.controls import (
    QUIET,
    Page,
    Prompt,
    Sampling,
    Values,
    chosen,
    in_box,
    media_box,
    sent,
)
from openlance.serve.page.examples import Examples
from openlance.serve.page.making import Making, warn
from openlance.serve.page.session import Item, Session, Turn


class EditTab:
    """made: the event after which there is something new. taken: what `take` fills."""

    TASKS = (Task.IMAGE_EDIT, Task.VIDEO_EDIT)

    def __init__(self, page: Page, examples: Examples | None):
        self.page = page
        with gr.Row(elem_classes="bench"):
            with gr.Column():
                self.source = media_box("Picture or clip to begin with", clips=True)
                self.prompt = Prompt(page, "Instruction", "what is to change")
                self.making = Making(page, "edit", self.prompt, "Edit")
                with gr.Column(elem_classes="later"):
                    sampling = Sampling(page)
                    begins = [self.source.upload]
                    if examples:
                        begins.append(examples.offer(examples.edit, [self.source, self.prompt.box]).then)
            with gr.Column():
                self.making.progress.render()
                self.turns = gr.Gallery(
                    label="Turns: choose one to go on from it", preview=True, height=480,
                    object_fit="contain", buttons=["download"],
                )  # fmt: skip
                self.place = gr.Markdown()
        self.taken = [self.turns, self.place]
        self.made = self.making.wire(sampling, set(), self.taken, self._prepare, self._made)
        begun = [*self.taken, self.source, self.making.progress]
        for begin in begins:
            begin(self._begin, [page.session, self.source], begun, **QUIET)
        self.turns.select(self._go_on, page.session, self.place, **QUIET)

    async def take(self, session: Session, item: Item) -> dict[Any, Any]:
        """Begin with a result of this visit."""
        await session.cancel("edit")
        session.turns, session.turn, session.basis = [Turn(item)], 0, 0
        return self._show(session)

    async def _begin(self, session: Session, box: list[tuple[str, str | None]] | None) -> dict[Any, Any]:
        """Begin with what was dropped; the box is empty again for the next."""
        try:
            [path] = in_box(box, most=1, what="picture or clip")
            [data] = await sent([path], self.page.config)
        except InputError as error:
            return {self.source: None, self.making.progress: warn(str(error))}
        kept = await session.store(data, "sent", Path(path).suffix)
        return {self.source: None, self.making.progress: "", **await self.take(session, Item(kept))}

    async def _prepare(self, session: Session, values: Values, options: dict[str, Any]) -> list[Request]:
        if not session.turns:
            raise InputError("there is nothing to edit yet: drop a picture or clip, or take a result")
        session.basis = session.turn
        data = await asyncio.to_thread(session.turns[session.basis].item.path.read_bytes)
        return [Request("edit", {"source": data, "prompt": self.prompt.read(values), **options})]

    def _made(self, session: Session, items: list[Item]) -> dict[Any, Any]:
        session.turns.append(Turn(items[0], session.basis))
        session.turn = len(session.turns) - 1
        return self._show(session)

    def _go_on(self, session: Session, event: gr.SelectData) -> str:
        session.turn = chosen(event, session.turns)
        return self._where(session)

    def _show(self, session: Session) -> dict[Any, Any]:
        shown = [(str(turn.item.path), _caption(number, turn)) for number, turn in enumerate(session.turns)]
        return {
            self.turns: gr.Gallery(shown, selected_index=session.turn),
            self.place: self._where(session),
        }

    def _where(self, session: Session) -> str:
        return f"The next edit goes on from turn {session.turn}."


def _caption(number: int, turn: Turn) -> str:
    if turn.parent is None:
        return "0 · as it was"
    origin = "" if turn.parent == number - 1 else f" (from {turn.parent})"
    return f"{number} · {turn.item.settings['prompt']}{origin}"
