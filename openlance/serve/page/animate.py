"""A picture into a clip that begins with it."""

from __future__ import annotations

from typing import Any

import gradio as gr

from openlance.sequence.template import Task
from openlance.serve.jobs import Request
from openlance.serve.page.controls import (
    Page,
    Prompt,
    Sampling,
    Values,
    frames_slider,
    in_box,
    media_box,
    sent,
)
from openlance.serve.page.examples import Examples
from openlance.serve.page.making import Making
from openlance.serve.page.session import Item, Session


class AnimateTab:
    """made: the event after which there is something new. taken: what `take` fills."""

    TASKS = (Task.I2V,)

    def __init__(self, page: Page, examples: Examples | None):
        self.page = page
        with gr.Row(elem_classes="bench"):
            with gr.Column():
                with gr.Row():
                    self.first = media_box("First frame")
                    self.last = media_box("Last frame, if wanted")
                self.prompt = Prompt(page, "What happens")
                making = Making(page, "animate", self.prompt, "Animate")
                with gr.Column(elem_classes="later"):
                    self.frames = frames_slider(page)
                    sampling = Sampling(page)
                    if examples:
                        examples.offer(examples.animate, [self.first, self.prompt.box])
            with gr.Column():
                making.progress.render()
                self.video = gr.Video(label="Made", autoplay=True, loop=True, buttons=["download"])
        inputs = {self.first, self.last, self.frames}
        self.made = making.wire(sampling, inputs, [self.video], self._prepare, self._show)
        self.taken = [self.first]

    async def take(self, session: Session, item: Item) -> dict[Any, Any]:
        """Begin with a picture of this visit."""
        return {self.first: [str(item.path)]}

    async def _prepare(self, session: Session, values: Values, options: dict[str, Any]) -> list[Request]:
        paths = in_box(values[self.first], most=1, what="the first frame")
        if values[self.last]:
            paths += in_box(values[self.last], most=1, what="the last frame")
        image, *rest = await sent(paths, self.page.config)
        last = {"last": rest[0]} if rest else {}
        frames = int(values[self.frames])
        own = {"image": image, "prompt": self.prompt.read(values), "frames": frames, **last}
        return [Request("animate", {**own, **options})]

    def _show(self, session: Session, items: list[Item]) -> dict[Any, Any]:
        return {self.video: str(items[0].path)}
