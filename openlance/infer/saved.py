"""Conversations as files: conversation.json and the media beside it, in a folder or in one zip file.

Pictures are PNG and clips H.264 without loss, in RGB, so that every pixel comes back. Media are named by
their content; conversation.json, which says which of them count, is replaced at once when they are all there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory
from typing import Any

import av
from av.video.stream import VideoStream

from openlance.data.mark import xmp_box
from openlance.data.media import Media, Video, load_image, load_video
from openlance.data.save import check_folder, save_image, save_json
from openlance.data.storage import reading
from openlance.errors import InputError
from openlance.infer.result import Answer, Generated
from openlance.infer.turn import Turn, as_it_is

VERSION = 1
CONTENTS = "conversation.json"
MOST_BYTES = 4 * 2**30
"""Of pixels in one conversation, and of each of its files."""
MOST_WORDS = 64 * 2**20
"""Bytes of conversation.json."""

_NAME = re.compile(r"\d+-(shown|made)-[0-9a-f]{16}\.(png|mp4)")
_DAMAGE = (KeyError, TypeError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)

Read = Callable[[str, int], bytes]
"""A file of the conversation by its name, and the bytes that it may have at most."""


def save_turns(path: Path, system: str | None, turns: Sequence[Turn]) -> Path:
    """Write a conversation; see `Conversation.save`. Raises InputError where that cannot be done."""
    pixels = sum(as_it_is(one).frames.nbytes for turn in turns for one in turn.visuals)
    if pixels > MOST_BYTES:
        raise InputError(f"{path}: {pixels / 2**30:.1f} GiB of pixels are too many to save; at most 4 are")
    check_folder(path / CONTENTS if path.suffix.lower() != ".zip" else path)
    files: dict[str, bytes] = {}
    told = [_describe(number, turn, files) for number, turn in enumerate(turns, start=1)]
    contents = {"openlance": "conversation", "version": VERSION, "system": system, "turns": told}
    with _writing(path):
        if path.suffix.lower() == ".zip":
            _write_zip(path, contents, files)
        else:
            _write_folder(path, contents, files)
    return path


def load_turns(path: Path) -> tuple[str | None, list[Turn]]:
    """(system prompt, turns) of a conversation that was saved. Raises InputError where it is not whole."""
    with reading(str(path), *_DAMAGE), _opened(path) as read:
        contents = json.loads(read(CONTENTS, MOST_WORDS))
        if _get(contents, "openlance", str) != "conversation" or _get(contents, "version", int) != VERSION:
            raise ValueError(f"{CONTENTS} is not of version {VERSION}")
        shelf = _Shelf(read)
        turns = [_turn(told, shelf) for told in _get(contents, "turns", list)]
        return _get(contents, "system", str | None), turns


def _describe(number: int, turn: Turn, files: dict[str, bytes]) -> dict[str, Any]:
    """The turn as JSON; its media are added to the files."""

    def keep(what: str, media: Media, settings: dict[str, Any] | None = None) -> dict[str, Any]:
        clip = isinstance(media, Video)
        data = (
            _lossless(media, made=settings is not None) if isinstance(media, Video) else _png(media, settings)
        )
        digest = hashlib.sha256(data).hexdigest()
        name = f"{number:03}-{what}-{digest[:16]}.{'mp4' if clip else 'png'}"
        files[name] = data
        return {"file": name, "sha256": digest, "fps": media.fps if isinstance(media, Video) else None}

    result = turn.result
    told: dict[str, Any] = {"text": turn.text, "shown": [keep("shown", media) for media in turn.media]}
    if isinstance(result, Answer):
        return told | {"answer": vars(result)}
    made = keep("made", result.media, result.settings)
    return told | {"made": made | {"settings": result.settings, "seconds": result.seconds}}


class _Shelf:
    """The media of a saved conversation, counted as they are taken."""

    def __init__(self, read: Read):
        self.read, self.left = read, MOST_BYTES

    def take(self, told: Any) -> Media:
        name, fps = _get(told, "file", str), _get(told, "fps", float | int | None)
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a picture or clip")
        data = self.read(name, MOST_BYTES)
        if hashlib.sha256(data).hexdigest() != _get(told, "sha256", str):
            raise ValueError(f"{name} is not what was saved")
        media = load_image(data) if fps is None else load_video(data, fps=fps)
        self.left -= as_it_is(media).frames.nbytes
        if self.left < 0:
            raise ValueError("more than 4 GiB of pixels")
        return media


def _turn(told: Any, shelf: _Shelf) -> Turn:
    text = _get(told, "text", str)
    shown = tuple(map(shelf.take, _get(told, "shown", list)))
    if "answer" in told:
        said = told["answer"]
        kinds = {"text": str, "tokens": int, "finish": str, "settings": dict, "seconds": dict}
        return Turn(text, shown, Answer(**{name: _get(said, name, kind) for name, kind in kinds.items()}))
    made = as_it_is(shelf.take(told["made"]))
    settings, seconds = (_get(told["made"], name, dict) for name in ("settings", "seconds"))
    return Turn(text, shown, Generated(made.frames, made.fps, settings, seconds))


def _get(told: Any, name: str, kind: Any) -> Any:
    """A field that is there and of this kind. Raises ValueError."""
    if not isinstance(told, dict) or name not in told or not isinstance(told[name], kind):
        raise ValueError(f"{CONTENTS}: {name} is missing or of another kind")
    return told[name]


def _png(image: Media, settings: dict[str, Any] | None) -> bytes:
    with TemporaryDirectory() as folder:
        return save_image(image, Path(folder) / "image.png", settings).read_bytes()


def _lossless(video: Video, *, made: bool) -> bytes:
    """An mp4 file that holds exactly these pixels, with the mark where a model made them."""
    buffer = BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        rate = Fraction(video.fps).limit_denominator(1001)
        stream = output.add_stream("libx264rgb", rate=rate, options={"qp": "0"})
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = video.frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        for pixels in video.frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode(None))
    return buffer.getvalue() + (xmp_box() if made else b"")


# -- folders and zip files ---------------------------------------------------------------------------


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}): check the rights and the free space"
        ) from error


def _write_zip(path: Path, contents: dict[str, Any], files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{token_hex(8)}.part")
    try:
        with zipfile.ZipFile(part, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
            archive.writestr(CONTENTS, json.dumps(contents, indent=1, ensure_ascii=False) + "\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write_folder(path: Path, contents: dict[str, Any], files: dict[str, bytes]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        file = path / name
        if not file.exists() or file.read_bytes() != data:
            file.write_bytes(data)
    save_json(contents, path / CONTENTS)
    for file in path.iterdir():
        if _NAME.fullmatch(file.name) and file.name not in files:  # of turns that were taken back
            file.unlink()


@contextmanager
def _opened(path: Path) -> Iterator[Read]:
    """What reads the files of a folder or zip file. Nothing is ever unpacked to the disk."""
    if path.is_dir():
        yield lambda name, most: _from_folder(path / name, most)
        return
    with zipfile.ZipFile(path) as archive:
        yield lambda name, most: _from_zip(archive, name, most)


def _from_folder(file: Path, most: int) -> bytes:
    if file.is_symlink() or not file.is_file():
        raise ValueError(f"{file.name} is missing, or no plain file")
    _check(file.name, file.stat().st_size, most)
    return file.read_bytes()


def _from_zip(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    member = archive.getinfo(name)
    _check(name, member.file_size, most)
    return archive.read(member)


def _check(name: str, size: int, most: int) -> None:
    if size > most:
        raise ValueError(f"{name} has {size} bytes, more than {most}")
