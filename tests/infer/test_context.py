"""Contexts: run once, shared by forks, and equal to one whole forward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import config, network, question, samples, seen, target

from openlance.infer.context import Context, encode
from openlance.sequence.pack import pack
from openlance.sequence.positions import mape_positions
from openlance.sequence.segment import Sample
from openlance.sequence.template import Message

ATOL = 1e-5  # float32, other order of operations; measured worst case 1e-6
IMAGE = (1, 2, 3)

FIRST = (Message("system", ("Be brief.",)), Message("user", (seen(IMAGE), "What is it?")))
SECOND = (*FIRST, Message("assistant", ("A circle.",)), Message("user", (seen(IMAGE, seed=7), "And this?")))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def tokens_run():
    """A list of how many tokens each pass of the network ran."""
    counts: list[int] = []
    hook = network().register_forward_pre_hook(lambda module, given: counts.append(given[0].tokens))
    yield counts
    hook.remove()


def whole(sample: Sample) -> torch.Tensor:
    """[hidden] of the last token, in one uncached forward."""
    return network()(pack([sample], config())).hidden[-1]


def assert_near(actual: torch.Tensor | None, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["question", "two_clips", "chat"])
def test_cached_is_uncached(name: str) -> None:
    sample = samples()[name]
    assert_near(encode(network(), sample).last_hidden, whole(sample))


def test_generation_contexts_too() -> None:
    sample = [*samples()["subject"][:-2], *question(Message("user", ("Hm?",)))]
    assert_near(encode(network(), sample).last_hidden, whole(sample))


def test_the_next_turn_goes_on_from_the_last(tokens_run: list[int]) -> None:
    first, second = question(*FIRST), question(*SECOND)
    context = encode(network(), first)
    tokens_run.clear()
    longer = encode(network(), second, reuse=context)
    new = sum(map(len, second)) - sum(map(len, first))
    assert new <= sum(tokens_run) < sum(map(len, second))
    assert_near(longer.last_hidden, whole(second))
    assert longer.cache.length == sum(map(len, second))


def test_nothing_new_runs_nothing(tokens_run: list[int]) -> None:
    sample = samples()["question"]
    context = encode(network(), sample)
    tokens_run.clear()
    assert encode(network(), sample, reuse=context) is context
    assert tokens_run == []


def test_forks_do_not_disturb_each_other() -> None:
    """Two continuations of one context, and the context itself, each give what they give alone."""
    trunk = encode(network(), question(*FIRST))
    kept = trunk.last_hidden.clone()
    ends = [
        question(*FIRST[:1], Message("user", (*FIRST[1].parts, words)))
        for words in (" In one word?", " Why is it so?")
    ]
    forks = [encode(network(), end, reuse=trunk) for end in ends]
    for fork, end in zip(forks, ends, strict=True):
        assert_near(fork.last_hidden, whole(end))
    assert torch.equal(trunk.last_hidden, kept)
    assert trunk.cache.length == sum(map(len, trunk.segments))
    again = encode(network(), question(*SECOND), reuse=trunk)
    assert_near(again.last_hidden, whole(question(*SECOND)))


@pytest.mark.parametrize("change", ["words", "picture"])
def test_a_difference_is_run_again(change: str) -> None:
    """What differs from the context, and all after it, is never taken from it."""
    first = question(*FIRST)
    context = encode(network(), first)
    other = {
        "words": replace(first[0], ids=first[0].ids.flip(0)),  # of the same length
        "picture": replace(first[1], features=first[1].features + 1),
    }[change]
    sample = [other, *first[1:]] if change == "words" else [first[0], other, *first[2:]]
    assert_near(encode(network(), sample, reuse=context).last_hidden, whole(sample))


def test_the_same_at_another_place_is_run_again(tokens_run: list[int]) -> None:
    """Looking and editing place the same picture apart: MaPE moves it only where something is generated."""
    first = question(*FIRST)
    context = encode(network(), first)
    sample = [*first, target(IMAGE)]
    placed = mape_positions(sample, config().mape)
    tokens_run.clear()
    found = encode(network(), first, placed[:-1], reuse=context)
    assert sum(tokens_run) == sum(map(len, first[1:]))  # all but the system's words before the picture
    assert_near(found.last_hidden, encode(network(), first, placed[:-1]).last_hidden)
    assert not torch.allclose(found.last_hidden, context.last_hidden, atol=10 * ATOL)


def test_the_head_of_a_longer_context() -> None:
    """Going back a turn: the last piece is run again for its hidden state."""
    context = encode(network(), question(*SECOND))
    back = question(*FIRST)
    assert_near(encode(network(), back, reuse=context).last_hidden, whole(back))


def test_noise_is_never_context() -> None:
    with pytest.raises(AssertionError, match="never cached"):
        encode(network(), samples()["t2i"])
    assert Context().cache.length == 0
