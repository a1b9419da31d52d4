"""Controls that several tabs have: size and number, sampling settings, pictures and clips that are sent."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from openlance.config import REUSE_ORDERS, SOLVERS
from openlance.errors import InputError
from openlance.infer.orders import new_seed
from openlance.sequence.template import Task
from openlance.serve.chat_request import MOST_REUSE
from openlance.serve.engine import Engine
from openlance.serve.jobs import Request
from openlance.serve.media_in import check_media
from openlance.serve.page.recipe import Recipe
from openlance.serve.security import plain_text
from openlance.serve.settings import ServeConfig

Values = Mapping[Any, Any]
"""What the controls hold when something is asked for."""

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""For events: nothing is laid over what they fill, and they are no public interface."""

PICTURE, CLIP = "picture", "clip"
_MOST_SEED = 2**53 - 1  # what a browser counts to exactly


@dataclass(frozen=True)
class Page:
    """What every tab is made with. session: the state that holds the visitor's `Session`."""

    engine: Engine
    config: ServeConfig
    session: gr.State

    def can(self, tasks: Iterable[Task]) -> list[Task]:
        """Those of the tasks that the model can do."""
        return [task for task in tasks if task in self.engine.model.tasks]


class Prompt:
    """Words that are sent with Enter."""

    def __init__(self, page: Page, label: str, placeholder: str = ""):
        self.config = page.config
        self.box = gr.Textbox(label=label, placeholder=placeholder, lines=1, max_lines=8)

    def read(self, values: Values) -> str:
        """Raises InputError where there are none."""
        text = words(values[self.box], self.config)
        if not text.strip():
            raise InputError("the prompt is empty: say what you want")
        return text


class Size:
    """Pictures or clips, how many, and how large."""

    def __init__(self, page: Page, tasks: Iterable[Task]):
        model = page.engine.model.config
        self.kinds = kinds = [CLIP if task.video else PICTURE for task in page.can(tasks)]
        self.sides = {PICTURE: model.sizes.image, CLIP: model.sizes.video}
        stride = model.vae.spatial_stride
        most = min(page.config.max_size, model.max_latent_side * stride) // stride * stride
        self.kind = gr.Radio(kinds, value=kinds[0], label="What", visible=len(kinds) > 1)
        self.count = gr.Slider(1, page.config.max_pictures, 1, step=1, label="Number")
        with gr.Accordion("Size", open=False), gr.Row():
            side = min(self.sides[kinds[0]], most)
            self.width = gr.Slider(stride, most, side, step=stride, label="Width", min_width=120)
            self.height = gr.Slider(stride, most, side, step=stride, label="Height", min_width=120)
            self.frames = frames_slider(page, visible=kinds[0] == CLIP)
        self.kind.input(
            self._change, self.kind, [self.width, self.height, self.frames],
            **QUIET,
        )  # fmt: skip
        self.inputs: set[Any] = {self.kind, self.count, self.width, self.height, self.frames}

    def read(self, values: Values) -> dict[str, Any]:
        """Arguments of an order, but for the number."""
        size = {"size": (int(values[self.height]), int(values[self.width]))}
        return size | ({"frames": int(values[self.frames])} if self.clip(values) else {})

    def requests(self, method: str, arguments: Mapping[str, Any], values: Values) -> list[Request]:
        """As many as are wanted, each with a seed of its own."""
        first = arguments["seed"]
        seeds = range(first, first + int(values[self.count]))
        return [Request(method, {**arguments, "seed": seed}) for seed in seeds]

    def clip(self, values: Values) -> bool:
        return values[self.kind] == CLIP

    def restore(self, recipe: Recipe) -> dict[Any, Any]:
        """The controls as they were for something made, as far as model and server allow."""
        kind = CLIP if recipe.clip else PICTURE
        if kind not in self.kinds:
            raise InputError(f"this is a {kind}, which the model that is served here cannot make")
        frames = min(recipe.frames, self.frames.maximum) if recipe.clip else self.frames.value
        return {
            self.kind: kind,
            self.count: 1,
            self.height: min(recipe.height, self.height.maximum),
            self.width: min(recipe.width, self.width.maximum),
            self.frames: gr.Slider(value=frames, visible=recipe.clip),
        }

    def _change(self, kind: str) -> tuple[Any, ...]:
        side = min(self.sides[kind], self.width.maximum)
        return side, side, gr.Slider(visible=kind == CLIP)


def frames_slider(page: Page, *, visible: bool = True) -> gr.Slider:
    """Lengths that the VAE can decode, within the limits of model and server."""
    model = page.engine.model.config
    step = model.vae.temporal_stride
    most, own = (
        (frames - 1) // step * step + 1
        for frames in (min(page.config.max_frames, model.max_frames), model.sizes.frames)
    )
    label = f"Frames, at {model.sizes.fps:g} a second"
    return gr.Slider(step + 1, most, min(own, most), step=step, label=label, visible=visible, min_width=120)


class Sampling:
    """The settings of denoising, the model's own to begin with."""

    def __init__(self, page: Page):
        self.config, own = page.config, page.engine.model.config.sampling
        steps = min(own.steps, page.config.max_steps)
        with gr.Accordion("Advanced", open=False):
            self.steps = gr.Slider(1, page.config.max_steps, steps, step=1, label="Steps")
            with gr.Row():
                self.guidance = gr.Number(own.guidance, label="Guidance", min_width=120)
                self.shift = gr.Number(own.shift, label="Time shift", minimum=0.01, min_width=120)
            with gr.Row():
                self.solver = gr.Dropdown(list(SOLVERS), value=own.solver, label="Solver", min_width=120)
                self.reuse = gr.Number(
                    own.reuse, label="Reuse", minimum=0, maximum=MOST_REUSE, step=0.05, min_width=120
                )
                self.order = gr.Dropdown(
                    list(REUSE_ORDERS), value=own.reuse_order, label="Reuse order", min_width=120
                )
            self.negative = gr.Textbox(label="Negative prompt", lines=1, max_lines=4)
            with gr.Row():
                self.seed = gr.Number(label="Seed", precision=0, minimum=0, maximum=_MOST_SEED, min_width=120)
                self.same = gr.Checkbox(
                    label="Same seed", info="otherwise a new one each time", min_width=120
                )
            names = ["", *page.engine.model.adapters]
            self.adapter = gr.Dropdown(names, label="Adapter", visible=len(names) > 1)
        self.inputs: set[Any] = {
            self.steps, self.guidance, self.shift, self.solver, self.reuse, self.order,
            self.negative, self.seed, self.same, self.adapter,
        }  # fmt: skip

    def read(self, values: Values) -> dict[str, Any]:
        """Arguments of an order. What is left empty is the model's own. Raises InputError."""
        keep = values[self.same] and values[self.seed] is not None
        given = {
            "seed": int(values[self.seed]) if keep else new_seed(),
            "steps": int(values[self.steps]),
            "guidance": values[self.guidance],
            "shift": values[self.shift],
            "solver": values[self.solver],
            "reuse": values[self.reuse],
            "reuse_order": values[self.order],
            "negative_prompt": words(values[self.negative], self.config) or None,
        }
        return {name: value for name, value in given.items() if value is not None}

    def restore(self, recipe: Recipe) -> dict[Any, Any]:
        """The controls as they were for something made, as far as the server allows."""
        return {
            self.steps: min(recipe.steps, self.steps.maximum),
            self.guidance: recipe.guidance,
            self.shift: recipe.shift,
            self.solver: recipe.solver,
            self.reuse: min(recipe.reuse, MOST_REUSE),
            self.order: recipe.reuse_order,
            self.negative: recipe.negative,
            self.seed: recipe.seed,
            self.same: True,
        }


def media_box(label: str, *, clips: bool = False) -> gr.Gallery:
    """A place to drop pictures, or clips too. It gives paths and opens nothing: that is for `sent`."""
    types = ["image", "video"] if clips else ["image"]
    return gr.Gallery(
        label=label, file_types=types, sources=["upload", "clipboard"], interactive=True,
        columns=2, fit_columns=False, height="max-content", object_fit="contain", buttons=[],
    )  # fmt: skip


def made_box() -> gr.Gallery:
    """Where what was made is shown."""
    return gr.Gallery(
        label="Made", columns=2, height="max-content", object_fit="contain", buttons=["download"]
    )


def words(text: str | None, config: ServeConfig) -> str:
    """What a visitor wrote, if anything, as words only. Raises InputError where it is too long."""
    text = text or ""
    if len(text) > config.max_text:
        raise InputError(f"{len(text)} characters: at most {config.max_text} are taken: shorten it")
    return plain_text(text)


async def sent(paths: Iterable[str], config: ServeConfig) -> list[bytes]:
    """The files that a visitor sent, checked. Raises InputError as `check_media` does."""

    def read() -> list[bytes]:
        found = [Path(path).read_bytes() for path in paths]
        for data in found:
            check_media(data, config)
        return found

    return await asyncio.to_thread(read)


def chosen(event: gr.SelectData, listed: Sequence[object]) -> int:
    """Which of what a gallery lists was chosen; the list may have become shorter meanwhile."""
    return min(max(int(event.index), 0), len(listed) - 1)


def in_box(box: list[tuple[str, str | None]] | None, *, most: int, what: str) -> list[str]:
    """The paths in a `media_box`. Raises InputError where there are none, or more than `most`."""
    paths = [path for path, _ in box or []]
    if not 1 <= len(paths) <= most:
        count = "one" if most == 1 else f"one to {most}"
        raise InputError(f"{what}: give {count}, not {len(paths) or 'none'}")
    return paths
