"""The public API: what each call gives, and what decides it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import config

from openlance.data.frames import Video
from openlance.infer.generate import Cancelled, Step
from openlance.infer.pipeline import LancePipeline
from openlance.infer.result import Generated
from openlance.sequence.template import Task

Call = Callable[..., Generated]

# Drawn words follow every small difference; the likeliest words of random weights are much the same.
DRAWN = {"temperature": 1.0, "seed": 1}


@pytest.fixture
def calls(lance: LancePipeline, picture: Any, clip: Any) -> dict[Task, Call]:
    """One call of every task that generates; each takes further settings."""
    moving = Video(clip, 4.0)
    return {
        Task.T2I: lambda **s: lance.generate_image("a red circle", **{"size": (32, 48), **s}),
        Task.T2V: lambda **s: lance.generate_video("it moves", **{"size": 32, "frames": 9, **s}),
        Task.I2V: lambda **s: lance.animate(picture, "it moves", **s),
        Task.IMAGE_EDIT: lambda **s: lance.edit(picture, "make it blue", **s),
        Task.VIDEO_EDIT: lambda **s: lance.edit(moving, "make it blue", **s),
        Task.SUBJECT_IMAGE: lambda **s: lance.subject([picture, clip[3]], "both", **{"size": 32, **s}),
        Task.SUBJECT_VIDEO: lambda **s: lance.subject(picture, "it moves", **{"video": True, **s}),
    }


SHAPES = {  # (frames, height, width), frames a second
    Task.T2I: ((1, 32, 48), None),
    Task.T2V: ((9, 32, 32), 4.0),
    Task.I2V: ((5, 48, 64), 4.0),  # the picture's aspect ratio, the checkpoint's frames
    Task.IMAGE_EDIT: ((1, 48, 64), None),  # the source's size
    Task.VIDEO_EDIT: ((5, 48, 64), 4.0),
    Task.SUBJECT_IMAGE: ((1, 32, 32), None),
    Task.SUBJECT_VIDEO: ((5, 48, 48), 4.0),
}


@pytest.mark.parametrize("task", list(SHAPES))
def test_every_task_that_generates(calls: dict[Task, Call], task: Task) -> None:
    """Its size and rate; the same seed gives the same, another seed another."""
    found = calls[task](seed=1)
    (frames, height, width), fps = SHAPES[task]
    assert found.frames.shape == (frames, height, width, 3) and found.frames.dtype == np.uint8
    assert found.fps == fps
    assert found.settings["task"] == task and found.settings["seed"] == 1
    assert (found.settings["size"], found.settings["frames"]) == ([height, width], frames)
    assert found.seconds.keys() == {"denoise", "decode"}
    assert np.array_equal(found.frames, calls[task](seed=1).frames)
    assert not np.array_equal(found.frames, calls[task](seed=2).frames)


def test_a_seed_that_nobody_chose_is_reported(calls: dict[Task, Call]) -> None:
    found, other = calls[Task.T2I](), calls[Task.T2I]()
    assert found.settings["seed"] != other.settings["seed"]
    again = calls[Task.T2I](seed=found.settings["seed"])
    assert np.array_equal(found.frames, again.frames)


def test_randomness_outside_does_not_matter(calls: dict[Task, Call]) -> None:
    torch.manual_seed(1)
    found = calls[Task.T2I](seed=5)
    torch.manual_seed(2)
    assert np.array_equal(found.frames, calls[Task.T2I](seed=5).frames)


def test_the_settings_are_enough_to_do_it_again(lance: LancePipeline) -> None:
    asked = {"steps": 3, "shift": 2.0, "guidance": 6.0, "guidance_interval": (0.2, 0.9), "renorm": "channel"}
    found = lance.generate_image("a red circle", size=32, negative_prompt="blue", seed=3, **asked)
    told = found.settings
    assert {name: told["sampling"][name] for name in asked} == asked
    again = lance.generate_image(
        told["prompt"], size=tuple(told["size"]), negative_prompt=told["negative_prompt"], seed=told["seed"],
        **told["sampling"],
    )  # fmt: skip
    assert np.array_equal(found.frames, again.frames)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a blue square"}, {"negative_prompt": "blue"}, {"steps": 3}, {"shift": 1.0},
        {"guidance": 1.0}, {"guidance": 7.0, "renorm": "none"}, {"renorm": "channel"},
        {"guidance_interval": (0.99, 1.0)},
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_reaches_the_result(lance: LancePipeline, change: dict[str, Any]) -> None:
    asked = {"prompt": "a red circle", "size": 32, "seed": 1, "renorm": "none"}
    plain, changed = (lance.generate_image(**given) for given in (asked, asked | change))
    assert not np.array_equal(plain.frames, changed.frames)


def test_what_is_shown_matters(lance: LancePipeline, picture: Any, clip: Any) -> None:
    other = 255 - picture
    for call in (
        lambda shown: lance.edit(shown, "make it blue", seed=1).frames,
        lambda shown: lance.subject(shown, "again", size=32, seed=1).frames,
        lambda shown: lance.animate(shown, "it moves", seed=1).frames,
    ):
        assert not np.array_equal(call(picture), call(other))


def test_first_and_last_frame_stay(lance: LancePipeline, picture: Any) -> None:
    """The given latents are untouched at every step; without a last frame, the end is free."""

    def ends(**given: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        steps: list[Step] = []
        lance.animate(picture, "it moves", frames=9, seed=1, on_step=steps.append, **given)
        return [s.latents[0] for s in steps], [s.latents[-1] for s in steps]

    firsts, lasts = ends()
    assert torch.equal(firsts[0], firsts[1]) and not torch.equal(lasts[0], lasts[1])
    both, held = ends(last=255 - picture)
    assert torch.equal(both[0], firsts[0]) and torch.equal(held[0], held[1])
    assert not torch.equal(both[0], held[0])


def test_a_result_can_be_edited_again(lance: LancePipeline, picture: Any) -> None:
    """From its last state alone, or with all the turns that led to it."""
    first = lance.edit(picture, "make it blue", seed=1)
    alone = lance.edit(first, "larger", seed=2)
    kept = lance.edit(first, "larger", keep_history=True, seed=2)
    assert alone.frames.shape == kept.frames.shape == first.frames.shape
    assert not np.array_equal(alone.frames, kept.frames)
    assert np.array_equal(alone.frames, lance.edit(first.image, "larger", seed=2).frames)
    assert [len(result.history) for result in (first, alone, kept)] == [2, 2, 4]
    third = lance.edit(kept, "smaller", keep_history=True, seed=3)
    assert len(third.history) == 6


def test_a_result_can_be_asked_about(lance: LancePipeline, calls: dict[Task, Call]) -> None:
    found = calls[Task.T2I](seed=1)
    asked = {"max_tokens": 8, **DRAWN}
    assert lance.ask("what?", found, **asked).text == lance.ask("what?", found.image, **asked).text


def test_the_callback_sees_each_step_and_can_stop(calls: dict[Task, Call]) -> None:
    numbers: list[tuple[int, int]] = []
    calls[Task.T2V](steps=3, on_step=lambda step: numbers.append((step.number, step.total)))
    assert numbers == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(Cancelled, match="after step 1 of 3"):
        calls[Task.T2V](steps=3, on_step=lambda step: False)


def test_sizes_are_rounded_and_said(lance: LancePipeline, caplog: pytest.LogCaptureFixture) -> None:
    found = lance.generate_video("it moves", size=(30, 41), frames=7, seed=1)
    assert found.frames.shape == (5, 32, 48, 3)
    assert "size 30x41 is not a multiple of 16: made 32x48" in caplog.text
    assert "7 frames is not 4 k + 1: made 5" in caplog.text
    caplog.clear()
    lance.generate_video("it moves", size=(32, 48), frames=5, seed=1)
    assert caplog.text == ""


def test_answers(lance: LancePipeline, picture: Any, clip: Any) -> None:
    asked = {"max_tokens": 8, **DRAWN}
    found = lance.ask("What colour?", picture, **asked)
    assert found.tokens <= 8 and found.finish in ("stop", "length")
    assert (found.settings["text"]["max_tokens"], found.settings["seed"]) == (8, DRAWN["seed"])
    assert str(found) == found.text == lance.ask("What colour?", picture, **asked).text
    texts = {
        lance.ask(question, media, **asked).text
        for question, media in (
            ("What colour?", picture), ("What colour?", 255 - picture), ("", picture), ("What colour?", ()),
            ("What colour?", [picture, 255 - picture]), ("What colour?", Video(clip, 4.0)),
        )
    }  # fmt: skip
    assert len(texts) == 6


def test_the_seed_decides_drawn_words(lance: LancePipeline) -> None:
    first, same, other = (
        lance.ask("Why?", seed=seed, temperature=1.5, max_tokens=10).text for seed in (1, 1, 2)
    )
    assert first == same != other


def test_streaming_joined_is_the_whole_answer(lance: LancePipeline, picture: Any) -> None:
    asked = {"temperature": 1.0, "seed": 4, "max_tokens": 24}
    pieces = list(lance.stream("What colour?", picture, **asked))
    assert len(pieces) > 1
    assert "".join(pieces) == lance.ask("What colour?", picture, **asked).text


def test_a_stop_string_ends_the_answer(lance: LancePipeline) -> None:
    asked = {"temperature": 1.0, "seed": 4, "max_tokens": 24}
    text = lance.ask("Why?", **asked).text
    word = text[5:8]
    found = lance.ask("Why?", stop=(word,), **asked)
    assert (found.text, found.finish) == (text[: text.index(word)], "stop")


def test_chat_is_ask_and_goes_on(lance: LancePipeline, picture: Any) -> None:
    asked = {"max_tokens": 8, **DRAWN}
    question = {"type": "text", "text": "What colour?"}
    first = [{"role": "user", "content": [{"type": "image", "image": picture}, question]}]
    answer = lance.chat(first, **asked)
    assert answer.text == lance.ask("What colour?", picture, **asked).text
    turned = [{"role": "user", "content": [question, {"type": "image", "image": picture}]}]
    assert lance.chat(turned, **asked).text != answer.text  # text and pictures in any order
    longer = [*first, {"role": "assistant", "content": "Red."}, {"role": "user", "content": "Sure?"}]
    texts = {lance.chat(messages, **asked).text for messages in (longer, longer[-1:], longer[:1])}
    assert len(texts) == 3
    told = [{"role": "system", "content": "You are a pirate."}, *first]
    assert lance.chat(told, **asked).text != answer.text


@pytest.mark.parametrize(
    "tasks, parts, vae",
    [
        ([Task.CHAT], {"und"}, False),
        ([Task.X2T_VIDEO], {"und", "vision"}, False),
        ([Task.T2I], {"und", "gen"}, True),
        ([Task.IMAGE_EDIT, Task.CHAT], {"und", "gen", "vision"}, True),
        (None, {"und", "gen", "vision"}, True),
    ],
)
def test_only_what_the_tasks_need_is_loaded(
    tiny_checkpoint: Path, lance: LancePipeline, tasks: list[Task] | None, parts: set[str], vae: bool
) -> None:
    loaded = LancePipeline.from_pretrained(tiny_checkpoint, device="cpu", tasks=tasks)
    assert (set(loaded.model.parts), loaded.vae is not None) == (parts, vae)
    assert loaded.ask("Why?", max_tokens=5).text == lance.ask("Why?", max_tokens=5).text


def test_the_dtype_is_the_callers(tiny_checkpoint: Path) -> None:
    loaded = LancePipeline.from_pretrained(tiny_checkpoint, device="cpu", dtype=torch.bfloat16)
    assert loaded.model.dtype == torch.bfloat16
    assert {p.dtype for p in loaded.vae.parameters()} == {torch.bfloat16}
    assert loaded.generate_image("a red circle", size=32, seed=1).frames.shape == (1, 32, 32, 3)
    assert loaded.config.backbone == config().backbone


def test_conditions_are_the_mean_or_a_draw(lance: LancePipeline, picture: Any) -> None:
    """A draw from the VAE's posterior follows the seed too."""
    mean, draw, again = (
        lance.edit(picture, "make it blue", seed=1, sample_posterior=sample).frames
        for sample in (False, True, True)
    )
    assert np.array_equal(draw, again) and not np.array_equal(mean, draw)
