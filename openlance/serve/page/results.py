"""What the visitor has made, below all tabs: look at it, read its settings, carry it to another tab."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import gradio as gr
from gradio.events import Dependency

from openlance.serve.page.controls import QUIET, Page, chosen
from openlance.serve.page.follow import note
from openlance.serve.page.session import Item, Session, captioned

Carry = Callable[[Session, Item], Awaitable[dict[Any, Any]]]
"""What the components of a tab hold, once it has taken up a result."""


class Results:
    """The gallery of a visit, and what can be done with the one that is chosen."""

    def __init__(self, page: Page, tabs: gr.Tabs):
        self.page, self.tabs = page, tabs
        with gr.Column(elem_classes="nothing") as self.whole:  # built at once, and hidden
            gr.Markdown("## Results of this visit")
            self.gallery = gr.Gallery(
                label="The newest first", columns=4, height="max-content", object_fit="contain",
                fit_columns=False, allow_preview=False, buttons=[], elem_classes="results",
            )  # fmt: skip
            self.words = gr.HTML(padding=False)
            with gr.Row() as self.row:
                self.download = gr.DownloadButton("Download", size="sm", min_width=100)
            with gr.Accordion("Settings", open=False):
                self.settings = gr.JSON(show_label=False)
        self.pictures_only: list[gr.Button] = []
        self.outputs: list[Any] = [self.whole, self.gallery, self.words, self.download, self.settings]

    def offer(self, label: str, tab: str, outputs: list[Any], carry: Carry, *, clips: bool) -> None:
        """A button that carries the chosen result to a tab. clips: whether that takes them."""
        with self.row:
            button = gr.Button(label, size="sm", min_width=100)
        if not clips:
            self.pictures_only.append(button)
            self.outputs.append(button)

        async def take(session: Session) -> dict[Any, Any]:
            taken = await carry(session, session.items[session.chosen])
            return {self.tabs: gr.Tabs(selected=tab), **taken}

        button.click(take, self.page.session, [self.tabs, *outputs], **QUIET)

    def wire(self, *made: Dependency) -> None:
        """Show what is new after each of these events, and what the visitor chooses."""

        def choose(session: Session, event: gr.SelectData) -> dict[Any, Any]:
            session.chosen = chosen(event, session.items)
            return self._show(session)

        for event in made:
            event.then(self._show, self.page.session, self.outputs, **QUIET)
        self.gallery.select(choose, self.page.session, self.outputs, **QUIET)

    def _show(self, session: Session) -> dict[Any, Any]:
        if not session.items:
            return {self.words: gr.skip()}
        item = session.items[session.chosen]
        return {
            self.whole: gr.Column(elem_classes=[]),
            self.gallery: gr.Gallery(captioned(session.items), selected_index=session.chosen),
            self.words: note(item.caption),
            self.download: gr.DownloadButton(value=str(item.path)),
            self.settings: dict(item.settings),
            **{button: gr.Button(interactive=not item.clip) for button in self.pictures_only},
        }
