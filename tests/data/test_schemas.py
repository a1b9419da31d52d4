"""Rows into examples: which task the columns tell, what stands where, and which rows are refused."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from stored import SIZES, jpeg, level, mp4, write_jsonl

from openlance.data.example import Example, Record
from openlance.data.fields import UNREADABLE
from openlance.data.media import Media, Video, as_frames
from openlance.data.schemas import BadRow, to_example
from openlance.data.sources import open_source
from openlance.sequence.template import SYSTEM_PROMPTS, Task


def read(values: Mapping[str, Any], task: Task | None = None, seed: int = 0) -> Example:
    return to_example(Record("a.parquet:17", values), SIZES, np.random.default_rng(seed), task)


def refused(values: Mapping[str, Any], task: Task | None = None) -> str:
    with pytest.raises(BadRow) as error:
        read(values, task)
    assert error.value.id == "a.parquet:17"
    return error.value.reason


def levels(media: tuple[Media, ...]) -> list[int]:
    """The grey level of each first frame: the files are told apart by it."""
    return [level(as_frames(shown)[0]) for shown in media]


ROWS: dict[Task, dict[str, Any]] = {
    Task.T2I: {"caption": "a", "image_bytes": jpeg(10)},
    Task.T2V: {"caption": "a", "video_bytes": mp4(40)},
    Task.IMAGE_EDIT: {"caption": "a", "input_image_bytes": jpeg(10), "output_image_bytes": jpeg(20)},
    Task.VIDEO_EDIT: {"caption": "a", "input_video_bytes": mp4(40), "output_video_bytes": mp4(80)},
    Task.SUBJECT_IMAGE: {
        "caption": "a", "reference_image_bytes": [jpeg(10), jpeg(20)], "output_image_bytes": jpeg(30),
    },
    Task.SUBJECT_VIDEO: {"caption": "a", "reference_image_bytes": [jpeg(10)], "output_video_bytes": mp4(80)},
    Task.X2T_IMAGE: {"image_bytes": jpeg(10), "caption_i": "", "caption_q": "q", "caption_a": "a"},
    Task.X2T_VIDEO: {"video_bytes": mp4(40), "caption_i": "", "caption_q": "q", "caption_a": "a"},
}  # fmt: skip
SHOWN = {
    Task.IMAGE_EDIT: [10], Task.VIDEO_EDIT: [40], Task.SUBJECT_IMAGE: [10, 20], Task.SUBJECT_VIDEO: [10],
    Task.X2T_IMAGE: [10], Task.X2T_VIDEO: [40],
}  # fmt: skip
MADE = {
    Task.T2I: 10, Task.T2V: 40, Task.IMAGE_EDIT: 20, Task.VIDEO_EDIT: 80, Task.SUBJECT_IMAGE: 30,
    Task.SUBJECT_VIDEO: 80,
}  # fmt: skip


@pytest.mark.parametrize("task", ROWS)
def test_the_columns_tell_the_task(task: Task) -> None:
    nothing = dict.fromkeys(column for row in ROWS.values() for column in row)
    example = read(nothing | ROWS[task])
    assert (example.id, example.task, example.fixed_frames) == ("a.parquet:17", task, ())
    assert levels(example.sources) == pytest.approx(SHOWN.get(task, []), abs=2)
    if task.generates:
        assert example.target is not None
        assert levels((example.target,)) == pytest.approx([MADE[task]], abs=2)
        assert isinstance(example.target, Video) == task.video
        assert (example.prompt, example.answer) == ("a", None)
    else:
        assert (example.prompt, example.answer, example.target) == ("q", "a", None)


def test_image_to_video_reads_text_to_video_rows() -> None:
    example = read(ROWS[Task.T2V], Task.I2V)
    assert (example.task, example.fixed_frames, example.sources) == (Task.I2V, (0,), ())


def test_clips_keep_the_frames_that_the_model_sees() -> None:
    target = read(ROWS[Task.T2V]).target
    assert isinstance(target, Video)
    assert target.frames.shape == (5, 48, 64, 3)  # 16 frames at 8 a second are 8 at 4, so 4 k + 1 = 5
    assert [level(frame) for frame in target.frames] == pytest.approx(
        [40 + 2 * n for n in (0, 3, 7, 11, 15)], abs=2
    )


def test_other_names_of_columns() -> None:
    example = read({"image": jpeg(10), "text": "a"})
    assert (example.task, example.prompt) == (Task.T2I, "a")
    example = read({"image": jpeg(10), "question": "q", "answer": "a"})
    assert (example.task, example.prompt, example.answer) == (Task.X2T_IMAGE, "q", "a")


@pytest.mark.parametrize(
    ("instruction", "question", "prompt"),
    [
        ("", "", ""),
        (None, "Why?", "Why?"),
        ("Be brief.", "Why?", "Be brief.\nWhy?"),
        ("Be brief.", "", "Be brief."),
        (SYSTEM_PROMPTS[Task.X2T_IMAGE], "Why?", "Why?"),
        (SYSTEM_PROMPTS["caption_image"], "", ""),
    ],
)
def test_instruction_and_question(instruction: str | None, question: str, prompt: str) -> None:
    row = {"image_bytes": jpeg(), "caption_i": instruction, "caption_q": question, "caption_a": "a"}
    assert read(row).prompt == prompt


def test_captions_are_answers_where_describing_is_asked_for() -> None:
    example = read(ROWS[Task.T2I], Task.X2T_IMAGE)
    assert (example.prompt, example.answer, example.target) == ("", "a", None)
    assert len(example.sources) == 1


def test_one_of_several_captions_is_drawn() -> None:
    row = {"caption": ["a", "b"], "image_bytes": jpeg()}
    assert read(row, seed=3).prompt == read(row, seed=3).prompt
    assert {read(row, seed=seed).prompt for seed in range(16)} == {"a", "b"}


TURNS = [
    {"role": "user", "content": [{"type": "text", "text": "Draw."}, {"type": "text", "text": "Now."}]},
    {"role": "assistant", "content": [{"type": "image", "image": 0}]},
    {"role": "user", "content": [{"type": "image", "image": 1}, {"type": "text", "text": "Like this."}]},
    {"role": "assistant", "content": [{"type": "image", "image": "second_bytes"}]},
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "Grey."},
    {"role": "user", "content": "Thanks."},
]
TALK = {"turns": json.dumps(TURNS), "media": [jpeg(10), jpeg(20)], "second_bytes": jpeg(30)}


def test_each_answer_of_a_conversation_is_a_turn_to_learn() -> None:
    found = {example.task: example for example in (read(TALK, seed=seed) for seed in range(16))}
    first, second, third = (found[task] for task in (Task.T2I, Task.IMAGE_EDIT, Task.X2T_IMAGE))
    assert len(found) == 3
    assert (first.prompt, first.sources, first.history) == ("Draw.\nNow.", (), ())
    assert isinstance(first.target, Image.Image)
    assert level(first.target) == 10
    assert (second.prompt, levels(second.sources), len(second.history)) == ("Like this.", [20], 1)
    assert isinstance(second.target, Image.Image)
    assert level(second.target) == 30
    assert (third.prompt, third.answer, third.target, third.sources) == ("What is it?", "Grey.", None, ())
    assert [turn.prompt for turn in third.history] == ["Draw.\nNow.", "Like this."]
    assert [levels((turn.reply,)) for turn in third.history if not isinstance(turn.reply, str)] == [
        [10],
        [30],
    ]
    assert [levels(turn.sources) for turn in third.history] == [[], [20]]


def test_turns_are_drawn_evenly_and_by_the_generator_alone() -> None:
    assert read(TALK, seed=5).task == read(TALK, seed=5).task
    drawn = Counter(read(TALK, seed=seed).task for seed in range(90))
    assert min(drawn.values()) > 15  # of 30 expected, 3 standard deviations and more


def test_a_given_task_draws_among_its_turns() -> None:
    assert {read(TALK, Task.X2T_IMAGE, seed=seed).answer for seed in range(5)} == {"Grey."}
    assert "no turn to learn (image_edit, t2i, x2t_image)" in refused(TALK, Task.VIDEO_EDIT)


def turns(*content: Any) -> dict[str, Any]:
    """Alternating turns as a list, with a picture and a clip to show."""
    listed = [
        {"role": role, "content": part}
        for role, part in zip(["user", "assistant"] * 4, content, strict=False)
    ]
    return {"turns": listed, "media": [jpeg(10), mp4(40)]}


IMAGE, VIDEO = [{"type": "image", "image": 0}], [{"type": "video", "video": 1}]


@pytest.mark.parametrize(
    ("content", "task"),
    [
        (["hi", "ho"], Task.CHAT),
        ([IMAGE, "ho"], Task.X2T_IMAGE),
        ([VIDEO, "ho"], Task.X2T_VIDEO),
        (["hi", IMAGE], Task.T2I),
        (["hi", VIDEO], Task.T2V),
        ([IMAGE, IMAGE], Task.IMAGE_EDIT),
        ([VIDEO, VIDEO], Task.VIDEO_EDIT),
        ([IMAGE, VIDEO], Task.SUBJECT_VIDEO),
    ],
)
def test_what_a_turn_asks_for_follows_from_what_is_shown(content: list[Any], task: Task) -> None:
    assert read(turns(*content)).task is task


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({UNREADABLE: "not JSON"}, "not JSON"),
        ({"caption": "a", "width": 3}, "the columns caption, width fit no task"),
        ({"caption": " ", "image_bytes": jpeg()}, "caption is missing or empty"),
        ({"caption": 3, "image_bytes": jpeg()}, "caption holds int, not words"),
        ({"caption": "a", "image_bytes": "a.jpg"}, "image_bytes holds str, not the bytes of a file"),
        ({"caption": "a", "image_bytes": b"\xff\xd8\xff"}, "image_bytes: "),
        ({"caption": "a", "image_bytes": jpeg()[:-400]}, "image_bytes: "),
        ({"caption": "a", "image_bytes": mp4()}, "no picture of a known kind"),
        ({"caption": "a", "video_bytes": jpeg()}, "found a still picture"),
        ({"caption": "a", "video_bytes": mp4(frames=1)}, "video_bytes is too short"),
        (ROWS[Task.SUBJECT_IMAGE] | {"reference_image_bytes": [jpeg(), b"x"]}, "reference_image_bytes[1]"),
        ({"turns": "[{"}, "turns: not JSON"),
        ({"turns": [3]}, "turns must be a list"),
        ({"turns": [{"role": "tool", "content": "x"}]}, "a turn's role is 'tool'"),
        (turns("hi"), "no turn to learn (without a turn of the assistant)"),
        (turns([]), "content must be words"),
        (turns([{"type": "sound"}]), "a part of a turn"),
        (turns([{"type": "text", "text": None}]), "a part of a turn"),
        (turns("hi", [*IMAGE, {"type": "text", "text": "x"}]), "either words or one picture"),
        (turns("hi", " "), "is empty"),
        (turns([{"type": "image", "image": 2}], "ho"), "media[2], which is not there"),
        (turns([{"type": "image", "image": -1}], "ho"), "media[-1], which is not there"),
        (turns([{"type": "image", "image": "gone"}], "ho"), "gone is missing or empty"),
        (turns([{"type": "image", "image": 1}], "ho"), "media[1]: no picture of a known kind"),
    ],
)  # fmt: skip
def test_bad_rows_say_why(row: dict[str, Any], reason: str) -> None:
    assert reason in refused(row)


def test_a_given_task_names_the_columns_that_are_missing() -> None:
    reason = refused(ROWS[Task.T2I], Task.IMAGE_EDIT)
    assert reason == (
        "image_edit needs caption, input_image_bytes, output_image_bytes: "
        "input_image_bytes, output_image_bytes missing or empty"
    )


def test_bad_rows_survive_the_way_from_a_worker() -> None:
    bad = pickle.loads(pickle.dumps(BadRow("a:1", "why")))
    assert (bad.id, bad.reason, str(bad)) == ("a:1", "why", "a:1: why")


def test_the_lines_of_the_guide_are_rows(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    lines = guide.split("```jsonl\n")[1].split("```")[0]
    files = dict.fromkeys(("circle.jpg", "blue.jpg", "beach.jpg"), jpeg()) | {"grows.mp4": mp4()}
    source = open_source(str(write_jsonl(tmp_path / "a.jsonl", lines.splitlines(), files)))
    tasks = [to_example(row, SIZES, np.random.default_rng(0)).task for row in source.read(0)]
    assert tasks == [Task.T2I, Task.IMAGE_EDIT, Task.SUBJECT_IMAGE, Task.X2T_IMAGE, Task.T2V, Task.T2I]
