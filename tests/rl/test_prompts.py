"""Prompts of the world and of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import samples

from openlance.errors import InputError
from openlance.rl.prompts import Prompts, of_pictures, of_questions, of_tags, of_world, one_of, read_prompts
from openlance.rl.rewards.simple import composition
from openlance.sequence.segment import Sample
from openlance.train.parallel import Ranks


def make(words: str, metadata: Any) -> Sample:
    return samples()["t2i"][:-1]


def words_of(feed: Prompts, step: int) -> list[tuple[int, str]]:
    return [(prompt.lane, prompt.words) for prompt in feed.packs(step)]


def test_a_lane_gets_the_same_on_any_number_of_processes() -> None:
    alone = words_of(Prompts(of_world, make, 4), 3)
    shared = [words_of(Prompts(of_world, make, 4, Ranks(rank, 2)), 3) for rank in range(2)]
    assert sorted(shared[0] + shared[1]) == sorted(alone)
    assert [lane for lane, _ in alone] == [0, 1, 2, 3]
    assert len({words for step in range(5) for _, words in words_of(Prompts(of_world, make, 4), step)}) == 20
    assert words_of(Prompts(of_world, make, 4, seed=1), 3) != alone


def test_held_out_captions_are_others_and_can_be_judged() -> None:
    feed = Prompts(of_world, make, 4)
    learnt = {words for step in range(30) for _, words in words_of(feed, step)}
    held_out = feed.held_out(8)
    assert not learnt & {prompt.words for prompt in held_out}
    blank = np.full((1, 96, 96, 3), 255, np.uint8)
    found = composition([p.words for p in held_out], [blank] * 8, [p.metadata for p in held_out])
    assert all(0 <= share < 1 for share in found)


def test_questions_have_their_picture_and_answer() -> None:
    words, metadata = of_questions(64)(np.random.default_rng(0))
    assert words.endswith("?") and metadata["answer"] and metadata["picture"].shape == (64, 64, 3)


def test_prompts_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('a "b"\n\n  c  \n')
    assert read_prompts(tmp_path / "a.txt") == [('a "b"', {}), ("c", {})]
    (tmp_path / "a.jsonl").write_text('{"prompt": "what?", "answer": "red"}\n')
    assert read_prompts(tmp_path / "a.jsonl") == [("what?", {"answer": "red"})]
    drawn = {one_of([("a", {}), ("b", {})])(np.random.default_rng(seed))[0] for seed in range(20)}
    assert drawn == {"a", "b"}
    with pytest.raises(InputError, match=r"none\.txt: prompts could not be read"):
        read_prompts(tmp_path / "none.txt")


def test_words_of_held_out_prompts_are_never_learnt_from() -> None:
    """Even of prompts so short that they come again."""
    feed = Prompts(of_tags, make, 4, apart=True)
    learnt = {words for step in range(60) for _, words in words_of(feed, step)}
    held_out = [prompt.words for prompt in feed.held_out(40)]
    assert len(learnt) < 240 and not learnt & set(held_out)
    plain = {words for step in range(60) for _, words in words_of(Prompts(of_tags, make, 4), step)}
    assert plain & set(held_out)


def test_short_prompts_and_captions_can_be_judged() -> None:
    rng = np.random.default_rng(0)
    found = [of_pictures(rng) for _ in range(60)]
    assert len({words.count(" ") > 5 for words, _ in found}) == 2
    blank = np.full((1, 96, 96, 3), 255, np.uint8)
    words, facts = zip(*found, strict=True)
    assert np.mean(composition(words, [blank] * 60, facts)) < 0.5
