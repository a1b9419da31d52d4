"""Conversations: what later turns see of earlier ones, and going back, aside, and away to disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openlance.data.example import Record
from openlance.data.fields import Fields
from openlance.data.frames import Video
from openlance.data.tasks import encode_rows, to_row, to_sample
from openlance.data.turns import read_turns
from openlance.errors import InputError
from openlance.infer.conversation import Conversation
from openlance.infer.generate import Cancelled, denoise
from openlance.infer.messages import read
from openlance.infer.pipeline import LancePipeline
from openlance.infer.result import Answer, Generated
from openlance.infer.turn import Turn
from openlance.sequence.segment import Kind
from openlance.sequence.template import Task

DRAWN = {"max_tokens": 8, "temperature": 1.0, "seed": 1}


@pytest.fixture
def talk(lance: LancePipeline) -> Iterator[Conversation]:
    yield lance.conversation()


def same(one: Any, other: Any) -> bool:
    return np.array_equal(one.frames, other.frames)


def png(picture: Any) -> bytes:
    buffer = BytesIO()
    Image.fromarray(np.asarray(picture)).save(buffer, "PNG")
    return buffer.getvalue()


def said(text: str, *media: Any) -> dict[str, Any]:
    shown = [{"type": "image", "image": one} for one in media]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


def test_answers_are_those_of_the_whole_chat(lance: LancePipeline, talk: Conversation, picture: Any) -> None:
    first = talk.ask("What colour?", picture, **DRAWN)
    assert first.text == lance.ask("What colour?", picture, **DRAWN).text
    made = talk.edit("make it blue", seed=2)
    second = talk.ask("And now?", **DRAWN)
    messages = [
        said("What colour?", picture), {"role": "assistant", "content": first.text}, said("make it blue"),
        {"role": "assistant", "content": [{"type": "image", "image": made}]}, said("And now?"),
    ]  # fmt: skip
    assert second.text == lance.chat(messages, **DRAWN).text != lance.ask("And now?", **DRAWN).text
    assert [turn.text for turn in talk] == ["What colour?", "make it blue", "And now?"]
    assert [turn.result for turn in talk] == [first, made, second]
    assert talk.last is second and len(talk) == 3 and talk.turns[0].media[0].size == (64, 48)


def test_a_system_prompt_is_for_answers(lance: LancePipeline) -> None:
    talk = lance.conversation("You are a pirate.")
    messages = [{"role": "system", "content": "You are a pirate."}, said("Why?")]
    assert talk.ask("Why?", **DRAWN).text == lance.chat(messages, **DRAWN).text


@pytest.mark.parametrize("again", [False, True], ids=["in_view", "shown_now"])
def test_an_edit_is_the_sequence_that_training_has(
    lance: LancePipeline, talk: Conversation, picture: Any, again: bool
) -> None:
    """A row of data with these turns, through the reader and builder of training, denoised by hand."""
    config = lance.config
    answer = talk.ask("What colour?", picture, **DRAWN)
    first = talk.edit("make it blue", seed=2)
    shown = [255 - picture] if again else []
    found = talk.edit("larger", *shown, seed=3)

    media = [png(one) for one in (picture, first.image, *shown)]
    goal = len(media)
    asked = [2] if again else []
    turns = [
        said("What colour?", 0), {"role": "assistant", "content": answer.text},
        said("make it blue"), {"role": "assistant", "content": [{"type": "image", "image": 1}]},
        said("larger", *asked), {"role": "assistant", "content": [{"type": "image", "image": goal}]},
    ]  # fmt: skip
    record = Record("row", {"turns": turns, "media": [*media, png(found.image)]})

    class Last(np.random.Generator):
        def integers(self, high: int) -> int:  # type: ignore[override]
            return high - 1

    fields = Fields(record, config.sizes, Last(np.random.PCG64(0)))
    example = read_turns(fields, Task.IMAGE_EDIT)
    assert lance.vae is not None
    [row] = encode_rows([to_row(example, config)], lance.vae)
    built = to_sample(row, lance.tokenizer.encode_with_offsets, config)
    sample = built[: next(i for i, s in enumerate(built) if s.kind is Kind.NOISY) + 1]
    assert sum(s.kind is Kind.CLEAN for s in sample) == goal
    grid = sample[-1].grid
    assert grid is not None
    noise = torch.randn(*grid, config.vae.channels, generator=torch.Generator().manual_seed(3))
    latents = denoise(lance.model, sample, config.sampling, noise)
    assert np.array_equal(lance._decode(latents), found.frames)


def test_what_is_new_sees_the_turns_of_words_alone(
    lance: LancePipeline, talk: Conversation, picture: Any
) -> None:
    plain = {"size": 32, "seed": 1}
    talk.ask("What colour?", picture, **DRAWN)
    assert same(talk.generate("a red circle", **plain), lance.generate_image("a red circle", **plain))
    talk.ask("Tell of foxes.", **DRAWN)
    after = talk.generate("a red circle", **plain)
    assert not same(after, lance.generate_image("a red circle", **plain))
    other = Conversation(lance, turns=[talk.turns[2]])
    assert same(after, other.generate("a red circle", **plain))
    away = other.generate("a red circle", negative_prompt="blue", **plain)
    assert not same(away, after)


def test_a_picture_of_the_conversation_moves(lance: LancePipeline, talk: Conversation, picture: Any) -> None:
    drawn = talk.generate("a red circle", size=32, seed=1)
    for seed in (2, 3):  # the second time too it is the picture, not the clip
        moved = talk.animate("it moves", frames=5, seed=seed)
        assert same(moved, lance.animate(drawn, "it moves", frames=5, seed=seed))
    ends = talk.animate("it moves", picture, last=255 - picture, frames=9, seed=5)
    assert same(ends, lance.animate(picture, "it moves", last=255 - picture, frames=9, seed=5))
    assert len(talk.turns[-1].media) == 2


def test_clips_are_made_shown_and_edited(lance: LancePipeline, talk: Conversation, clip: Any) -> None:
    filmed = talk.generate_video("it moves", size=32, frames=5, seed=6)
    assert same(filmed, lance.generate_video("it moves", size=32, frames=5, seed=6))
    edited = talk.edit("make it blue", seed=4)
    assert edited.settings["task"] == Task.VIDEO_EDIT and len(edited.frames) == 5
    shown = talk.edit("make it blue", Video(clip, 4.0), seed=7)
    assert shown.frames.shape == (5, 48, 64, 3) and talk.turns[-1].media[0].fps == 4.0


def test_a_stream_becomes_a_turn_at_its_end(lance: LancePipeline, talk: Conversation) -> None:
    stream = talk.stream("Why?", **DRAWN)
    first = next(stream)
    assert len(talk) == 0
    whole = lance.ask("Why?", **DRAWN)
    assert first + "".join(stream) == whole.text
    last = talk.last
    assert isinstance(last, Answer)
    assert (last.text, last.tokens, last.finish) == (whole.text, whole.tokens, whole.finish)
    assert last.settings == whole.settings
    abandoned = talk.stream("Why?", **DRAWN)
    next(abandoned)
    abandoned.close()
    assert len(talk) == 1


def test_what_fails_leaves_no_turn(talk: Conversation, picture: Any) -> None:
    for call, told in (
        (lambda: talk.edit("make it blue"), "no picture or clip yet: give one"),
        (lambda: talk.animate("it moves"), "no picture yet: give one"),
        (lambda: talk.undo(), "cannot take back 1 turns: the conversation has 0"),
        (lambda: talk.ask(" "), "nothing is asked"),
        (lambda: talk.stream(), "nothing is asked"),
        (lambda: talk.generate(""), "the prompt is empty"),
        (lambda: talk.edit("", picture), "the prompt is empty"),
        (lambda: talk.generate("a circle", cfg=3), "unknown settings cfg"),
    ):
        with pytest.raises(InputError, match=told):
            call()
    with pytest.raises(Cancelled, match="after step 1 of 2"):
        talk.edit("make it blue", picture, on_step=lambda step: False)
    assert len(talk) == 0 and talk.last is None


def test_an_empty_answer_can_be_gone_on_from(lance: LancePipeline, picture: Any) -> None:
    shown = Image.fromarray(picture)
    talk = Conversation(lance, turns=[Turn("What colour?", (shown,), Answer("", 0, "stop"))])
    texts = {talk.fork().ask("And now?", **DRAWN).text, lance.ask("And now?", shown, **DRAWN).text}
    assert len(texts) == 2
    assert talk.edit("make it blue", seed=1).frames.shape == (1, 48, 64, 3)


def test_a_caption_among_words_has_the_prompt_of_training(lance: LancePipeline, picture: Any) -> None:
    """What the last turn asks decides, as in `to_sample`."""
    shown = {"role": "user", "content": [{"type": "image", "image": picture}]}
    earlier = [said("Why?"), {"role": "assistant", "content": "It is."}]
    prompts = [read(messages, lance.config)[1][0].parts[0] for messages in ([*earlier, shown], [shown])]
    assert prompts[0] == prompts[1] and "description of the image" in str(prompts[0])


def test_forks_go_their_own_way(talk: Conversation, picture: Any) -> None:
    talk.ask("What colour?", picture, **DRAWN)
    fork = talk.fork()
    assert fork.turns[0].media[0] is talk.turns[0].media[0]
    blue, twin = talk.edit("make it blue", seed=1), fork.edit("make it blue", seed=1)
    assert same(blue, twin)
    fork.ask("And now?", **DRAWN)
    assert (len(talk), len(fork)) == (2, 3)
    [gone] = talk.undo()
    assert gone.result is blue and isinstance(talk.last, Answer)
    assert same(talk.edit("make it blue", seed=1), blue)  # as if the turn had never been
    assert len(fork.undo(3)) == 3 and len(fork) == 0
    for count in (0, 3):
        with pytest.raises(InputError, match="the conversation has 2"):
            talk.undo(count)


def test_a_notebook_shows_every_turn(talk: Conversation, picture: Any) -> None:
    talk.ask("<script>alert(1)</script>", picture, **DRAWN)
    talk.animate("it moves", frames=5)
    html = talk._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert (html.count("<img "), html.count("<video ")) == (1, 1)
    assert repr(talk) == "<conversation with tiny, 2 turns>"


@pytest.mark.parametrize("name", ["talk", "talk.zip"])
def test_what_is_loaded_goes_on_as_the_original(
    lance: LancePipeline, clip: Any, picture: Any, tmp_path: Path, name: str
) -> None:
    talk = lance.conversation("You are a pirate.")
    talk.ask("What colour?", [picture, Video(clip, 4.0)], **DRAWN)
    talk.generate("a red circle", size=32, seed=1)
    talk.animate("it moves", frames=5, seed=2)
    talk.edit("make it “blue”", seed=3)
    assert talk.save(tmp_path / "new" / name) == tmp_path / "new" / name
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]
    loaded = Conversation.load(tmp_path / "new" / name, lance)
    assert loaded.system == talk.system
    for one, other in zip(loaded, talk, strict=True):
        assert one.text == other.text and type(one.result) is type(other.result)
        assert one.result.settings == json.loads(json.dumps(other.result.settings))  # lists for tuples
        if isinstance(one.result, Generated):
            assert same(one.result, other.result) and one.result.fps == other.result.fps
            assert one.result.seconds == other.result.seconds
        else:
            assert one.result.text == other.result.text and one.result.seconds == other.result.seconds
    for talked in (loaded, talk):
        talked.edit("larger", seed=4)
        talked.ask("And now?", **DRAWN)
    edits = [talked.turns[-2].result for talked in (loaded, talk)]
    assert same(*edits) and loaded.last.text == talk.last.text  # type: ignore[union-attr]


def test_saving_again_keeps_what_counts(talk: Conversation, picture: Any, tmp_path: Path) -> None:
    folder = tmp_path / "talk"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    for seed in (1, 2):
        talk.generate("a red circle", size=32, seed=seed)
    talk.save(folder)
    kept = {path.name for path in folder.iterdir()}
    assert len(kept) == 4
    talk.undo()
    talk.save(folder)
    assert {path.name for path in folder.iterdir()} < kept and (folder / "notes.txt").exists()
    assert len(Conversation.load(folder, talk.lance)) == 1


def test_a_saved_picture_is_marked_as_made(talk: Conversation, picture: Any, tmp_path: Path) -> None:
    talk.edit("make it blue", picture, seed=1)
    talk.animate("it moves", frames=5, seed=1)
    folder = talk.save(tmp_path / "talk")
    marked = {
        path.name[4:8]: b"trainedAlgorithmicMedia" in path.read_bytes() for path in folder.glob("*.png")
    }
    assert marked == {"show": False, "made": True}
    assert all(b"trainedAlgorithmicMedia" in path.read_bytes() for path in folder.glob("*.mp4"))


def test_places_that_cannot_be_written(talk: Conversation, tmp_path: Path) -> None:
    talk.ask("Why?", **DRAWN)
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "talk.zip"):
        with pytest.raises(InputError, match="cannot be written"):
            talk.save(path)
    (tmp_path / "talk.zip").mkdir()
    with pytest.raises(InputError, match="a folder of this name is in the way"):
        talk.save(tmp_path / "talk.zip")
