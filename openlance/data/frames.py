"""Clips: which frames to take, and the readers that keep only those.

A reader first learns how many frames a clip has and how fast they run, then asks `select` which ones are
wanted, and keeps only these while it decodes. Memory holds the chosen frames, however long the clip is.
"""

import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from tokenize import TokenError
from typing import IO, BinaryIO, TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image

from openlance.errors import InputError

Frames = NDArray[np.uint8]
"""uint8 [T, H, W, 3], RGB."""

Select = Callable[[int, float], Sequence[int]]
"""(number of frames, frames per second) -> indices of the frames to keep, in the order to keep them."""

# What Pillow, PyAV, zipfile and numpy were seen to raise when they were fed random changes of valid files.
_DECODER_ERRORS = (
    *(ArithmeticError, AssertionError, EOFError, IndexError, OSError, RuntimeError, SyntaxError, ValueError),
    *(av.FFmpegError, zipfile.BadZipFile, zlib.error, struct.error, TokenError),
)

T = TypeVar("T")

MAX_SIDE = 16384
MAX_PIXELS = 178_956_970
MAX_DECODED_BYTES = 4 * 2**30

# Readers of plain files only: the rest of libavformat would follow playlists to other files or addresses.
_CONTAINERS = "mov,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,yuv4mpegpipe,ivf"
_DEFAULT_DELAY = 100  # ms a frame, where an animation gives none


@dataclass(frozen=True)
class Video:
    """A clip in memory: frames uint8 [T, H, W, 3] and their rate in frames per second.

    Raises InputError where the frames are not that, or the rate is not a positive number.
    """

    frames: Frames
    fps: float

    def __post_init__(self) -> None:
        frames = self.frames
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or frames.size == 0:
            raise InputError(f"a clip is uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
        if not (isfinite(self.fps) and self.fps > 0):
            raise InputError(
                f"the rate of a clip must be a positive number of frames a second, got {self.fps}"
            )

    def __len__(self) -> int:
        return len(self.frames)


def sample_frames(
    num_frames: int, fps: float, *, sample_fps: float = 12, max_duration: float = 6.0, temporal: int = 4
) -> list[int]:
    """Which frames of a clip the model takes: k * temporal + 1 indices, spread evenly from first to last.

    Their number is what `sample_fps` gives over the clip's length in seconds, at most `max_duration`, rounded
    down to k * temporal + 1. So a longer clip is sampled more thinly, never cut, and one of a lower rate
    repeats frames. A clip too short for one sample (where the released code fails) gives its first frame.
    Raises InputError for a clip without frames or without a rate.
    """
    if num_frames < 1 or not (isfinite(fps) and fps > 0):
        raise InputError(f"cannot sample {num_frames} frames at {fps} frames a second: both must be positive")
    samples = int(min(num_frames * sample_fps / fps, max_duration * sample_fps))
    count = (samples - 1) // temporal * temporal + 1
    if count < 2:
        return [0]
    return [i * (num_frames - 1) // (count - 1) for i in range(count)]


def choose(name: str, count: int, fps: float, select: Select | None) -> list[int]:
    """The indices that `select` wants of `count` frames; all of them without one.

    Raises InputError where the clip has no frames, ValueError where `select` gives none, or any outside it.
    """
    if count < 1:
        raise InputError(f"{name}: the clip has no frames")
    if select is None:
        return list(range(count))
    wanted = [int(index) for index in select(count, fps)]
    if not wanted or min(wanted) < 0 or max(wanted) >= count:
        raise ValueError(f"{name}: `select` must choose frames in 0..{count - 1}, got {wanted[:8]}")
    return wanted


def kept_rate(fps: float, wanted: Sequence[int]) -> float:
    """The rate at which the wanted frames play as fast as the clip they were chosen from."""
    span = wanted[-1] - wanted[0]
    return fps * (len(wanted) - 1) / span if span > 0 else fps


def check_size(name: str, width: int, height: int) -> None:
    """Raise InputError for a picture that is too large to decode, or has no pixels."""
    if width < 1 or height < 1:
        raise InputError(f"{name}: the picture has no pixels ({width}x{height})")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise InputError(
            f"{name}: {width}x{height} pixels is too large; at most {MAX_SIDE} a side and "
            f"{MAX_PIXELS // 10**6} megapixels are read: scale it down first"
        )


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Turn what Pillow, PyAV and zip files raise on bad bytes into an InputError with the file's name."""
    try:
        yield
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: too many pixels ({error}): scale it down first") from error
    except _DECODER_ERRORS as error:
        cause = getattr(error, "strerror", None) or error
        raise InputError(
            f"{name}: no picture or clip of a known kind, damaged or cut short ({cause})"
        ) from error


def read_container(name: str, file: BinaryIO, select: Select | None, fps: float | None = None) -> Video:
    """Read a video file (mp4, mov, webm, mkv, avi, ...), turned as its display matrix says.

    The frames are counted from the packets: that reads the file once more, but is right for trimmed clips,
    whose header counts frames that are not shown. `fps` overrides the file's (average) rate.
    Raises InputError for files that are no video, damaged, cut short or too large.
    """
    with decoding(name):
        count, rate = _measure(name, file, fps)
    wanted = choose(name, count, rate, select)
    try:
        frames = _decode(name, file, wanted)
    except _EndedEarlyError as ended:
        wanted = choose(name, ended.count, rate, select)
        frames = _decode(name, file, wanted)
    return Video(frames, kept_rate(rate, wanted))


def read_animation(name: str, image: Image.Image, select: Select | None, fps: float | None = None) -> Video:
    """Read an opened animated GIF, WebP, PNG or AVIF, alpha laid over white.

    Their frames last differently long; the rate is the average, and `fps` overrides it.
    Raises InputError for damaged or too large pictures.
    """
    check_size(name, *image.size)
    first = 1 if image.info.get("default_image") else 0  # a PNG may carry a still outside its animation

    def shown() -> Iterator[Image.Image]:
        for index in range(first, getattr(image, "n_frames", 1)):
            image.seek(index)
            image.load()
            yield image

    with decoding(name):
        delays = [frame.info.get("duration") or _DEFAULT_DELAY for frame in shown()]
        count = len(delays)
        rate = 1000 * count / sum(delays) if fps is None else fps
    wanted = choose(name, count, rate, select)
    with decoding(name):
        frames = _gather(name, shown(), lambda frame: np.asarray(over_white(frame)), wanted)
    return Video(frames, kept_rate(rate, wanted))


def read_npz(
    name: str, file: BinaryIO, select: Select | None, fps: float | None = None, sidecar: Path | None = None
) -> Video:
    """Read an .npz archive whose array `frames` is uint8 [T, H, W, 3].

    The rate is `fps`, or the number under "fps" in the JSON file `sidecar`.
    Raises InputError where either is missing or not of that form.
    """
    with decoding(name), zipfile.ZipFile(file) as archive:
        count, *shape = _npz_shape(name, archive)
    rate = _sidecar_rate(name, sidecar) if fps is None else fps
    wanted = choose(name, count, rate, select)
    with decoding(name), zipfile.ZipFile(file) as archive, archive.open("frames.npy") as member:
        _npy_header(member)
        stored = (member.read(prod(shape)) for _ in range(count))
        frames = _gather(name, stored, lambda data: _from_bytes(data, shape), wanted)
    return Video(frames, kept_rate(rate, wanted))


def over_white(image: Image.Image) -> Image.Image:
    """The picture as RGB; what is transparent shows white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


class _EndedEarlyError(Exception):
    """The decoder gave fewer frames than there are packets."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.count = count


def _gather(name: str, frames: Iterable[T], convert: Callable[[T], Frames], wanted: list[int]) -> Frames:
    """Walk through a clip and keep the wanted frames; the others are never converted to pixels."""
    unique = sorted(set(wanted))
    slots = {index: slot for slot, index in enumerate(unique)}
    kept: Frames = np.empty((0, 0, 0, 3), dtype=np.uint8)
    seen = 0
    for index, source in enumerate(frames):
        seen += 1
        if index not in slots:
            continue
        frame = convert(source)
        if not len(kept):
            kept = _space(name, len(unique), frame)
        if frame.shape != kept.shape[1:]:
            raise InputError(f"{name}: the size changes within the clip, at frame {index}: re-encode it")
        kept[slots[index]] = frame
        if index == unique[-1]:
            return kept if wanted == unique else kept[[slots[index] for index in wanted]]
    raise _EndedEarlyError(seen)


def _space(name: str, count: int, frame: Frames) -> Frames:
    if count * frame.size > MAX_DECODED_BYTES:
        raise InputError(
            f"{name}: {count} frames of {frame.shape[1]}x{frame.shape[0]} pixels take more than "
            f"{MAX_DECODED_BYTES >> 30} GiB: choose fewer with `select`, or scale the clip down"
        )
    return np.empty((count, *frame.shape), dtype=np.uint8)


def open_container(file: BinaryIO) -> InputContainer:
    """Open a video file for reading, from its start."""
    file.seek(0)
    return av.open(file, "r", options={"format_whitelist": _CONTAINERS})


def _pictures(name: str, container: InputContainer) -> VideoStream:
    """The video of a container; the cover picture of a song is none."""
    for stream in container.streams.video:
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic:
            return stream
    raise InputError(f"{name}: there is no video in this file, or in a coding that is not known")


def _measure(name: str, file: BinaryIO, fps: float | None) -> tuple[int, float]:
    """(number of frames shown, frames per second), from the packets alone."""
    with open_container(file) as container:
        stream = _pictures(name, container)
        check_size(name, stream.width, stream.height)
        count, end = 0, 0.0
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise InputError(f"{name}: cut short or damaged after {count} frames: get the file again")
            if packet.size and not packet.is_discard:
                count += 1
                end = max(end, _seconds(stream, (packet.pts or 0) + (packet.duration or 0)))
        length, shown = _declared_length(stream), end - _seconds(stream, stream.start_time)
        known = stream.average_rate or stream.guessed_rate or (length and count / length)
        rate = float(known or 0) if fps is None else fps
        if rate <= 0:
            raise InputError(f"{name}: no positive number of frames a second is known: give `fps`")
        if length is not None and shown < length - max(0.5, 2 / rate):
            raise InputError(
                f"{name}: cut short: it should last {length:.1f} s and ends after {shown:.1f} s: get it again"
            )
        return count, rate


def _seconds(stream: VideoStream, ticks: int | None) -> float:
    return float((ticks or 0) * (stream.time_base or 0))


def _declared_length(stream: VideoStream) -> float | None:
    """Seconds that the file says its video lasts; Matroska says it in a tag, as hours:minutes:seconds."""
    if stream.duration is not None:
        return _seconds(stream, stream.duration)
    try:
        hours, minutes, seconds = map(float, stream.metadata.get("DURATION", "").split(":"))
    except ValueError:
        return None
    return hours * 3600 + minutes * 60 + seconds


def _decode(name: str, file: BinaryIO, wanted: list[int]) -> Frames:
    with decoding(name), open_container(file) as container:
        return _gather(name, container.decode(_pictures(name, container)), _pixels, wanted)


def _pixels(frame: VideoFrame) -> Frames:
    """uint8 [H, W, 3], upright."""
    if any(component.is_alpha for component in frame.format.components):
        pixels = np.asarray(over_white(Image.fromarray(frame.to_ndarray(format="rgba"))))
    else:
        pixels = frame.to_ndarray(format="rgb24")
    return np.rot90(pixels, round(frame.rotation / 90))


def _npz_shape(name: str, archive: zipfile.ZipFile) -> tuple[int, ...]:
    if "frames.npy" not in archive.namelist():
        raise InputError(f"{name}: an .npz clip holds an array `frames`; found {archive.namelist()[:8]}")
    with archive.open("frames.npy") as member:
        shape, fortran, dtype = _npy_header(member)
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran:
        raise InputError(f"{name}: `frames` must be uint8 [T, H, W, 3], found {dtype} {list(shape)}")
    check_size(name, shape[2], shape[1])
    return shape


def _npy_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    if np.lib.format.read_magic(member) == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    return np.lib.format.read_array_header_2_0(member)


def _from_bytes(data: bytes, shape: list[int]) -> Frames:
    if len(data) < prod(shape):
        raise EOFError("the array ends early")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _sidecar_rate(name: str, sidecar: Path | None) -> float:
    if sidecar is None or not sidecar.is_file():
        raise InputError(f'{name}: an .npz clip needs a .json file beside it with {{"fps": ...}}, or `fps`')
    try:
        return float(json.loads(sidecar.read_text(encoding="utf-8"))["fps"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'{sidecar}: expected {{"fps": number}} ({error!r})') from error
