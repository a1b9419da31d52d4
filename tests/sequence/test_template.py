"""Messages into segments: the text is the chat template's, the cuts fall between roles."""

from __future__ import annotations

import pytest
import torch
from tiny import GENERATING, clean, config, samples, seen, target, tokenizer

from openlance.errors import InputError
from openlance.sequence.pack import token_ids
from openlance.sequence.segment import Kind, Role, without
from openlance.sequence.template import Message, Task, build, compose, parse_task, system_prompt

encode = tokenizer().encode_with_offsets


def text_of(sample: list, role: Role | None = None) -> str:
    ids = [s.ids for s in sample if not s.visual and role in (None, s.role)]
    return tokenizer().decode(torch.cat(ids).tolist())


def test_an_answer_ends_its_turn() -> None:
    sample = compose(["Why?"], encode, system="Be.", ending="Because.")
    assert text_of(sample) == (
        "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\nBecause.<|im_end|>"
    )
    assert text_of(sample, Role.USER) == "Why?"
    assert text_of(sample, Role.ANSWER) == "Because.<|im_end|>"


def test_an_open_turn_waits_for_words() -> None:
    sample = compose(["Why?"], encode, system="Be.")
    assert text_of(sample).endswith("Why?<|im_end|>\n<|im_start|>assistant\n")
    assert all(s.role is not Role.ANSWER for s in sample)


def test_text_and_vision_in_any_order() -> None:
    parts = ["Here ", seen((1, 1, 1)), " and ", clean((1, 1, 1)), "."]
    sample = compose(parts, encode, system="Be.", ending=target((1, 1, 1)))
    shape = [s.kind.value if s.visual else s.role.value for s in sample]
    assert shape == [
        "template", "user", "vit", "user", "clean", "user", "template", "noisy", "template",
    ]  # fmt: skip
    assert text_of(sample, Role.USER) == "Here  and ."


@pytest.mark.parametrize("words", ["one", " two words", "tabs\tand\n\nlines ", "naïve 狐狸 e\u0301", "a<b>"])
def test_tokens_are_those_of_the_whole_text(words: str) -> None:
    """Cutting by role changes no token: a token belongs to the role in which it starts."""
    sample = compose([words], encode, system="Be.", ending="Fine.")
    rendered = f"<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\n{words}<|im_end|>\n"
    rendered += "<|im_start|>assistant\nFine.<|im_end|>"
    assert token_ids(sample, config()).tolist() == tokenizer().encode(rendered)


def test_past_turns_are_context() -> None:
    """Guidance keeps them, and they carry no loss."""
    history = (Message("user", ("First.",), past=True), Message("assistant", ("Done.",), past=True))
    sample = compose(["Second."], encode, system="Be.", ending="Yes.", history=history)
    assert text_of(sample, Role.USER) == "Second."
    assert text_of(sample, Role.ANSWER) == "Yes.<|im_end|>"
    kept = text_of(without(sample, Role.USER))
    assert "First." in kept and "Done." in kept and "Second." not in kept


@pytest.mark.parametrize("name", GENERATING)
def test_guidance_drops_the_words_only(name: str) -> None:
    sample = samples()[name]
    short = without(sample, Role.USER)
    assert [s for s in sample if s not in short] == [s for s in sample if s.role is Role.USER]
    assert len(short) < len(sample)
    assert [s for s in short if s.visual] == [s for s in sample if s.visual]


def test_every_task_has_a_prompt_and_a_checkpoint_may_have_its_own() -> None:
    for task in Task:
        assert system_prompt(task, {}) and system_prompt(task, {task: "Mine."}) == "Mine."
    asked = system_prompt(Task.X2T_VIDEO, {})
    assert system_prompt(Task.X2T_VIDEO, {}, caption=True) not in ("", asked)
    assert system_prompt(Task.T2I, {}, caption=True) == system_prompt(Task.T2I, {})


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match=r"unknown task 'draw': choose one of t2i"):
        parse_task("draw")
    with pytest.raises(InputError, match="unknown message role 'robot'"):
        build([Message("robot", ("x",))], encode)


def test_segments_know_their_length() -> None:
    for sample in samples().values():
        for segment in sample:
            assert len(segment) == (segment.inner + 2 if segment.visual else len(segment.ids))
            assert segment.visual == (segment.kind is not Kind.TEXT)
    moving = samples()["first_and_last"][-2]
    assert moving.fixed_tokens().view(3, 4).all(1).tolist() == [True, False, True]
