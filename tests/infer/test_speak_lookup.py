"""Guessed words: the ids are those of plain decoding, in fewer forwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import network, question, seen

from openlance.config import TextConfig
from openlance.errors import InputError
from openlance.infer.lookup import Lookup
from openlance.infer.pipeline import LancePipeline
from openlance.infer.speak import Voice, speak, speak_together
from openlance.model.attention import CausalTail, Streams, attention
from openlance.model.cache import KVCache, Workspace
from openlance.sequence.template import Message

SIZE = 320
ASKED = question(Message("user", (seen((1, 2, 3)), "What colour? What colour? What colour?")))


def say(lookup: int, *, stop: tuple[int, ...] = (), seed: int = 0, **settings: Any) -> list[int]:
    config = TextConfig(**{"max_tokens": 40, "lookup": lookup, **settings})
    generator = torch.Generator().manual_seed(seed)
    return list(speak(network(), ASKED, config, allowed=SIZE, stop=stop, generator=generator))


@contextmanager
def forwards() -> Iterator[list[int]]:
    """The lengths of the network's passes."""
    lengths: list[int] = []
    handle = network().register_forward_pre_hook(lambda _, args: lengths.append(args[0].tokens))
    try:
        yield lengths
    finally:
        handle.remove()


@pytest.mark.parametrize("lookup", [1, 3, 8])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.3},
        {"temperature": 1.5, "top_k": 3},
        {"max_tokens": 1},
        {"max_tokens": 2},
        {"max_tokens": 17},
    ],
    ids=str,
)
def test_the_ids_are_those_of_plain_decoding(lookup: int, settings: dict[str, Any]) -> None:
    assert say(lookup, **settings) == say(0, **settings)


def test_it_stops_where_plain_decoding_stops() -> None:
    free = say(0)
    for end in set(free):
        assert say(8, stop=(end,)) == free[: free.index(end) + 1]


def test_guesses_that_stand_save_passes() -> None:
    """Where repetition is rewarded, the network says one id for ever, and all guesses are right."""
    with forwards() as plain:
        ids = say(0, repetition_penalty=0.7)
    with forwards() as guessed:
        assert say(4, repetition_penalty=0.7) == ids
    assert len(plain) - len(guessed) > 25  # of 40 ids, five a pass
    assert guessed[-3:-1] == [5, 5]  # the last id and four guesses


def test_whoever_listens_can_end_it() -> None:
    voice = Voice(ASKED, TextConfig(max_tokens=40, lookup=8))
    for said in speak_together(network(), [voice], allowed=SIZE, stop=()):
        assert said == [voice]
        voice.ended = len(voice.spoken) == 9
    assert voice.spoken == say(0)[:9]


OTHERS = [
    question(Message("user", ("Hello. Hello. Hello.",))),
    question(Message("user", (seen((1, 2, 2)), "Say red, blue, red, blue, red."))),
    question(Message("user", (seen((1, 2, 2)), "Say red, blue, red, blue, blue."))),
]


def voices(lookups: tuple[int, ...], **settings: Any) -> list[Voice]:
    """Answers of several lengths to several questions, each with words guessed or not."""
    lengths = (40, 25, 31, 31)
    return [
        Voice(
            sample,
            TextConfig(**{"lookup": lookup, "max_tokens": most, **settings}),
            torch.Generator().manual_seed(3),
        )
        for sample, lookup, most in zip([ASKED, *OTHERS], lookups, lengths, strict=True)
    ]


@pytest.mark.parametrize("lookups", [(4, 4, 4, 4), (8, 0, 3, 1), (0, 0, 0, 5)], ids=str)
@pytest.mark.parametrize(
    "settings", [{}, {"repetition_penalty": 0.7}, {"temperature": 1.5, "top_k": 3}], ids=str
)
def test_several_guess_in_one_pass(lookups: tuple[int, ...], settings: dict[str, Any]) -> None:
    """Each says what it says alone without guesses, and they come to an end sooner."""
    plain, guessing = voices((0, 0, 0, 0), **settings), voices(lookups, **settings)
    with forwards() as few:
        rounds = [list(said) for said in speak_together(network(), guessing, allowed=SIZE, stop=())]
    with forwards() as many:
        for voice in plain:
            assert [*speak_together(network(), [voice], allowed=SIZE, stop=())] == [[voice]] * len(
                voice.spoken
            )
    assert [voice.spoken for voice in guessing] == [voice.spoken for voice in plain]
    assert all(sum(voice in said for said in rounds) == len(voice.spoken) for voice in guessing)
    assert len(few) < len(many)
    if settings == {"repetition_penalty": 0.7} and all(lookups):
        with forwards() as together:
            list(speak_together(network(), voices((0, 0, 0, 0), **settings), allowed=SIZE, stop=()))
        assert len(few) < 0.7 * len(together)


def test_one_of_several_can_be_ended() -> None:
    plain, guessing = voices((0, 0, 0, 0)), voices((8, 8, 8, 8))
    for _ in speak_together(network(), guessing, allowed=SIZE, stop=()):
        guessing[1].ended |= len(guessing[1].spoken) == 9
    list(speak_together(network(), plain, allowed=SIZE, stop=()))
    assert [voice.spoken for voice in guessing] == [
        voice.spoken[: 9 if number == 1 else None] for number, voice in enumerate(plain)
    ]


def test_a_repeated_run_is_guessed() -> None:
    lookup = Lookup([1, 2, 3, 4, 5, 9, 2, 3, 4])
    assert lookup.guess(2) == [5, 9]
    assert lookup.guess(0) == lookup.guess(-1) == []
    lookup.add(7)
    assert lookup.guess(4) == []  # 3, 4 was never followed by 7 before
    for token in (1, 8, 1, 8):
        lookup.add(token)
    assert lookup.guess(5) == [1, 8, 1, 8, 1]  # goes on repeating


def test_the_longest_run_that_stood_before_decides() -> None:
    assert Lookup([1, 2, 3, 7, 5, 2, 3, 8, 1, 2, 3]).guess(1) == [7]
    assert Lookup([4, 2, 3, 7, 5, 2, 3, 8, 1, 2, 3]).guess(1) == [8]  # of two, the later


def test_the_pipeline_says_the_same(lance: LancePipeline) -> None:
    plain, guessed = (
        lance.ask("What colours are there? Red, red, red?", lookup=n, max_tokens=24) for n in (0, 6)
    )
    assert (plain.text, plain.tokens) == (guessed.text, guessed.tokens)


def test_a_negative_length_is_named() -> None:
    with pytest.raises(InputError, match="lookup must be 0"):
        TextConfig(lookup=-1)


@pytest.mark.parametrize("queries", [2, 64, 65])
def test_a_causal_tail_sees_up_to_itself(queries: int) -> None:
    """Few queries and many go different ways to the same sums."""
    torch.manual_seed(0)
    q, k, v = torch.randn(queries, 4, 8), torch.randn(90, 2, 8), torch.randn(90, 2, 8)
    out = attention(q, k, v, CausalTail())
    for place in (0, queries // 2, queries - 1):
        seen_keys = 90 - queries + place + 1
        score = q[place].view(2, 2, 8) @ k[:seen_keys].permute(1, 2, 0) / 8**0.5
        alone = (score.softmax(-1) @ v[:seen_keys].transpose(0, 1)).view(4, 8)
        torch.testing.assert_close(out[place], alone, atol=1e-6, rtol=0)


def test_causal_tails_of_several_streams() -> None:
    """Two alike and one that is longer and brings more, in one pattern, are what each is by itself."""
    torch.manual_seed(0)
    contexts = [torch.randn(n, 2, 8) for n in (5, 5, 9)]
    caches = [KVCache([[(context, -context)]]) for context in contexts]
    space, counts = Workspace(caches, [4, 4, 4]), [2, 2, 3]
    q, k, v = torch.randn(7, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    owner = torch.arange(3).repeat_interleave(torch.tensor(counts))
    cache, pattern = space.over([0, 1, 2], owner, causal=True)
    found = attention(q, *cache.update(0, k, v), pattern)
    assert isinstance(pattern, Streams) and len(pattern.groups) == 2
    parts = zip(contexts, *(x.split(counts) for x in (q, k, v, found)), strict=True)
    for context, query, key, value, out in parts:
        keys, values = torch.cat([context, key]), torch.cat([-context, value])
        torch.testing.assert_close(out, attention(query, keys, values, CausalTail()), atol=1e-6, rtol=0)
