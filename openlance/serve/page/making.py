"""What the tabs that make something share: the buttons, the progress, and how a request is carried out."""

from __future__ import annotations

import html
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import gradio as gr
from gradio.events import Dependency

from openlance.errors import InputError
from openlance.serve.jobs import Busy, JobError, Made, Request, Why
from openlance.serve.page.controls import QUIET, Page, Prompt, Sampling, Values
from openlance.serve.page.follow import Watched, follow, note, progress_bar
from openlance.serve.page.session import Item, Session

PREVIEWS = 5
"""Looks at what is being denoised, in all its steps."""

Prepare = Callable[[Session, Values, dict[str, Any]], Awaitable[list[Request]]]
"""From what the controls hold and the sampling options to requests; raises InputError."""

Show = Callable[[Session, list[Item]], dict[Any, Any]]
"""What the tab's own components show when something was made."""


class Making:
    """Prompt, buttons and progress of one tab, `place`. `progress` is to be rendered where it is to stand."""

    def __init__(self, page: Page, place: str, prompt: Prompt, verb: str):
        self.page, self.place, self.prompt = page, place, prompt
        with gr.Row():
            self.button = gr.Button(verb, variant="primary", min_width=120)
            self.stop = gr.Button("Cancel", interactive=False, min_width=120)
        self.progress = gr.HTML(elem_classes="progress", padding=False, render=False)

    def wire(
        self, sampling: Sampling, inputs: set[Any], outputs: list[Any], prepare: Prepare, show: Show
    ) -> Dependency:
        """Have the button, and Enter in the prompt, do it. inputs, outputs: the tab's own components."""
        page = self.page

        async def run(values: Values) -> AsyncGenerator[dict[Any, Any], None]:
            session = values[page.session]
            if self.place in session.busy:  # clicked twice
                yield {self.progress: gr.skip()}
                return
            session.busy.add(self.place)
            shown = {self.progress: note("sending …", busy=True), self.stop: gr.Button(interactive=True)}
            try:
                yield shown
                options = sampling.read(values)
                requests = [
                    replace(
                        request,
                        adapter=values[sampling.adapter] or None,
                        preview_every=-(-options["steps"] // PREVIEWS),
                    )
                    for request in await prepare(session, values, options)
                ]
                async with aclosing(self._carry_out(session, requests)) as states:
                    async for said, items in states:
                        shown |= {self.progress: said, **(show(session, items) if items else {})}
                        yield shown
                shown[sampling.seed] = options["seed"]
            except InputError as error:
                shown[self.progress] = warn(str(error))
            finally:
                session.busy.discard(self.place)
            yield {**shown, self.stop: gr.Button(interactive=False)}

        async def stop(session: Session) -> None:
            await session.cancel(self.place)

        self.stop.click(stop, page.session, queue=False, **QUIET)
        return gr.on(
            [self.button.click, self.prompt.box.submit], run,
            {page.session, self.prompt.box} | sampling.inputs | inputs,
            [self.progress, self.stop, sampling.seed, *outputs],
            trigger_mode="multiple", **QUIET,
        )  # fmt: skip

    async def _carry_out(
        self, session: Session, requests: Sequence[Request]
    ) -> AsyncGenerator[tuple[str, list[Item]], None]:
        """(HTML of how far it is, nothing yet), and at last (how it ended, what was made)."""
        engine, watched = self.page.engine, list[Watched]()
        try:
            async with aclosing(follow(engine, session, self.place, requests)) as states:
                async for watched in states:
                    yield progress_bar(watched, engine.waiting), []
        except (Busy, JobError) as error:
            yield warn(str(error)), []
            return
        items = [await session.add(one.outcome) for one in watched if isinstance(one.outcome, Made)]
        yield _ending(watched), items


def warn(message: str) -> str:
    """Say what is wrong: in a toast, and in the HTML that comes back."""
    gr.Warning(html.escape(message, quote=False))
    return note(message, wrong=True)


def _ending(watched: Sequence[Watched]) -> str:
    """How long it took and from which seeds, or why it came to nothing."""
    errors = [one.error for one in watched if one.error is not None]
    if any(error.why is not Why.CANCELLED for error in errors):
        return warn(next(str(error) for error in errors if error.why is not Why.CANCELLED))
    if errors:
        return note("cancelled")
    seconds = max(one.job.ended or 0 for one in watched) - min(one.job.created for one in watched)
    seeds = [str(one.job.request.arguments["seed"]) for one in watched]
    span = seeds[0] if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return note(f"done in {seconds:.1f} s, seed {span}")
