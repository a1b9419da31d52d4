"""Words into pictures and clips."""

from __future__ import annotations

import asyncio
from typing import Any

import gradio as gr

from openlance.errors import InputError
from openlance.sequence.template import Task
from openlance.serve.jobs import Request
from openlance.serve.page.controls import QUIET, Page, Prompt, Sampling, Size, Values, made_box, sent
from openlance.serve.page.examples import Examples
from openlance.serve.page.follow import note
from openlance.serve.page.making import Making, warn
from openlance.serve.page.recipe import recipe_inside
from openlance.serve.page.session import Item, Session, captioned


class GenerateTab:
    """made: the event after which there is something new."""

    TASKS = (Task.T2I, Task.T2V)

    def __init__(self, page: Page, examples: Examples | None):
        self.page = page
        with gr.Row(elem_classes="bench"):
            with gr.Column():
                self.prompt = Prompt(page, "Prompt", "what is to be seen")
                self.making = Making(page, "generate", self.prompt, "Generate")
                with gr.Column(elem_classes="later"):
                    self.size = Size(page, self.TASKS)
                    self.sampling = Sampling(page)
                    with gr.Accordion("Settings of a picture or clip made here", open=False):
                        self.file = gr.File(label="Its file", file_types=["image", "video"], height=120)
                    if examples:
                        examples.offer(examples.prompts, [self.prompt.box])
            with gr.Column():
                self.making.progress.render()
                self.gallery = made_box()
        self.made = self.making.wire(
            self.sampling, self.size.inputs, [self.gallery], self._prepare, self._show
        )
        restored = [self.prompt.box, self.making.progress, *self.size.inputs, *self.sampling.inputs]
        self.file.upload(self._restore, self.file, restored, **QUIET)

    async def _prepare(self, session: Session, values: Values, options: dict[str, Any]) -> list[Request]:
        method = "generate_video" if self.size.clip(values) else "generate_image"
        own = {"prompt": self.prompt.read(values), **self.size.read(values), **options}
        return self.size.requests(method, own, values)

    def _show(self, session: Session, items: list[Item]) -> dict[Any, Any]:
        return {self.gallery: captioned(items)}

    async def _restore(self, path: str) -> dict[Any, Any]:
        try:
            [data] = await sent([path], self.page.config)
            recipe = await asyncio.to_thread(recipe_inside, data)
            found = self.size.restore(recipe) | self.sampling.restore(recipe)
        except InputError as error:
            return {self.making.progress: warn(str(error))}
        return {**found, self.prompt.box: recipe.prompt, self.making.progress: note("settings restored")}
