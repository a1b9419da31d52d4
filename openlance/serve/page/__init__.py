"""The web page: everything that the model can do, in a browser."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import gradio as gr
from fastapi import FastAPI

from openlance.sequence.template import Task
from openlance.serve.engine import Engine
from openlance.serve.page.animate import AnimateTab
from openlance.serve.page.ask import AskTab
from openlance.serve.page.controls import Page
from openlance.serve.page.edit import EditTab
from openlance.serve.page.examples import Examples, nano_examples
from openlance.serve.page.generate import GenerateTab
from openlance.serve.page.results import Results
from openlance.serve.page.session import Session
from openlance.serve.page.subject import SubjectTab
from openlance.serve.settings import ServeConfig

T = TypeVar("T", GenerateTab, AnimateTab, EditTab, SubjectTab, AskTab)

_SWEEP = 600  # seconds between two looks for files that are too old
_THEME = gr.themes.Default(
    primary_hue="indigo", font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
)
_CSS = """
.tab-container button { padding-inline: 0.6rem }
.progress progress { width: 100%; accent-color: var(--color-accent) }
.progress [role="alert"] { color: var(--error-text-color) }
.nothing { display: none }
.results .grid-wrap { max-height: 60vh }
.progress img { width: min(45%, 12rem); margin: 0 0.5rem 0.5rem 0; image-rendering: pixelated }
@media (max-width: 640px) { .bench > .column { display: contents } .later { order: 1 } }
"""


def mount_page(app: FastAPI, engine: Engine, config: ServeConfig) -> None:
    """Put the page at / of an app, beneath all routes that it has. The engine must know its model."""
    gr.mount_gradio_app(
        app,
        make_page(engine, config),
        path="/",
        theme=_THEME,
        css=_CSS,
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=config.max_body,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
    )


def make_page(engine: Engine, config: ServeConfig) -> gr.Blocks:
    """The page for a model: a tab for each kind of task, and below them what the visitor has made."""
    name = engine.model.name
    with (
        TemporaryDirectory() as folder,
        gr.Blocks(title=name, analytics_enabled=False, delete_cache=(_SWEEP, _seconds(config))) as page,
    ):
        examples = nano_examples(Path(folder)) if engine.model.config.name == "nano" else None
        session = gr.State(Session, time_to_live=_seconds(config), delete_callback=Session.close)
        _fill(Page(engine, config, session), examples)
    return page.queue(default_concurrency_limit=None, api_open=False)


def _fill(page: Page, examples: Examples | None) -> None:
    gr.Markdown(f"# {page.engine.model.name}")
    with gr.Tabs() as tabs:
        generating = _tab(page, "Generate", GenerateTab, examples)
        animating = _tab(page, "Animate", AnimateTab, examples)
        editing = _tab(page, "Edit", EditTab, examples)
        drawing = _tab(page, "Subject", SubjectTab, examples)
        asking = _tab(page, "Ask", AskTab, examples)
    results = Results(page, tabs)
    if editing:
        clips = Task.VIDEO_EDIT in page.engine.model.tasks
        results.offer("Edit this", "Edit", editing.taken, editing.take, clips=clips)
    if animating:
        results.offer("Animate this", "Animate", animating.taken, animating.take, clips=False)
    if drawing:
        results.offer("Use as subject", "Subject", drawing.taken, drawing.take, clips=False)
    if asking:
        clips = Task.X2T_VIDEO in page.engine.model.tasks
        results.offer("Ask about this", "Ask", asking.taken, asking.take, clips=clips)
    results.wire(*(tab.made for tab in (generating, animating, editing, drawing) if tab))


def _tab(page: Page, name: str, kind: type[T], examples: Examples | None) -> T | None:
    """A tab, which says so where the model can do none of its tasks."""
    with gr.Tab(name, id=name):
        if page.can(kind.TASKS):
            return kind(page, examples)
        can = ", ".join(sorted(page.engine.model.tasks))
        gr.Markdown(f"**{page.engine.model.name} cannot do this** as it is served here. It can do: {can}.")
        return None


def _seconds(config: ServeConfig) -> int:
    """Seconds that what a visitor made is kept."""
    return max(1, round(config.keep_hours * 3600))
