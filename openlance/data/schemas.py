"""Stored rows into examples, by their columns. `docs/data.md` lists the columns of every task."""

from __future__ import annotations

import numpy as np

from openlance.config import Sizes
from openlance.data.example import Example, Record
from openlance.data.fields import UNREADABLE, BadRow, Fields, find
from openlance.data.media import Media
from openlance.data.turns import read_turns
from openlance.sequence.template import SYSTEM_PROMPTS, Task

__all__ = ["COLUMNS", "BadRow", "recognise", "to_example"]

COLUMNS: dict[Task, tuple[str, ...]] = {
    Task.SUBJECT_VIDEO: ("caption", "reference_image_bytes", "output_video_bytes"),
    Task.SUBJECT_IMAGE: ("caption", "reference_image_bytes", "output_image_bytes"),
    Task.VIDEO_EDIT: ("caption", "input_video_bytes", "output_video_bytes"),
    Task.IMAGE_EDIT: ("caption", "input_image_bytes", "output_image_bytes"),
    Task.X2T_VIDEO: ("video_bytes", "caption_a"),
    Task.X2T_IMAGE: ("image_bytes", "caption_a"),
    Task.T2V: ("caption", "video_bytes"),
    Task.T2I: ("caption", "image_bytes"),
    Task.I2V: ("caption", "video_bytes"),
    Task.CHAT: ("turns",),
}
"""What a row of each task must have. The first task that fits is the one a row is recognised by, so that
image-to-video, whose rows are those of text-to-video, must be asked for."""


def to_example(record: Record, sizes: Sizes, rng: np.random.Generator, task: Task | None = None) -> Example:
    """What one row teaches.

    task: read the row as this; without it the columns tell. sizes: say which frames of clips are kept.
    rng: draws one of several captions, and the turn of a conversation that this visit is about.
    Raises BadRow where the row fits no task or not the given one, or a picture or clip cannot be decoded.
    """
    fields = Fields(record, sizes, rng)
    if UNREADABLE in record.values:
        raise fields.bad(str(record.values[UNREADABLE]))
    if fields.has("turns"):
        return read_turns(fields, task)
    task = recognise(record) if task is None else task
    if task in (Task.X2T_IMAGE, Task.X2T_VIDEO):
        return _understanding(fields, task)
    if missing := [column for column in COLUMNS[task] if not fields.has(column)]:
        raise fields.bad(f"{task} needs {', '.join(COLUMNS[task])}: {', '.join(missing)} missing or empty")
    return _generation(fields, task)


def recognise(record: Record) -> Task:
    """The task whose columns a row has; CHAT for one with turns. Raises BadRow where none fits."""
    for task, columns in COLUMNS.items():
        if all(find(record, column) is not None for column in columns):
            return task
    raise BadRow(record.id, f"the columns {', '.join(sorted(record.values))} fit no task")


def _generation(fields: Fields, task: Task) -> Example:
    words, sources, shown = fields.words("caption"), _sources(fields, task), COLUMNS[task][-1]
    target = fields.target(shown, fields.media(shown, video=task.video))
    fixed = (0,) if task is Task.I2V else ()
    return Example(fields.id, task, words, sources=sources, target=target, fixed_frames=fixed)


def _sources(fields: Fields, task: Task) -> tuple[Media, ...]:
    if task in (Task.SUBJECT_IMAGE, Task.SUBJECT_VIDEO):
        return fields.images("reference_image_bytes")
    if task in (Task.IMAGE_EDIT, Task.VIDEO_EDIT):
        return (fields.media(COLUMNS[task][1], video=task.video),)
    return ()


def _understanding(fields: Fields, task: Task) -> Example:
    """A question with its answer; without a question a description, for which `caption` may stand too."""
    answer = "caption" if fields.has("caption") and not fields.has("caption_a") else "caption_a"
    shown = fields.media(COLUMNS[task][0], video=task.video)
    return Example(fields.id, task, _question(fields), answer=fields.words(answer), sources=(shown,))


def _question(fields: Fields) -> str:
    """The instruction and the question, as far as they are there.

    In released data the instruction is often the system prompt, which the sequence carries in any case.
    """
    said = [fields.words(column) for column in ("caption_i", "caption_q") if fields.has(column)]
    return "\n".join(words for words in said if words.strip() not in SYSTEM_PROMPTS.values())
