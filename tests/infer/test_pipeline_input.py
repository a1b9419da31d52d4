"""Input that cannot be used: one clear message each, before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openlance.errors import InputError
from openlance.infer.pipeline import LancePipeline
from openlance.sequence.template import Task


@pytest.mark.parametrize("prompt", ["", "  \n", None])
def test_an_empty_prompt(lance: LancePipeline, picture: Any, prompt: Any) -> None:
    for call in (
        lambda: lance.generate_image(prompt), lambda: lance.generate_video(prompt),
        lambda: lance.animate(picture, prompt), lambda: lance.edit(picture, prompt),
        lambda: lance.subject(picture, prompt),
    ):  # fmt: skip
        with pytest.raises(InputError, match="the prompt is empty"):
            call()


def test_nothing_asked(lance: LancePipeline) -> None:
    with pytest.raises(InputError, match="nothing is asked"):
        lance.ask(" ")
    with pytest.raises(InputError, match="nothing is asked"):
        next(lance.stream())


def test_unknown_settings_are_named_with_the_known_ones(lance: LancePipeline) -> None:
    with pytest.raises(InputError, match=r"unknown settings cfg: choose from guidance, .*steps"):
        lance.generate_image("a circle", cfg=3.0)
    with pytest.raises(InputError, match="unknown settings top_q: choose from lookup, max_tokens"):
        lance.ask("Why?", top_q=1)
    with pytest.raises(InputError, match="steps must be at least 1"):
        lance.generate_image("a circle", steps=0)


@pytest.mark.parametrize("size", [8, (32, 8), (32, 1000), (-16, 32), 0])
def test_sizes_out_of_range(lance: LancePipeline, picture: Any, size: Any) -> None:
    for call in (
        lambda: lance.generate_image("a circle", size=size),
        lambda: lance.generate_video("it moves", size=size),
        lambda: lance.subject(picture, "again", size=size),
    ):
        with pytest.raises(InputError, match="each side must lie between 16 and 128 pixels"):
            call()


@pytest.mark.parametrize("frames", [0, -3, 18])
def test_frames_out_of_range(lance: LancePipeline, picture: Any, frames: int) -> None:
    for call in (
        lambda: lance.generate_video("it moves", frames=frames),
        lambda: lance.animate(picture, "it moves", frames=frames),
        lambda: lance.subject(picture, "it moves", video=True, frames=frames),
    ):
        with pytest.raises(InputError, match=f"{frames} frames: the model generates 1 to 17"):
            call()


def test_an_animation_needs_frames_to_make(lance: LancePipeline, picture: Any) -> None:
    with pytest.raises(InputError, match="1 frames leave nothing to generate: ask for 5 or more"):
        lance.animate(picture, "it moves", frames=1)
    with pytest.raises(InputError, match="5 frames leave nothing to generate: ask for 9 or more"):
        lance.animate(picture, "it moves", last=picture, frames=5)


def test_a_last_frame_of_another_shape(lance: LancePipeline, picture: Any) -> None:
    with pytest.raises(InputError, match="another aspect ratio"):
        lance.animate(picture, "it moves", last=np.zeros((64, 36, 3), np.uint8), frames=9)


def test_no_reference(lance: LancePipeline) -> None:
    with pytest.raises(InputError, match="at least one reference"):
        lance.subject([], "again")


def test_history_of_nothing(lance: LancePipeline, picture: Any) -> None:
    for source in (picture, lance.generate_image("a circle", size=32, seed=1)):
        with pytest.raises(InputError, match="keep_history needs an edited result"):
            lance.edit(source, "larger", keep_history=True)


def test_parts_that_were_not_loaded(tiny_checkpoint: Path, picture: Any) -> None:
    chat = LancePipeline.from_pretrained(tiny_checkpoint, device="cpu", tasks=[Task.CHAT])
    for call, missing in (
        (lambda: chat.generate_image("a circle"), "t2i needs gen, vae"),
        (lambda: chat.generate_video("it moves"), "t2v needs gen, vae"),
        (lambda: chat.animate(picture, "it moves"), "i2v needs gen, vae"),
        (lambda: chat.edit(picture, "larger"), "image_edit needs gen, vae, vision"),
        (lambda: chat.subject(picture, "again"), "subject_image needs gen, vae, vision"),
        (lambda: chat.ask("What?", picture), "x2t_image needs vision"),
    ):
        with pytest.raises(InputError, match=f"{missing}: load the checkpoint with this task"):
            call()


SAID = {"role": "user", "content": "Why?"}


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "must end with a user's message"),
        ([SAID, {"role": "assistant", "content": "So."}], "must end with a user's message"),
        ([{"content": "Why?"}], "must end with a user's message"),
        ([{"role": "robot", "content": "Hm."}, SAID], "unknown message role 'robot'"),
        (["Why?"], "unknown message 'Why\\?'"),
        ([{"role": "user", "content": ""}], "the prompt is empty"),
        ([{"role": "user", "content": []}], "a list of parts that is not empty"),
        ([{"role": "user"}], "content must be a text"),
        ([{"role": "user", "content": [{"type": "sound", "sound": 1}]}], "unknown part .*sound"),
        ([{"role": "user", "content": [{"type": "image"}]}], "unknown part"),
        ([{"role": "user", "content": ["Why?"]}], "unknown part 'Why\\?'"),
        ([{"role": "user", "content": [{"type": "image", "image": "no.png"}]}], "no.png: no such file"),
    ],
)
def test_conversations(lance: LancePipeline, messages: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        lance.chat(messages)


def test_media_that_is_not_there_or_no_media(lance: LancePipeline, tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    for call in (
        lambda path: lance.edit(path, "larger"), lambda path: lance.ask("What?", path),
        lambda path: lance.animate(path, "it moves"), lambda path: lance.subject(path, "again"),
    ):  # fmt: skip
        for name in ("absent.png", "empty.png", "text.png"):
            with pytest.raises(InputError, match=name):
                call(tmp_path / name)


def test_an_unknown_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a Lance release"):
        LancePipeline.from_pretrained(tmp_path)
