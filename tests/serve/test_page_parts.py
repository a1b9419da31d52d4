"""What the page is made of, without a browser: its limits, watching jobs, settings that are read back."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest

from openlance.config import SamplingConfig, nano
from openlance.data.save import save_image
from openlance.errors import InputError
from openlance.serve.engine import Engine, ModelInfo
from openlance.serve.job import Job
from openlance.serve.jobs import Busy, JobError, Piece, Progress, Request, Spoken, Why
from openlance.serve.page import make_page
from openlance.serve.page.controls import Page, Sampling
from openlance.serve.page.follow import Watched, follow, note, progress_bar
from openlance.serve.page.recipe import Recipe, recipe_inside
from openlance.serve.page.session import Session
from openlance.serve.settings import ServeConfig

SETTINGS: dict[str, Any] = {
    "prompt": "a circle", "negative_prompt": None, "seed": 5, "size": [96, 64], "frames": 1, "fps": None,
    "sampling": {"steps": 20, "guidance": 2.5, "shift": 3.0},
}  # fmt: skip


class Desk:
    """Takes up to `most` requests, and leaves what comes of them to the test."""

    def __init__(self, most: int = 8):
        self.most = most
        self.jobs: list[Job] = []

    def submit(self, request: Request) -> Job:
        if len(self.jobs) == self.most:
            raise Busy(7)
        self.jobs.append(Job(request, len(self.jobs), 60, self._cancel))
        return self.jobs[-1]

    def _cancel(self, job: Job) -> None:
        if job.ended is None:
            job.end(JobError(Why.CANCELLED, "cancelled"))


def watch(desk: Desk, session: Session, count: int = 1) -> Any:
    requests = [Request("chat", {})] * count
    return aclosing(follow(desk, session, "ask", requests))  # type: ignore[arg-type]


def test_words_are_seen_as_they_come() -> None:
    async def run() -> tuple[list[str], Watched]:
        desk, seen, words = Desk(), [""], iter(["one ", "two "])
        async with watch(desk, Session()) as states:
            async for [watched] in states:
                if watched.text != seen[-1]:
                    seen.append(watched.text)
                [job] = desk.jobs
                if (word := next(words, None)) is not None:
                    await asyncio.sleep(0)  # whoever watches has begun to
                    job.tell(Piece(word))
                elif job.ended is None:
                    job.end(Spoken("one two ", 1, 2, "stop", {}))
        return seen, watched

    seen, watched = asyncio.run(run())
    assert seen == ["", "one ", "one two "]
    assert isinstance(watched.outcome, Spoken)


def test_who_stops_watching_stops_the_jobs() -> None:
    async def run() -> tuple[Desk, Session]:
        desk, session = Desk(), Session()
        async with watch(desk, session, 2) as states:
            await anext(states)
            assert session.running == {"ask": desk.jobs}
        return desk, session

    desk, session = asyncio.run(run())
    assert [job.state for job in desk.jobs] == ["failed", "failed"]
    assert session.running == {}


def test_all_are_taken_up_or_none() -> None:
    async def run() -> Desk:
        desk = Desk(most=2)
        with pytest.raises(Busy, match="in 7 seconds"):
            async with watch(desk, Session(), 3) as states:
                await anext(states)
        return desk

    assert [job.state for job in asyncio.run(run()).jobs] == ["failed", "failed"]


def test_progress_counts_the_steps_of_all() -> None:
    watched = [
        Watched(job) for job in (Job(Request("edit", {}), 0, 1, id), Job(Request("edit", {}), 1, 1, id))
    ]
    assert "waiting: 3 in the queue" in progress_bar(watched, 3)
    watched[0].progress = Progress(5, 20)
    assert 'max="40" value="5"' in progress_bar(watched, 0)
    watched[1].progress, watched[1].preview = Progress(8, 20), "AAAA"
    bar = progress_bar(watched, 0)
    assert "step 13 of 40" in bar
    assert 'alt="number 2 so far"' in bar and "number 1" not in bar


def test_what_is_said_is_no_html() -> None:
    assert "<b>" not in note("<b>bold</b>", wrong=True)


def test_settings_are_read_back(tmp_path: Path) -> None:
    pixels = np.zeros((96, 64, 3), np.uint8)
    recipe = recipe_inside(save_image(pixels, tmp_path / "made.png", SETTINGS).read_bytes())
    assert recipe == Recipe("a circle", "", 5, 96, 64, 1, False, 20, 2.5, 3.0)
    with pytest.raises(InputError, match="no settings"):
        recipe_inside(save_image(pixels, tmp_path / "plain.png").read_bytes())


@pytest.mark.parametrize(
    "damage", [{"size": 3}, {"size": [1]}, {"seed": "x"}, {"sampling": None}, {"sampling": {"steps": []}}]
)
def test_damaged_settings_are_said_to_be(damage: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="the settings in this file"):
        Recipe.of(SETTINGS | damage)


def test_what_makes_steps_fewer_is_read_back() -> None:
    """From files that say nothing of it, too; what cannot be chosen is refused."""
    fast = {"solver": "ab2", "reuse": 0.1, "reuse_order": 1}
    found = Recipe.of(SETTINGS | {"sampling": SETTINGS["sampling"] | fast})
    assert (found.solver, found.reuse, found.reuse_order) == ("ab2", 0.1, 1)
    old = Recipe.of(SETTINGS)
    assert (old.solver, old.reuse, old.reuse_order) == ("euler", 0, 0)
    with pytest.raises(InputError, match="the settings in this file"):
        Recipe.of(SETTINGS | {"sampling": SETTINGS["sampling"] | {"solver": "rk45"}})


def test_sampling_controls_begin_as_the_model_and_take_up_a_recipe() -> None:
    config = ServeConfig(max_steps=30)
    engine = Engine(config)
    engine.model = ModelInfo("small", frozenset({"t2i"}), nano(), ())
    with gr.Blocks():
        controls = Sampling(Page(engine, config, gr.State()))
    values: dict[Any, Any] = {part: getattr(part, "value", None) for part in controls.inputs}
    own, names = nano().sampling, ("steps", "guidance", "shift", "solver", "reuse", "reuse_order")
    given = controls.read(values)
    assert {name: given[name] for name in names} == {name: getattr(own, name) for name in names}
    recipe = Recipe("a circle", "", 5, 96, 64, 1, False, 40, 2.0, 1.0, "unipc", 5000.0, 1)
    restored = controls.read(values | controls.restore(recipe))
    assert [restored[name] for name in names] == [30, 2.0, 1.0, "unipc", 1000, 1]  # as the server allows
    assert restored["seed"] == 5
    SamplingConfig(**{name: restored[name] for name in names})


def test_a_visitors_files_go_with_them() -> None:
    session = Session()
    path = asyncio.run(session.store(b"data", "name", ".png"))
    assert path.read_bytes() == b"data"
    session.close()
    assert not path.parent.exists()


def test_the_controls_are_within_the_limits_and_say_what_the_model_cannot() -> None:
    config = ServeConfig(max_steps=7, max_frames=12, max_pictures=3, max_size=100)
    engine = Engine(config)
    engine.model = ModelInfo("small", frozenset({"t2i", "t2v"}), nano(), ())
    parts = [part["props"] for part in make_page(engine, config).get_config_file()["components"]]
    sliders = {part["label"]: part for part in parts if "maximum" in part and part.get("label")}
    assert {label: sliders[label]["maximum"] for label in ("Steps", "Number", "Width", "Height")} == {
        "Steps": 7, "Number": 3, "Width": 96, "Height": 96,
    }  # fmt: skip
    assert sliders["Steps"]["value"] == 7  # the model's own 20 are not allowed
    frames = sliders["Frames, at 8 a second"]
    assert (frames["minimum"], frames["maximum"], frames["step"]) == (5, 9, 4)
    said = [part["value"] for part in parts if "cannot do this" in str(part.get("value"))]
    assert len(said) == 4  # animate, edit, subject, ask
