"""Saving, settings and contact sheets."""

from __future__ import annotations

import json
import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import av
import numpy as np
import pytest
import torch
from encoded import grey_levels, levels_of
from PIL import Image

from openlance.data.media import Video, load_image, load_video
from openlance.data.save import contact_sheet, read_settings, save_image, save_video
from openlance.errors import InputError

SETTINGS = {
    "prompt": 'a "red" fox, 狐狸 — 1/2\nsecond line',
    "seed": 7,
    "guidance": 4.0,
    "size": [768, 512],
    "x": None,
}
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
SMOOTH = np.indices((40, 60)).sum(0).astype(np.uint8)[..., None].repeat(3, 2) * 2


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG", "a.webp"])
def test_pictures_keep_their_settings(name: str, tmp_path: Path) -> None:
    path = save_image(SMOOTH, tmp_path / "new" / "folder" / name, SETTINGS)
    assert path == tmp_path / "new" / "folder" / name
    assert read_settings(path) == SETTINGS
    assert read_settings(path.read_bytes()) == SETTINGS
    assert np.abs(np.asarray(load_image(path)).astype(int) - SMOOTH).max() <= (0 if name == "a.png" else 4)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "webm", "gif", "webp"])
def test_clips_keep_their_frames_rate_and_settings(suffix: str, tmp_path: Path) -> None:
    levels = list(range(20, 220, 10))
    path = save_video(grey_levels(levels), tmp_path / f"a.{suffix}", 12, SETTINGS)
    video = load_video(path)
    assert video.frames.shape == (20, 48, 64, 3)
    assert video.fps == pytest.approx(12, rel=0.01)  # gif counts in hundredths of a second
    np.testing.assert_allclose(levels_of(video.frames), levels, atol=3)  # lossy
    assert read_settings(path) == SETTINGS


DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


def xmp_of(path: Path) -> bytes:
    """The XMP packet of a picture, or of an MP4 or MOV file: a box of its own."""
    if path.suffix in (".png", ".jpg", ".webp"):
        found = Image.open(path).info.get("xmp", b"")
        return found.encode() if isinstance(found, str) else found
    data = memoryview(path.read_bytes())
    while data:
        size = int.from_bytes(data[:4])
        if data[4:8] == b"uuid" and data[8:24].hex() == "be7acfcb97a942e89c71999491e3afac":
            return bytes(data[24:size])
        data = data[size:]
    return b""


def source_type(packet: bytes) -> str | None:
    """As a reader of XMP finds it."""
    root = ElementTree.fromstring(packet.decode())
    rdf = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
    [description] = root.iter(f"{rdf}Description")
    return description.get("{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "b.webp", "b.mp4", "b.mov"])
def test_what_a_model_made_says_so_in_xmp(name: str, tmp_path: Path) -> None:
    for settings in (SETTINGS, None):  # settings are those of a model; other files carry none
        if name.startswith("a."):
            path = save_image(PIXELS, tmp_path / name, settings)
        else:
            path = save_video(grey_levels([20, 120]), tmp_path / name, 12, settings)
        packet = xmp_of(path)
        assert (source_type(packet) if packet else None) == (DIGITAL_SOURCE_TYPE if settings else None)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "webm"])
def test_what_a_model_made_says_so_in_the_comment(suffix: str, tmp_path: Path) -> None:
    path = save_video(grey_levels([20, 120]), tmp_path / f"a.{suffix}", 12, SETTINGS)
    with av.open(str(path)) as container:
        tags = {key.lower(): value for key, value in container.metadata.items()}
    assert json.loads(tags["comment"]) == {"openlance": SETTINGS, "digitalSourceType": DIGITAL_SOURCE_TYPE}


def test_what_a_model_made_says_so_in_a_gif(tmp_path: Path) -> None:
    path = save_video(grey_levels([20, 120]), tmp_path / "a.gif", 12, SETTINGS)
    assert json.loads(Image.open(path).info["comment"])["digitalSourceType"] == DIGITAL_SOURCE_TYPE


def test_colours_survive(tmp_path: Path) -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [128, 64, 200]])
    frames = np.broadcast_to(colours[:, None, None].astype(np.uint8), (6, 32, 32, 3))
    for suffix in ("mp4", "webm", "gif", "webp"):
        video = load_video(save_video(frames, tmp_path / f"a.{suffix}", 12))
        np.testing.assert_allclose(video.frames.mean((1, 2)), colours, atol=4)  # lossy


def test_an_mp4_plays_everywhere(tmp_path: Path) -> None:
    path = save_video(grey_levels([20, 120, 220]), tmp_path / "a.mp4", 24000 / 1001)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p"
        assert stream.average_rate == pytest.approx(24000 / 1001)
        frame = next(container.decode(stream))
        assert (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range) == (1, 1, 1, 1)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # starts before it is loaded whole


@pytest.mark.parametrize("suffix", ["mp4", "webm"])
def test_odd_sides_are_made_even_by_repeating_the_edge(suffix: str, tmp_path: Path) -> None:
    frames = np.full((3, 31, 45, 3), 60, np.uint8)
    frames[:, 24:] = 200
    video = load_video(save_video(frames, tmp_path / f"a.{suffix}", 12))
    assert video.frames.shape == (3, 32, 46, 3)
    np.testing.assert_allclose(video.frames[:, 28:].mean((0, 2, 3)), 200, atol=4)  # the last row among them


def test_one_frame_is_a_clip_too(tmp_path: Path) -> None:
    assert len(load_video(save_video(PIXELS[None], tmp_path / "a.mp4", 12))) == 1


def test_long_settings_fit(tmp_path: Path) -> None:
    long = {"prompt": "fox " * 20_000}
    for name in ("a.png", "a.webp"):
        assert read_settings(save_image(PIXELS, tmp_path / name, long)) == long
    for name in ("b.mp4", "b.gif"):
        assert read_settings(save_video(grey_levels([1, 99]), tmp_path / name, 12, long)) == long
    with pytest.raises(InputError, match=r"a\.jpg: cannot be written \(EXIF data is too long\)"):
        save_image(PIXELS, tmp_path / "a.jpg", long)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_pictures_without_settings_say_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{name}: holds no settings"):
        read_settings(save_image(PIXELS, tmp_path / name))


def test_the_comments_of_others_are_no_settings(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.gif", comment=b'{"made": "elsewhere"}')
    with pytest.raises(InputError, match="holds no settings"):
        read_settings(tmp_path / "a.gif")
    with pytest.raises(InputError, match="holds no settings"):
        read_settings(save_video(grey_levels([1, 2]), tmp_path / "a.mp4", 12))
    Image.fromarray(PIXELS).save(tmp_path / "b.gif", comment=b'{"openlance": {')
    with pytest.raises(InputError, match=r"b\.gif: its settings are damaged"):
        read_settings(tmp_path / "b.gif")
    with pytest.raises(InputError, match="no such file"):
        read_settings(tmp_path / "absent.png")


def test_tensors_and_clear_pictures_are_saved_as_they_are_loaded(tmp_path: Path) -> None:
    path = save_image(torch.from_numpy(PIXELS).permute(2, 0, 1) / 255, tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(Image.open(path)), PIXELS)


def test_a_file_is_replaced_whole_and_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("old")
    save_image(PIXELS, path)
    np.testing.assert_array_equal(np.asarray(load_image(path)), PIXELS)
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    assert os.listdir(tmp_path) == ["a.png"]


@contextmanager
def full_disk(after: int) -> Iterator[None]:
    """Let no file grow beyond `after` bytes: the system's own write errors, without filling a disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.mp4", "a.webm", "a.gif", "b.webp"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("old")
    frames = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    with full_disk(after=2000), pytest.raises(InputError, match=rf"{name}: cannot be written"):
        if name in ("a.png", "a.jpg"):
            save_image(frames[0], path)
        else:
            save_video(frames, path, 12)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [name]


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "file" / "a.png", tmp_path / "folder.png"):
        with pytest.raises(InputError, match=f"{path}: cannot be written"):
            save_image(PIXELS, path)
    with pytest.raises(InputError, match=r"a\.mp4: cannot be written"):
        save_video(grey_levels([1, 2]), tmp_path / "file" / "a.mp4", 12)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png"]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda folder: save_image(PIXELS, folder / "a.tga"), r"a\.tga: the name must end in one of \.png"),
        (lambda folder: save_image(PIXELS, folder / "a"), "must end in one of"),
        (lambda folder: save_video(grey_levels([1]), folder / "a.wmv", 12), r"one of \.mp4"),
        (lambda folder: save_video(grey_levels([1]) / 255, folder / "a.mp4", 12), "float64"),
        (lambda folder: save_video(PIXELS, folder / "a.mp4", 12), r"uint8 \[T, H, W, 3\]"),
        (lambda folder: save_video(grey_levels([]), folder / "a.mp4", 12), "a clip is"),
        (lambda folder: save_video(grey_levels([1]), folder / "a.mp4", 0), "positive"),
        (lambda folder: contact_sheet([]), "at least one item"),
        (lambda folder: contact_sheet([("a", "b")], font=folder / "no.ttf"), r"no\.ttf: not a font"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(
    call: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        call(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_contact_sheet_shows_every_item() -> None:
    red, blue = Image.new("RGB", (100, 60), (255, 0, 0)), Image.new("RGB", (40, 90), (0, 0, 255))
    clip = Video(np.stack([np.full((48, 64, 3), level, np.uint8) for level in (90, 150, 210)]), 12)
    items = [("a red one", red), ("a blue one", blue), ("a clip", clip), ("an answer", "Two cats.")]
    sheet = contact_sheet(items)
    shown = {colour for _, colour in sheet.getcolors(sheet.width * sheet.height)}
    assert {(255, 0, 0), (0, 0, 255), (90, 90, 90), (150, 150, 150), (210, 210, 210)} <= shown
    rows = np.flatnonzero((np.asarray(sheet) == 255).all((1, 2)))
    bands = np.count_nonzero(np.diff(rows) > 1)
    assert bands == 3  # two pictures, the clip by itself, the text


def test_a_contact_sheet_has_room_for_long_words_and_no_words() -> None:
    image = Image.new("RGB", (500, 500), "green")
    narrow = contact_sheet([("", image)])
    long = contact_sheet([("w" * 500 + " and more words " * 30, image)])
    assert long.width == narrow.width and 0 < long.height - narrow.height <= 60
    assert contact_sheet([("", image)] * 9).width == contact_sheet([("", image)] * 3, columns=3).width


def test_extreme_shapes_fit_on_a_sheet() -> None:
    for shape in ((1, 4000, 3), (4000, 1, 3)):
        pixels = np.zeros(shape, np.uint8)
        contact_sheet([("picture", Image.fromarray(pixels)), ("clip", Video(pixels[None].repeat(3, 0), 12))])


def test_real_media_make_a_sheet(shared_media: Callable[[str], Path], tmp_path: Path) -> None:
    photo = load_image(shared_media("photo.jpg"))
    clip = load_video(shared_media("car.mp4"), lambda count, fps: [0, 4, 9])
    path = save_image(contact_sheet([("photo", photo), ("car", clip)]), tmp_path / "sheet.png")
    assert np.asarray(load_image(path)).std() > 40
