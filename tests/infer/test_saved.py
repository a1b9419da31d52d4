"""Saved conversations that are damaged, cut short, or made to do harm: refused in one line."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openlance.data.frames import Video
from openlance.errors import InputError
from openlance.infer import saved
from openlance.infer.result import Answer, Generated
from openlance.infer.saved import load_turns, save_turns
from openlance.infer.turn import Turn

RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 256, (5, 33, 47, 3), dtype=np.uint8)  # odd sides, and nothing to compress
TURNS = [
    Turn("Hä?", (Image.fromarray(FRAMES[0]),), Answer("Só.", 2, "stop", {"seed": 1}, {"answer": 0.1})),
    Turn("go", (Video(FRAMES, 29.97),), Generated(FRAMES[::-1].copy(), 12.0, {"seed": 2}, {"decode": 1.0})),
    Turn("still", (), Generated(FRAMES[1:2].copy(), 12.0, {"seed": 3})),
    Turn("draw", (), Generated(FRAMES[2:3].copy(), None, {"seed": 4})),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_turns(tmp_path / "talk", "You.", TURNS)


def contents(folder: Path) -> Any:
    return json.loads((folder / "conversation.json").read_text())


def rewrite(folder: Path, change: Callable[[Any], Any]) -> None:
    told = contents(folder)
    change(told)
    (folder / "conversation.json").write_text(json.dumps(told))


def refused(path: Path, told: str) -> None:
    with pytest.raises(InputError, match=told) as caught:
        load_turns(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["talk", "talk.zip", "talk.ZIP"])
def test_everything_comes_back(tmp_path: Path, name: str) -> None:
    path = save_turns(tmp_path / name, None, TURNS)
    assert path.is_file() == (path.suffix != "")
    system, turns = load_turns(path)
    assert system is None
    assert turns[0].result == TURNS[0].result
    for one, other in zip(turns, TURNS, strict=True):
        assert one.text == other.text
        for shown, original in zip(one.media, other.media, strict=True):
            if isinstance(original, Video):
                assert np.array_equal(shown.frames, original.frames) and shown.fps == original.fps
            else:
                assert np.array_equal(np.asarray(shown), np.asarray(original))
        if isinstance(other.result, Generated):
            assert np.array_equal(one.result.frames, other.result.frames)
            assert one.result.fps == other.result.fps
            assert (one.result.settings, one.result.seconds) == (other.result.settings, other.result.seconds)


def test_the_same_conversation_is_the_same_files(folder: Path, tmp_path: Path) -> None:
    again = save_turns(tmp_path / "again", "You.", TURNS)
    files = sorted(path.name for path in folder.iterdir())
    assert files == sorted(path.name for path in again.iterdir()) and len(files) == 6
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in files)


def test_a_damaged_file_is_written_anew(folder: Path) -> None:
    file = next(folder.glob("*.png"))
    file.write_bytes(bytes(file.stat().st_size))
    refused(folder, "is not what was saved")
    save_turns(folder, "You.", TURNS)
    assert len(load_turns(folder)[1]) == 4


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "no such file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "conversation.json is missing")
    (tmp_path / "text.zip").write_text("not a zip file")
    refused(tmp_path / "text.zip", "damaged, cut short")


def test_a_zip_file_cut_anywhere(tmp_path: Path) -> None:
    path = save_turns(tmp_path / "talk.zip", None, TURNS)
    data = path.read_bytes()
    for end in range(0, len(data) - 1, len(data) // 60):
        path.write_bytes(data[:end])
        refused(path, "damaged, cut short")


def test_bytes_changed_anywhere(tmp_path: Path) -> None:
    """Either it is noticed, or nothing that is said has changed (dates, rights and the like)."""
    path = save_turns(tmp_path / "talk.zip", None, TURNS)
    data = path.read_bytes()
    noticed = 0
    for place in RNG.integers(0, len(data), 40):
        changed = bytearray(data)
        changed[place] ^= 0xFF
        path.write_bytes(changed)
        try:
            turns = load_turns(path)[1]
        except InputError:
            noticed += 1
        else:
            assert [turn.text for turn in turns] == [turn.text for turn in TURNS]
    assert noticed > 30


def test_media_cut_short_or_gone(folder: Path) -> None:
    whole = {file: file.read_bytes() for file in folder.glob("*-*")}
    for file, data in whole.items():
        file.write_bytes(data[: len(data) * 2 // 3])
        refused(folder, f"{file.name} is not what was saved")
        file.unlink()
        refused(folder, f"{file.name} is missing")
        file.write_bytes(data)
    assert len(load_turns(folder)[1]) == 4


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "..", "", "conversation.json", "a/b.png", 5]
)
def test_no_name_leads_out(folder: Path, name: Any) -> None:
    shutil.copy(next(folder.glob("*.png")), folder.parent / "secret.png")
    rewrite(folder, lambda told: told["turns"][0]["shown"][0].update(file=name))
    refused(folder, "no name of a picture or clip|file is missing or of another kind")


def test_no_link_leads_out(folder: Path) -> None:
    file = next(folder.glob("*.png"))
    file.rename(folder.parent / "secret.png")
    file.symlink_to(folder.parent / "secret.png")
    refused(folder, f"{file.name} is missing, or no plain file")


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told.update(version=2),
        lambda told: told.update(openlance="run"),
        lambda told: told.pop("system"),
        lambda told: told.update(system=5),
        lambda told: told.update(turns={}),
        lambda told: told["turns"].append(None),
        lambda told: told["turns"][0].pop("text"),
        lambda told: told["turns"][0].update(shown=None),
        lambda told: told["turns"][0]["answer"].update(text=3),
        lambda told: told["turns"][0].pop("answer"),
        lambda told: told["turns"][1].update(made=[]),
        lambda told: told["turns"][1]["made"].update(settings=None),
        lambda told: told["turns"][1]["made"].update(fps="fast"),
        lambda told: told["turns"][1]["made"].update(fps=-1.0),
        lambda told: told["turns"][1]["made"].update(fps=None),
    ],
)
def test_fields_of_another_form(folder: Path, change: Callable[[Any], Any]) -> None:
    rewrite(folder, change)
    refused(folder, "damaged, cut short")


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, "\udcff"])
def test_no_json_of_a_conversation(folder: Path, text: str) -> None:
    (folder / "conversation.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(folder, "damaged, cut short")


def test_sizes_are_bounded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, archive = FRAMES[0].nbytes, tmp_path / "talk.zip"
    save_turns(archive, None, TURNS)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("conversation.json", b"[" + b" " * 10**6)
    monkeypatch.setattr(saved, "MOST_WORDS", 10**5)
    refused(tmp_path / "bomb.zip", "conversation.json has 1000001 bytes, more than 100000")
    monkeypatch.setattr(saved, "MOST_BYTES", 9 * one)
    for path in (folder, archive):
        refused(path, "more than 4 GiB of pixels|bytes, more than")
    with pytest.raises(InputError, match="too many to save"):
        save_turns(tmp_path / "large", None, TURNS)
