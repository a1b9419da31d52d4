"""Pictures and clips that clients send: their bytes, and whether they may be decoded at all."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

from av.video.stream import VideoStream

from openlance.data.frames import decoding, open_container
from openlance.data.media import open_image
from openlance.errors import InputError
from openlance.serve.fetch import fetch, is_media_type
from openlance.serve.settings import ServeConfig

_ANIMATED = frozenset({"PNG", "WEBP", "GIF", "AVIF"})


@dataclass(frozen=True)
class Shown:
    """What the header of a file says. size: (height, width) in pixels."""

    kind: Literal["image", "video"]
    size: tuple[int, int]
    frames: int


async def read_media(address: str, config: ServeConfig) -> bytes:
    """The bytes behind a data: address, or an http(s) one of a host that the server may fetch from.

    Raises InputError for a malformed or unsupported address, and whatever hinders fetching.
    """
    if address[:5].lower() == "data:":
        return _from_data(address)
    if address[:7].lower() == "http://" or address[:8].lower() == "https://":
        return await fetch(address, hosts=config.hosts, most=config.max_body)
    raise InputError("give media as data:image/png;base64,… (or as an http address, if the server fetches)")


def check_media(data: bytes, config: ServeConfig, name: str = "the media") -> Shown:
    """What a file holds, after a look at its header: no pixel is decoded. It blocks: use a thread.

    Raises InputError for what is no picture or clip, or beyond the server's limits. name: for the message.
    """
    if not data:
        raise InputError(f"{name}: the file is empty")
    file = BytesIO(data)
    image = open_image(name, file)
    if image is None:
        shown = _clip(name, file, config.max_input_frames)
    else:
        with decoding(name):
            moving = image.format in _ANIMATED and getattr(image, "is_animated", False)
            frames = image.n_frames if moving else 1  # type: ignore[attr-defined]
        shown = Shown("video" if moving else "image", (image.height, image.width), frames)
    height, width = shown.size
    if height * width > config.max_pixels:
        raise InputError(
            f"{name}: {width}x{height} pixels; at most {config.max_pixels} are taken: scale it down first"
        )
    if shown.frames > config.max_input_frames:
        raise _too_long(name, config.max_input_frames)
    return shown


async def look(address: str, config: ServeConfig, name: str = "the media") -> tuple[bytes, Shown]:
    """`read_media`, then `check_media` beside the event loop."""
    data = await read_media(address, config)
    return data, await asyncio.to_thread(check_media, data, config, name)


def _from_data(address: str) -> bytes:
    header, comma, body = address[5:].partition(",")
    media_type, *parameters = header.split(";")
    if not comma or not parameters or parameters[-1].strip().lower() != "base64":
        raise InputError("a data: address must be data:TYPE;base64,… , as data:image/png;base64,iVBOR…")
    if not is_media_type(media_type):
        raise InputError(f"{media_type[:100]!r} is neither a picture nor a clip: send image/… or video/…")
    try:
        return base64.b64decode(body, validate=True)
    except ValueError as error:
        raise InputError(f"the base64 of a data: address is malformed ({error})") from error


def _clip(name: str, file: BytesIO, most: int) -> Shown:
    """A video file, its frames counted from the packets."""
    with decoding(name), open_container(file) as container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream):
            raise InputError(f"{name}: there is no video in this file")
        count = 0
        for packet in container.demux(stream):
            count += packet.size > 0
            if count > most:
                raise _too_long(name, most)
        return Shown("video", (stream.height, stream.width), count)


def _too_long(name: str, most: int) -> InputError:
    return InputError(f"{name}: the clip has more than {most} frames: cut it")
