"""The columns of one row, read with the row's name in every complaint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from openlance.config import Sizes
from openlance.data.example import Record
from openlance.data.media import Media, Select, Video, load_image, load_video, sample_frames
from openlance.errors import InputError

UNREADABLE = "__unreadable__"
"""The column with which a source says why it could not read a row; such a row has no other."""

ALIASES = {
    "text": "caption",
    "question": "caption_q",
    "answer": "caption_a",
    "image": "image_bytes",
    "video": "video_bytes",
    "input_image": "input_image_bytes",
    "output_image": "output_image_bytes",
    "input_video": "input_video_bytes",
    "output_video": "output_video_bytes",
    "reference_images": "reference_image_bytes",
}
"""Other names of columns: they count where the column itself is missing or empty."""


class BadRow(Exception):
    """A row that cannot be learned from. `id` names its place; `reason` says why, in one line."""

    def __init__(self, id: str, reason: str) -> None:
        super().__init__(id, reason)
        self.id, self.reason = id, reason

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


def select_frames(sizes: Sizes) -> Select:
    """Which frames of a clip the model sees, at these sizes."""

    def select(count: int, fps: float) -> list[int]:
        return sample_frames(count, fps, sample_fps=sizes.fps, max_duration=sizes.max_seconds)

    return select


@dataclass(frozen=True)
class Fields:
    """A row's columns by their proper names. Everything raises BadRow for what is not as it should be."""

    record: Record
    sizes: Sizes
    rng: np.random.Generator

    @property
    def id(self) -> str:
        return self.record.id

    def bad(self, reason: str) -> BadRow:
        return BadRow(self.id, reason)

    def has(self, column: str) -> bool:
        """Whether the column is there and not empty."""
        return find(self.record, column) is not None

    def value(self, column: str) -> Any:
        found = find(self.record, column)
        if found is None:
            raise self.bad(f"{column} is missing or empty")
        return found

    def words(self, column: str) -> str:
        """The column's words; of a list of alternatives, one is drawn."""
        found = self.value(column)
        if isinstance(found, list):
            found = found[int(self.rng.integers(len(found)))]
        if not isinstance(found, str):
            raise self.bad(f"{column} holds {type(found).__name__}, not words")
        if not found.strip():
            raise self.bad(f"{column} is missing or empty")
        return found

    def media(self, column: str, *, video: bool) -> Media:
        return self.decode(column, self.value(column), video=video)

    def images(self, column: str) -> tuple[Media, ...]:
        """One or more pictures."""
        found = self.value(column)
        listed = found if isinstance(found, list) else [found]
        return tuple(self.decode(f"{column}[{n}]", data, video=False) for n, data in enumerate(listed))

    def decode(self, name: str, data: Any, *, video: bool) -> Media:
        """A picture, or the frames of a clip that the model sees."""
        if not isinstance(data, bytes):
            raise self.bad(f"{name} holds {type(data).__name__}, not the bytes of a file")
        try:
            return load_video(data, select_frames(self.sizes)) if video else load_image(data)
        except InputError as error:
            raise self.bad(f"{name}: {str(error).removeprefix('the given bytes: ')}") from error

    def target(self, name: str, media: Media) -> Media:
        """What is to be generated, if the model can: a clip has at least two latent frames."""
        if isinstance(media, Video) and len(media) < 2:
            raise self.bad(
                f"{name} is too short: at {self.sizes.fps:g} frames a second it has a single frame"
            )
        return media


def find(record: Record, column: str) -> Any:
    """The value of a column or of one of its other names; None where all are missing or empty."""
    names = (column, *(alias for alias, proper in ALIASES.items() if proper == column))
    found = (record.values.get(name) for name in names)
    return next((value for value in found if value is not None and value not in ("", b"", [])), None)
