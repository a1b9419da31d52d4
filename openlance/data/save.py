"""Write pictures and clips with the settings that made them, read the settings back, lay out contact sheets.

A file appears under its name only when it is complete. Settings are any JSON object; they are kept in the
file: PNG in the text chunk "openlance", JPEG and WebP in the EXIF user comment, GIF, MP4, MOV, MKV and WebM
in the comment. All but the PNG hold {"openlance": settings}, to tell them from other comments.

A file with settings is what a model made, and is marked so (`openlance.data.mark`): PNG, JPEG, WebP, MP4 and
MOV in XMP, and all but the PNG beside the settings, as {"openlance": …, "digitalSourceType": …}.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from io import BytesIO
from itertools import pairwise
from math import ceil, sqrt
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from PIL import ExifTags, Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from openlance.data.frames import Frames, Video, decoding, open_container
from openlance.data.mark import DIGITAL_SOURCE_TYPE, XMP, XMP_CHUNK, xmp_box
from openlance.data.media import Media, Source, load_image, open_image, opened
from openlance.errors import InputError

Settings = Mapping[str, Any]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
Kind = TypeVar("Kind")

_KEY = "openlance"
_ASCII = b"ASCII\0\0\0"
_PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_QUALITY = {
    "libx264": {"crf": "18"},
    "libvpx-vp9": {"crf": "24", "b": "0", "deadline": "good", "cpu-used": "4"},
}
_CELL, _GAP, _LINE, _LETTERS = 320, 12, 20, 14  # pixels
_BACKGROUND, _PAPER, _INK, _FILM = "white", "#f4f4f4", "#222222", "#1a1a1a"
_BT709 = 1  # the code of this standard for primaries, transfer and matrix alike (ITU-T H.273)


def save_image(image: Source, path: str | Path, settings: Settings | None = None) -> Path:
    """Write one picture as PNG, JPEG or WebP, by the suffix of `path`; gives the absolute path.

    `image` is whatever `load_image` takes. Missing folders are made; a file of this name is replaced.
    Raises InputError for another suffix, a path that cannot be written, or settings beyond JPEG's 64 KB.
    """
    path = Path(path).absolute()
    kind = _by_suffix(path, _PICTURES)
    options: dict[str, Any] = {} if kind == "PNG" else {"quality": 95, **_inside(settings)}
    if kind == "PNG" and settings is not None:
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt(_KEY, json.dumps(settings))
        options["pnginfo"].add_itxt(XMP_CHUNK, XMP)
    picture = load_image(image)
    with _writing(path) as part:
        _write_pictures([picture], part, kind, **options)
    return path


def save_video(frames: Frames, path: str | Path, fps: float, settings: Settings | None = None) -> Path:
    """Write frames uint8 [T, H, W, 3] as a clip, by the suffix of `path`; gives the absolute path.

    mp4, mov and mkv hold H.264 and webm VP9, both 4:2:0 in BT.709, odd sides made even by repeating the last
    row or column; gif and webp are animations without end, where equal frames in a row may be merged.
    Missing folders are made; a file of this name is replaced.
    Raises InputError for another suffix, other frames, no positive rate, or a path that cannot be written.
    """
    path = Path(path).absolute()
    write = _by_suffix(path, _CLIPS)
    video = Video(frames, fps)
    with _writing(path) as part:
        write(video, part, settings)
    return path


def save_json(data: Any, path: str | Path) -> Path:
    """Write data as JSON; gives the absolute path. Raises InputError for a path that cannot be written."""
    path = Path(path).absolute()
    with _writing(path) as part:
        part.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read_settings(source: str | Path | bytes) -> dict[str, Any]:
    """The settings that a picture or clip was saved with.

    Raises InputError where the file cannot be read, or holds none.
    """
    with opened(source) as (name, file), decoding(name):
        image = open_image(name, file)
        if image is None:
            with open_container(file) as container:
                tags = {key.lower(): value for key, value in container.metadata.items()}
            return _unwrap(name, tags.get("comment", ""))
        chunks = getattr(image, "text", {})
        if _KEY in chunks:
            return _parse(name, chunks[_KEY])
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
        return _unwrap(name, comment or image.info.get("comment", ""))


def contact_sheet(
    items: Sequence[tuple[str, Media | str]], columns: int | None = None, font: str | Path | None = None
) -> Image.Image:
    """A grid of pictures and texts with captions; a clip takes a row of its own, as a film strip.

    `items` are (caption, picture, clip or text), shown in their order. `columns` is the number of pictures in
    a row (up to four unless given). `font` is a font file for scripts that the built-in Latin one lacks.
    Raises InputError where there are no items or the font cannot be read.
    """
    if not items:
        raise InputError("a contact sheet needs at least one item")
    clips = any(isinstance(shown, Video) for _, shown in items)
    columns = columns or (4 if clips else min(4, ceil(sqrt(len(items)))))
    letters, width = _font(font), columns * (_CELL + _GAP) - _GAP
    rows = [_row(row, width, letters) for row in _rows(items, columns)]
    sheet = Image.new("RGB", (width + 2 * _GAP, sum(row.height + _GAP for row in rows) + _GAP), _BACKGROUND)
    top = _GAP
    for row in rows:
        sheet.paste(row, (_GAP, top))
        top += row.height + _GAP
    return sheet


def check_writable(path: str | Path, *, clip: bool) -> None:
    """Look, before the work is done, whether a picture or clip could be saved there; changes nothing.

    Raises InputError for another suffix, or a folder that cannot be written to.
    """
    path = Path(path).absolute()
    kinds: Mapping[str, object] = _CLIPS if clip else _PICTURES
    _by_suffix(path, kinds)
    check_folder(path)


def check_folder(path: str | Path) -> None:
    """Raises InputError where a file of this name could not be written (a missing folder can be made)."""
    path = Path(path).absolute()
    if os.path.isdir(path):
        raise InputError(f"{path}: a folder of this name is in the way")
    folder = next(parent for parent in path.parents if os.path.lexists(parent))
    if not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
        raise InputError(f"{path}: cannot be written: {folder} is no folder that you may write to")


def _by_suffix(path: Path, kinds: Mapping[str, Kind]) -> Kind:
    try:
        return kinds[path.suffix.lower()]
    except KeyError:
        raise InputError(f"{path}: the name must end in one of {', '.join(kinds)}") from None


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its name when all went well."""
    part = path.with_name(f".{token_hex(8)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except InputError:
        raise
    except (OSError, ValueError, av.FFmpegError) as error:
        raise InputError(
            f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}): "
            f"check the folder, its rights, the free space and the size of the picture"
        ) from error
    finally:
        if part.exists():
            part.unlink()


def _write_video(video: Video, part: Path, settings: Settings | None, container: str, codec: str) -> None:
    frames = np.pad(
        video.frames, [(0, 0), *((0, side % 2) for side in video.frames.shape[1:3]), (0, 0)], "edge"
    )
    flags = {"movflags": "faststart"} if container in ("mp4", "mov") else {}
    with av.open(str(part), "w", format=container, options=flags) as output:
        if settings is not None:
            output.metadata["comment"] = _wrap(settings)
        stream = output.add_stream(
            codec, rate=Fraction(video.fps).limit_denominator(1001), options=_QUALITY[codec]
        )
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.colorspace = stream.color_primaries = stream.color_trc = _BT709
        stream.color_range = ColorRange.MPEG
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    if settings is not None and container in ("mp4", "mov"):
        with part.open("ab") as file:
            file.write(xmp_box())


def _write_animation(video: Video, part: Path, settings: Settings | None, kind: str) -> None:
    unit = 10 if kind == "GIF" else 1  # ms; rounded so that the whole clip keeps its length
    ends = [round(index * 1000 / video.fps / unit) * unit for index in range(len(video) + 1)]
    pictures = [Image.fromarray(frame) for frame in video.frames]
    options: dict[str, Any] = {**_inside(settings), "quality": 90} if kind == "WEBP" else {}
    if kind == "GIF" and settings is not None:
        options["comment"] = _wrap(settings).encode()
    durations = [end - start for start, end in pairwise(ends)]
    _write_pictures(pictures, part, kind, save_all=True, duration=durations, loop=0, **options)


def _write_pictures(pictures: list[Image.Image], part: Path, kind: str, **options: Any) -> None:
    """Encode in memory first: Pillow does not notice a disk that is full in the middle of a write."""
    encoded = BytesIO()
    pictures[0].save(encoded, format=kind, append_images=pictures[1:], **options)
    part.write_bytes(encoded.getbuffer())


_CLIPS: dict[str, Callable[[Video, Path, Settings | None], None]] = {
    ".mp4": partial(_write_video, container="mp4", codec="libx264"),
    ".mov": partial(_write_video, container="mov", codec="libx264"),
    ".mkv": partial(_write_video, container="matroska", codec="libx264"),
    ".webm": partial(_write_video, container="webm", codec="libvpx-vp9"),
    ".gif": partial(_write_animation, kind="GIF"),
    ".webp": partial(_write_animation, kind="WEBP"),
}


def _wrap(settings: Settings) -> str:
    return json.dumps({_KEY: settings, "digitalSourceType": DIGITAL_SOURCE_TYPE})


def _inside(settings: Settings | None) -> dict[str, Any]:
    """What JPEG and WebP carry, as options of Pillow."""
    if settings is None:
        return {}
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _ASCII + _wrap(settings).encode()
    return {"exif": exif, "xmp": XMP.encode()}


def _unwrap(name: str, comment: str | bytes) -> dict[str, Any]:
    if isinstance(comment, bytes):
        comment = comment.removeprefix(_ASCII).decode(errors="replace")
    if f'"{_KEY}"' not in comment:
        raise InputError(f"{name}: holds no settings of {_KEY}")
    return _parse(name, comment)[_KEY]


def _parse(name: str, text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{name}: its settings are damaged ({error})") from error


def _rows(items: Sequence[tuple[str, Media | str]], columns: int) -> list[list[tuple[str, Media | str]]]:
    """Rows of up to `columns` pictures and texts; a clip stands alone."""
    rows: list[list[tuple[str, Media | str]]] = []
    for item in items:
        joins = rows and len(rows[-1]) < columns and not isinstance(rows[-1][-1][1], Video)
        if joins and not isinstance(item[1], Video):
            rows[-1].append(item)
        else:
            rows.append([item])
    return rows


def _row(items: list[tuple[str, Media | str]], width: int, font: Font) -> Image.Image:
    cells = [
        _cell(caption, shown, width if isinstance(shown, Video) else _CELL, font) for caption, shown in items
    ]
    row = Image.new("RGB", (width, max(cell.height for cell in cells)), _BACKGROUND)
    for index, cell in enumerate(cells):
        row.paste(cell, (index * (_CELL + _GAP), 0))
    return row


def _cell(caption: str, shown: Media | str, width: int, font: Font) -> Image.Image:
    """One item, its caption beneath it."""
    if isinstance(shown, Video):
        picture = _strip(shown, width)
    elif isinstance(shown, str):
        picture = _text(shown, width, _CELL, font)
    else:
        picture = Image.new("RGB", (width, _CELL), _PAPER)
        fitted = _fit(shown.convert("RGB"), width, _CELL)
        picture.paste(fitted, ((width - fitted.width) // 2, (_CELL - fitted.height) // 2))
    label = _text(caption, width, 3 * _LINE + _GAP, font)
    cell = Image.new("RGB", (width, picture.height + label.height), _BACKGROUND)
    cell.paste(picture, (0, 0))
    cell.paste(label, (0, picture.height))
    return cell


def _strip(video: Video, width: int) -> Image.Image:
    """As many frames as fit, spread evenly from first to last, between two rows of holes."""
    height, margin, gap = _CELL // 2, 16, 4
    each = min(round(height * video.frames.shape[2] / video.frames.shape[1]), width - 2 * gap)
    count = min(len(video), max(1, (width - gap) // (max(1, each) + gap)))
    strip = Image.new("RGB", (gap + count * (each + gap), height + 2 * margin), _FILM)
    for place, index in enumerate(np.linspace(0, len(video) - 1, count).round().astype(int)):
        frame = _fit(Image.fromarray(video.frames[index]), max(1, each), height)
        strip.paste(frame, (gap + place * (each + gap), margin + (height - frame.height) // 2))
    draw = ImageDraw.Draw(strip)
    for left in range(6, strip.width - 10, 20):
        for top in (4, height + margin + 4):
            draw.rounded_rectangle((left, top, left + 9, top + 7), 2, fill=_BACKGROUND)
    return strip


def _fit(picture: Image.Image, width: int, height: int) -> Image.Image:
    """As large as there is room, its shape kept, each side at least a pixel."""
    scale = min(width / picture.width, height / picture.height)
    sides = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(sides, Image.Resampling.BICUBIC)


def _text(text: str, width: int, height: int, font: Font) -> Image.Image:
    """The text in lines that fit; what is too much ends in an ellipsis."""
    lines, most = _lines(text, width - 2 * _GAP, font), (height - _GAP) // _LINE
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1][:-1] + "…"]
    box = Image.new("RGB", (width, len(lines) * _LINE + _GAP), _PAPER)
    draw = ImageDraw.Draw(box)
    for index, line in enumerate(lines):
        draw.text((_GAP, _GAP // 2 + index * _LINE), line, font=font, fill=_INK)
    return box


def _lines(text: str, width: int, font: Font) -> list[str]:
    """The text broken at spaces, or within a word where a word is longer than the line."""
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for letter in paragraph.expandtabs(4):
            if line and font.getlength(line + letter) > width:
                kept, space, carried = line.rpartition(" ")
                lines.append(kept if space and letter != " " else line)
                line = carried if space and letter != " " else ""
            line = (line + letter).lstrip() if not line else line + letter
        lines.append(line)
    return lines


def _font(path: str | Path | None) -> Font:
    if path is None:
        return ImageFont.load_default(_LETTERS)
    try:
        return ImageFont.truetype(path, _LETTERS)
    except OSError as error:
        raise InputError(f"{path}: not a font that can be read ({error})") from error
