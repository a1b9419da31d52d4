"""What a request gives back."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass, field
from html import escape
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from openlance.data.media import Frames, Media, Video
from openlance.data.save import save_image, save_json, save_video
from openlance.errors import InputError
from openlance.sequence.template import Message

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, eq=False, repr=False)
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

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        what = "picture" if self.fps is None else f"clip of {count} frames"
        return f"<{what}, {height}x{width}, seed {self.settings.get('seed')}>"

    def _repr_png_(self) -> bytes:
        return _png(self.image)

    def _repr_html_(self) -> str | None:
        """A notebook plays a clip; a picture is shown by `_repr_png_`."""
        return None if self.fps is None else as_html(self.media)


@dataclass(frozen=True)
class Answer:
    """Words. finish: "stop" where the model ended or a stop string came, "length" at the limit, "cancelled"
    where whoever heard the words had enough."""

    text: str
    tokens: int
    finish: str
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write the words and their settings to a .json file, and give its absolute path.

        Raises InputError for another suffix or a path that cannot be written.
        """
        if Path(path).suffix.lower() != ".json":
            raise InputError(f"{path}: the name must end in .json")
        told = {"answer": self.text, "tokens": self.tokens, "finish": self.finish}
        return save_json({**told, "openlance": self.settings, "seconds": self.seconds}, path)

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return words_as_html(self.text)


def as_html(media: Media) -> str:
    """A picture or clip as an element that holds its bytes."""
    if not isinstance(media, Video):
        return f'<img src="data:image/png;base64,{b64encode(_png(media)).decode()}">'
    with TemporaryDirectory() as folder:
        data = save_video(media.frames, Path(folder) / "clip.mp4", media.fps).read_bytes()
    source = f"data:video/mp4;base64,{b64encode(data).decode()}"
    return f'<video controls loop autoplay muted playsinline src="{source}"></video>'


def words_as_html(text: str) -> str:
    """Words as they stand: nothing in them counts as HTML."""
    return f'<div style="white-space: pre-wrap">{escape(text)}</div>'


def _png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
