"""What a request gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from openlance.data.media import Frames, Video
from openlance.data.save import save_image, save_video
from openlance.sequence.template import Message

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, eq=False)
class Generated:
    """A picture or clip.

    frames: uint8 [T, H, W, 3]. fps: frames a second of a clip, None for a picture. settings: everything
    needed to make it again. seconds: time by phase. history: the turns that led here, itself included.
    """

    frames: Frames
    fps: float | None
    settings: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    history: tuple[Message, ...] = ()

    @property
    def image(self) -> Image.Image:
        """The picture; of a clip, its first frame."""
        return Image.fromarray(self.frames[0])

    @property
    def media(self) -> Image.Image | Video:
        """What other calls take as input."""
        return self.image if self.fps is None else Video(self.frames, self.fps)

    def save(self, path: str | Path) -> Path:
        """Write to a file of this suffix, settings included, and give its absolute path.

        PNG, JPEG and WebP for a picture; mp4, webm, mov, gif and webp for a clip.
        Raises InputError for another suffix or a path that cannot be written.
        """
        if self.fps is None:
            return save_image(self.image, path, self.settings)
        return save_video(self.frames, path, self.fps, self.settings)

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.image.save(buffer, "PNG")
        return buffer.getvalue()


@dataclass(frozen=True)
class Answer:
    """Words. finish: "stop" where the model ended or a stop string came, "length" at the limit."""

    text: str
    tokens: int
    finish: str
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.text
