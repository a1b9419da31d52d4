"""Where prompts come from: the world, or a file."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from openlance.errors import InputError
from openlance.rl.rollout import Prompt
from openlance.sequence.segment import Sample
from openlance.sequence.template import Task
from openlance.train.nano_data import KINDS
from openlance.train.nano_data import draw as draw_item
from openlance.train.parallel import Ranks
from openlance.world import WorldConfig, describe, question, render, sample_scene
from openlance.world.tags import TAGS, say_tag

Worded = tuple[str, Mapping[str, Any]]
"""The user's words, and what the rewards need to know."""

SCENES = WorldConfig(max_things=2)
QUESTIONS = ("color", "shape", "size", "place", "count", "relation", "exists", "ground")
DRAWN = {  # kind of item of the world that each task is drawn of, and its share
    Task.T2I: ("image", 0.6),
    Task.IMAGE_EDIT: ("edit", 0.22),
    Task.I2V: ("clip", 0.09),
    Task.T2V: ("clip", 0.05),
    Task.SUBJECT_IMAGE: ("subject", 0.04),
}
FRESH = 1_000_000  # items from here on are in no encoded world
TRAINING, HELD_OUT = 1_001, 1_002  # begin the seeds, so that no held-out scene is learnt from


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts for the loop: what a lane gets at a step depends on the seed alone.

    draw: a prompt by a source of randomness. make: its sequence, up to the target or the answer. apart: words
    that one in eight prompts has, by their checksum, are held out, and never drawn to learn from; for prompts
    so short that other seeds give the same.
    """

    draw: Callable[[np.random.Generator], Worded]
    make: Callable[[str, Mapping[str, Any]], Sample]
    lanes: int
    ranks: Ranks = field(default_factory=Ranks)
    seed: int = 0
    apart: bool = False

    def packs(self, step: int) -> Iterator[Prompt]:
        """The prompts of this process, in the order of their lanes."""
        for lane in range(self.ranks.data_rank, self.lanes, self.ranks.data_size):
            yield self._prompt(lane, TRAINING, self.seed, step, lane)

    def held_out(self, count: int) -> list[Prompt]:
        """Prompts by seeds that training does not use."""
        return [self._prompt(number, HELD_OUT, number) for number in range(count)]

    def _prompt(self, lane: int, *seed: int) -> Prompt:
        rng = np.random.default_rng(seed)
        words, metadata = self.draw(rng)
        while self.apart and (zlib.crc32(words.encode()) % 8 == 0) != (seed[0] == HELD_OUT):
            words, metadata = self.draw(rng)
        return Prompt(words, self.make(words, metadata), metadata, lane)

    def state(self) -> dict[str, Any]:
        """Nothing: the step says it all."""
        return {}

    def restore(self, states: Mapping[str, Any]) -> None:
        """Nothing to go back to."""


def of_world(rng: np.random.Generator) -> Worded:
    """A caption of a picture of one or two things, and its "claims" for the judge."""
    words, claims = describe(sample_scene(rng, SCENES), rng)
    return words, {"claims": claims}


def of_tags(rng: np.random.Generator) -> Worded:
    """A short prompt of one of GenEval's six kinds, open about what it does not say; and its "claims"."""
    words, claims = say_tag(TAGS[rng.integers(len(TAGS))], rng)
    return words, {"claims": claims}


def of_pictures(rng: np.random.Generator) -> Worded:
    """Short prompts, and one caption among four."""
    return of_tags(rng) if rng.random() < 0.75 else of_world(rng)


def of_questions(side: int) -> Callable[[np.random.Generator], Worded]:
    """A question about a picture, `side` pixels square; metadata "answer" and "picture", uint8 [H, W, 3]."""

    def draw(rng: np.random.Generator) -> Worded:
        scene = sample_scene(rng, SCENES)
        asked = question(scene, rng, QUESTIONS)
        return asked.question, {"answer": asked.answer, "picture": render(scene, side)}

    return draw


def of_tasks(side: int) -> Callable[[np.random.Generator], Worded]:
    """Words for every kind of picture and clip; metadata "task" and, where one begins from a picture,
    "picture", uint8 [side, side, 3]."""

    def draw(rng: np.random.Generator) -> Worded:
        task = Task(rng.choice(list(DRAWN), p=[share for _, share in DRAWN.values()]))
        kind = next(kind for kind in KINDS if kind.name == DRAWN[task][0])
        (scene, *_), changes = draw_item(kind, int(rng.integers(FRESH, 2**31)))
        words = changes[0] if task in (Task.IMAGE_EDIT, Task.SUBJECT_IMAGE) else describe(scene, rng)[0]
        return words, {"task": task} | (
            {} if task in (Task.T2I, Task.T2V) else {"picture": render(scene, side)}
        )

    return draw


def one_of(prompts: Sequence[Worded]) -> Callable[[np.random.Generator], Worded]:
    """Any of these, each equally likely."""
    return lambda rng: prompts[int(rng.integers(len(prompts)))]


def read_prompts(file: str | Path) -> list[Worded]:
    """The prompts of a file: each line one, or of .jsonl each line an object with "prompt"; what else it
    holds is metadata. Empty lines are passed over. Raises InputError naming the line that cannot be read."""
    path = Path(file)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: prompts could not be read ({error})") from error
    read = _object if path.suffix == ".jsonl" else lambda line, place: (line.strip(), {})
    found = [read(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise InputError(f"{path}: no prompts in it")
    return found


def _object(line: str, place: str) -> Worded:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not JSON ({error})") from error
    if not (isinstance(row, dict) and isinstance(row.get("prompt"), str) and row["prompt"].strip()):
        raise InputError(f'{place}: needs "prompt", the words')
    return row["prompt"], {name: value for name, value in row.items() if name != "prompt"}
