"""Conversations about a picture that changes from turn to turn."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from openlance.errors import InputError
from openlance.world.edits import EDIT_KINDS, edit
from openlance.world.language import caption
from openlance.world.questions import question
from openlance.world.scene import Scene, WorldConfig, known, pick, sample_scene

Rng = np.random.Generator
STEPS = ("draw", "describe", "show", "edit", "ask")
PLANS = (
    ("draw", "edit", "ask"),
    ("draw", "edit", "edit"),
    ("describe", "edit", "edit"),
    ("show", "edit", "ask"),
)
STILL_QUESTIONS = ("color", "shape", "size", "place", "count", "relation", "exists", "ground")


@dataclass(frozen=True)
class Turn:
    """What the user says and shows, if anything, and what comes back: a picture, as its scene, or words."""

    step: str
    words: str
    shown: Scene | None
    reply: Scene | str


def chain(
    rng: Rng, config: WorldConfig, edits: int = 2, kinds: Sequence[str] = EDIT_KINDS
) -> tuple[tuple[Scene, ...], tuple[str, ...]]:
    """(scenes, instructions): a scene and what edits make of it, one after the other."""
    while True:
        scenes, instructions = [sample_scene(rng, config)], []
        with suppress(InputError):  # an edit has left nothing to edit: begin again
            for _ in range(edits):
                change = edit(scenes[-1], rng, kinds)
                scenes.append(change.after)
                instructions.append(change.instruction)
            return tuple(scenes), tuple(instructions)


def converse(
    scenes: Sequence[Scene], instructions: Sequence[str], rng: Rng, plan: Sequence[str]
) -> tuple[Turn, ...]:
    """The turns of a conversation over a chain of edits.

    plan: the user's steps, of STEPS. It begins with the first scene: "draw" has it drawn, "describe" shows it
    and has it described, "show" shows it with the words of the next step. "edit" goes on to the next scene,
    "ask" asks about what is there. Raises InputError for another step, and for more edits than there are.
    """
    needed = plan.count("edit")
    if needed > len(instructions):
        raise InputError(f"the plan {', '.join(plan)} needs {needed} edits, not {len(instructions)}")
    turns: list[Turn] = []
    at, shown = 0, None
    for step in plan:
        known("step of a conversation", step, STEPS)
        here = scenes[at]
        if step == "show":
            shown = here
        elif step == "draw":
            turns.append(Turn(step, caption(here, rng), None, here))
        elif step == "describe":
            words = pick(rng, ("describe the picture", "what is there?"))
            turns.append(Turn(step, words, here, caption(here, rng)))
        elif step == "ask":
            asked = question(here, rng, STILL_QUESTIONS)
            turns.append(Turn(step, asked.question, shown, asked.answer))
            shown = None
        else:
            at += 1
            turns.append(Turn(step, instructions[at - 1], shown, scenes[at]))
            shown = None
    return tuple(turns)
