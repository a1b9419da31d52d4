"""Words one by one: the cache changes nothing, settings restrict the choice to what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import config, network, question, samples, seen, tokenizer

from openlance.config import TextConfig
from openlance.errors import InputError
from openlance.infer.context import encode
from openlance.infer.speak import _choose, speak
from openlance.sequence.pack import pack
from openlance.sequence.segment import Kind, Role, Sample, Segment
from openlance.sequence.template import Message

SIZE = 320  # of the tokenizer; the table of the network is larger
ASKED = question(Message("system", ("Be brief.",)), Message("user", (seen((1, 2, 3)), "What colour?")))


def say(sample: Sample = ASKED, *, stop: tuple[int, ...] = (), seed: int = 0, **settings: Any) -> list[int]:
    options = {"max_tokens": 12, **settings}
    generator = torch.Generator().manual_seed(seed)
    config = TextConfig(**options)
    return list(speak(network(), sample, config, allowed=SIZE, stop=stop, generator=generator))


@torch.no_grad()
def greedy(sample: Sample, count: int) -> list[int]:
    """The same words by a whole forward for each."""
    words: list[int] = []
    for _ in range(count):
        said = [Segment(Kind.TEXT, Role.ANSWER, torch.tensor(words))] if words else []
        hidden = network()(pack([[*sample, *said]], config())).hidden[-1]
        words.append(int(network().head(hidden)[:SIZE].argmax()))
    return words


def test_cached_is_uncached() -> None:
    assert say() == greedy(ASKED, 12)
    chat = question(Message("user", ("Hello.",)))
    assert say(chat) == greedy(chat, 12)


def test_only_known_ids_are_said() -> None:
    assert tokenizer().size == SIZE < config().backbone.vocab
    assert all(token < SIZE for seed in range(3) for token in say(seed=seed, temperature=50.0))


def test_it_stops_at_an_end_and_says_which() -> None:
    free = say()
    end = free[5]
    assert say(stop=(end,)) == free[: free.index(end) + 1]


def test_the_limit_ends_it() -> None:
    assert [len(say(max_tokens=n)) for n in (1, 2, 7)] == [1, 2, 7]


def test_a_context_can_be_given() -> None:
    context = encode(network(), ASKED)
    spoken = [
        list(speak(network(), ASKED, TextConfig(max_tokens=6), allowed=SIZE, stop=(), reuse=context))
        for _ in range(2)
    ]
    assert spoken[0] == spoken[1] == say(max_tokens=6)


def test_the_seed_decides_what_is_drawn() -> None:
    first, same, other = (say(temperature=2.0, seed=seed) for seed in (1, 1, 2))
    assert first == same != other


def test_one_candidate_is_greedy() -> None:
    assert say(temperature=3.0, top_k=1) == say() == say(temperature=3.0, top_p=1e-6)


PROBABILITIES = torch.tensor([0.05, 0.5, 0.15, 0.3])  # of ids 0 to 3; 1, 3, 2, 0 by falling probability


def drawn(spoken: list[int] | None = None, draws: int = 400, **settings: Any) -> dict[int, float]:
    """The share of each id over many draws."""
    generator = torch.Generator().manual_seed(0)
    options = {"temperature": 1.0, **settings}
    ids = [_choose(PROBABILITIES.log(), spoken or [], TextConfig(**options), generator) for _ in range(draws)]
    return {token: ids.count(token) / draws for token in sorted(set(ids))}


@pytest.mark.parametrize(
    "settings, candidates",
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 3}, {1, 2, 3}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.45}, {1}),  # the first that reaches the share is in
        ({"top_p": 0.7}, {1, 3}),
        ({"top_p": 0.9}, {1, 2, 3}),
        ({"top_k": 2, "top_p": 0.9}, {1, 3}),
        ({"temperature": 0.0}, {1}),
    ],
)
def test_the_candidates(settings: dict[str, Any], candidates: set[int]) -> None:
    assert drawn(**settings).keys() == candidates


def test_shares_follow_the_probabilities() -> None:
    """400 draws put a share within 0.1 of its probability (4 sigma)."""
    shares = drawn()
    assert all(abs(shares[i] - float(p)) < 0.1 for i, p in enumerate(PROBABILITIES))
    sharp, flat = (drawn(temperature=t)[1] for t in (0.25, 4.0))
    for share, power in ((sharp, 4.0), (flat, 0.25)):
        weights = PROBABILITIES**power
        assert abs(share - float(weights[1] / weights.sum())) < 0.1


def test_repetition_costs() -> None:
    """A positive score of a said id is divided by the penalty, a negative one multiplied."""
    logits = torch.tensor([2.0, 1.5, -1.0, -1.2])
    for penalty, spoken, expected in ((1.0, [0], 0), (2.0, [0], 1), (2.0, [0, 1], 0), (9.0, [0, 1], 0)):
        settings = TextConfig(repetition_penalty=penalty)
        assert _choose(logits, spoken, settings, None) == expected
    negative = torch.tensor([-1.0, -1.2])
    assert _choose(negative, [0], TextConfig(repetition_penalty=2.0), None) == 1
    assert torch.equal(logits, torch.tensor([2.0, 1.5, -1.0, -1.2]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0},
        {"top_p": 1.5}, {"top_k": -1}, {"repetition_penalty": 0.0},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        TextConfig(**wrong)


def test_an_answered_question_can_be_followed() -> None:
    """A sample that ends in the model's words goes on where they end."""
    assert say(samples()["chat"], max_tokens=3) == greedy(samples()["chat"], 3)
