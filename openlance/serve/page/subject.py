"""Subjects of reference pictures, drawn or filmed as the words say."""

from __future__ import annotations

from typing import Any

import gradio as gr

from openlance.sequence.template import Task
from openlance.serve.jobs import Request
from openlance.serve.page.controls import (
    Page,
    Prompt,
    Sampling,
    Size,
    Values,
    in_box,
    made_box,
    media_box,
    sent,
)
from openlance.serve.page.examples import Examples
from openlance.serve.page.making import Making
from openlance.serve.page.session import Item, Session, captioned


class SubjectTab:
    """made: the event after which there is something new. taken: what `take` fills."""

    TASKS = (Task.SUBJECT_IMAGE, Task.SUBJECT_VIDEO)

    def __init__(self, page: Page, examples: Examples | None):
        self.page = page
        with gr.Row(elem_classes="bench"):
            with gr.Column():
                self.references = media_box("Reference pictures")
                self.prompt = Prompt(page, "Prompt", "what is to be seen of them")
                making = Making(page, "subject", self.prompt, "Draw")
                with gr.Column(elem_classes="later"):
                    self.size = Size(page, self.TASKS)
                    sampling = Sampling(page)
                    if examples:
                        examples.offer(examples.subject, [self.references, self.prompt.box])
            with gr.Column():
                making.progress.render()
                self.gallery = made_box()
        inputs = {self.references} | self.size.inputs
        self.made = making.wire(sampling, inputs, [self.gallery], self._prepare, self._show)
        self.taken = [self.references]

    async def take(self, session: Session, item: Item) -> dict[Any, Any]:
        """Have a picture of this visit as the reference."""
        return {self.references: [str(item.path)]}

    async def _prepare(self, session: Session, values: Values, options: dict[str, Any]) -> list[Request]:
        paths = in_box(values[self.references], most=self.page.config.max_pictures, what="reference pictures")
        own = {
            "references": await sent(paths, self.page.config),
            "prompt": self.prompt.read(values),
            "video": self.size.clip(values),
            **self.size.read(values),
            **options,
        }
        return self.size.requests("subject", own, values)

    def _show(self, session: Session, items: list[Item]) -> dict[Any, Any]:
        return {self.gallery: captioned(items)}
