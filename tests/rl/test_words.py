"""Answers in words: what is kept of them, and that what is rewarded is said more often."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build_network, compose_task, config, seen, tokenizer
from tiny_rl import TinyPrompts, rl_config

from openlance.errors import InputError
from openlance.infer.context import encode
from openlance.model.names import part_of
from openlance.rl.learn import HeldOut, train_rl
from openlance.rl.rewards import Rewards
from openlance.rl.rollout import Prompt
from openlance.rl.words import Answers, Vocabulary
from openlance.sequence.template import Task
from openlance.train.losses import Objective
from openlance.train.parallel import Ranks
from openlance.train.settings import RLConfig, TrainConfig

ENDS = frozenset({config().tokens.im_end, config().tokens.endoftext})
VOCABULARY = Vocabulary(tokenizer().size, ENDS, tokenizer().decode)
QUESTION = Prompt("which?", compose_task(Task.X2T_IMAGE, [seen((1, 2, 2)), "which?"]))


class Questions(TinyPrompts):
    def packs(self, step: int):
        for _ in super().packs(step):
            yield QUESTION


def settings(**changes: object) -> RLConfig:
    return rl_config(
        **{"algorithm": "words", "trains": ("und",), "max_words": 4, "ratio_range": 0.2} | changes
    )


def small_letters(prompts: Sequence[str], media: Sequence[Any], metadata: Sequence[Mapping]) -> list[float]:
    """Share of characters that are small letters."""
    return [sum(c.islower() for c in text) / max(1, len(text)) for text in media]


def train(folder: Path, changed: RLConfig, **options: Any) -> Any:
    model, feed = build_network(3), Questions(changed.lanes)
    rewards = Rewards({"small": small_letters})
    found = train_rl(model, feed, changed, folder, decode=VOCABULARY, rewards=rewards, **options)
    return dict(found), model


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_what_is_kept_is_the_probability_of_each_word() -> None:
    """Against the sampler's own distribution over the cache; an end that was said counts as a word."""
    answers = Answers(
        Objective(build_network(0), TrainConfig(steps=1)), settings(group=3), Ranks(), VOCABULARY
    )
    texts, [spoken] = answers.make(QUESTION, torch.Generator().manual_seed(0), torch.Generator())
    assert len(texts) == 3 and spoken.members == range(3)
    assert torch.equal(spoken.old, answers.look(spoken).detach())
    model = answers.objective.model.requires_grad_(False)
    place = 0
    for member in range(3):
        ids = spoken.batch.answer_labels[spoken.owner == member]
        assert texts[member] == tokenizer().decode([int(i) for i in ids if int(i) not in ENDS])
        first = encode(model, QUESTION.sample).last_hidden
        expected = model.head(first).float()[: tokenizer().size].log_softmax(-1)[ids[0]]
        torch.testing.assert_close(spoken.old[place], expected, atol=1e-5, rtol=0)
        place += len(ids)
    assert place == len(spoken.old)


def test_the_loss_of_an_answer_is_the_mean_over_its_words() -> None:
    answers = Answers(
        Objective(build_network(0), TrainConfig(steps=1)), settings(group=3), Ranks(), VOCABULARY
    )
    _, [spoken] = answers.make(QUESTION, torch.Generator().manual_seed(0), torch.Generator())
    advantage = torch.tensor([1.0, -0.5, 0.0])
    now = spoken.old + torch.log(torch.tensor(1.1))
    found = answers.judge(spoken, now, advantage)
    torch.testing.assert_close(found.loss, -1.1 * advantage)


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_a_run_is_on_policy_and_resumes_to_the_bit(tmp_path: Path, kl: float) -> None:
    whole, trained = train(tmp_path / "whole", settings(steps=2, kl=kl))
    train(tmp_path / "cut", settings(steps=1, kl=kl))
    again, _ = train(tmp_path / "cut", settings(steps=2, kl=kl), resume=True)
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []
    start = build_network(3).state_dict()
    changed = {part_of(n) for n, t in trained.state_dict().items() if not torch.equal(t, start[n])}
    assert changed == {"und"}
    for line in log_of(tmp_path / "cut"):
        assert (line["ratio"], line["first_ratio_off"]) == (1.0, 0.0)
    if kl:
        assert log_of(tmp_path / "cut")[0]["kl"] == 0.0


@pytest.mark.slow
def test_what_is_rewarded_is_said_more_often(tmp_path: Path) -> None:
    held_out = HeldOut([QUESTION])
    changed = settings(steps=25, learning_rate=3e-3, group=16, save_every=25)
    train(tmp_path, changed, held_out=held_out)
    log = log_of(tmp_path)
    rewards = [line["reward"] for line in log if "reward" in line]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1
    assert "held_out/small" in log[-1]


def test_words_need_the_und_expert() -> None:
    with pytest.raises(InputError, match="words are the und expert's"):
        settings(trains=("gen",))
