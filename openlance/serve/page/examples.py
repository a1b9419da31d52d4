"""Things to try that nano can do: its own world's shapes, in its own world's words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import Dependency

from openlance.data.save import save_image
from openlance.world import Scene, Thing, describe, render

_SIDE = 96  # pixels
_CIRCLE = Thing("circle", "red", "large", "top left")
_STAR = Thing("star", "blue", "small", "bottom right")
_BOTH = Scene("white", "plain", (_CIRCLE, _STAR))
_DRAWN = (
    Scene("white", "plain", (_CIRCLE,)),
    Scene("navy", "plain", (Thing("star", "yellow", "large", "center"),)),
    Scene("gray", "plain", (Thing("cross", "green", "small", "bottom"),)),
)
_MOVED = Scene("black", "plain", (Thing("circle", "yellow", "small", "center", motion="grow"),))
_SUBJECT = Scene("white", "plain", (Thing("star", "red", "large", "center"),))


@dataclass(frozen=True)
class Examples:
    """Rows for the inputs of each tab."""

    prompts: Sequence[list[Any]]
    animate: Sequence[list[Any]]
    edit: Sequence[list[Any]]
    subject: Sequence[list[Any]]
    ask: Sequence[list[Any]]

    @staticmethod
    def offer(rows: Sequence[list[Any]], inputs: Sequence[gr.components.Component]) -> Dependency:
        """Show rows of examples; choosing one fills the inputs, which is the event that comes back."""
        shown = gr.Examples(list(rows), list(inputs), label="Examples", api_visibility="private")
        return shown.load_input_event


def nano_examples(folder: Path) -> Examples:
    """Examples whose pictures are drawn into a folder."""

    def drawn(scene: Scene, name: str) -> str:
        return str(save_image(render(scene, _SIDE), folder / f"{name}.png"))

    both, dot, star = drawn(_BOTH, "shapes"), drawn(_MOVED, "dot"), drawn(_SUBJECT, "star")
    return Examples(
        prompts=[[describe(scene)[0]] for scene in _DRAWN],
        animate=[[[dot], describe(_MOVED)[0]]],
        edit=[[[both], words] for words in ("make the circle green", "change the background to beige")],
        subject=[[[star], "the shape at the top right on black"]],
        ask=[
            [{"text": words, "files": [both]}]
            for words in ("where is the circle?", "how many shapes are there?", "what shape is blue?")
        ],
    )
