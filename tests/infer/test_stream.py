"""Ids to text as they come: whole characters, stop strings wherever they are cut, how it ended."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tiny import tokenizer

from openlance.infer.stream import TextStream

END = tokenizer().special.im_end
LETTERS = [tokenizer().encode(character)[0] for character in "abcdefgh"]


def stream(ids: list[int], *stop: str) -> tuple[list[str], TextStream]:
    found = TextStream(ids, tokenizer(), frozenset({END}), stop)
    return list(found), found


def test_joined_is_the_whole_answer() -> None:
    text = "A red circle, naïve 狐狸 🦊 and more."
    pieces, found = stream([*tokenizer().encode(text), END])
    assert "".join(pieces) == text and len(pieces) > 3
    assert all(pieces) and not any("\ufffd" in piece for piece in pieces)
    assert (found.finish, found.tokens) == ("stop", len(tokenizer().encode(text)))


def test_running_out_is_said() -> None:
    pieces, found = stream(LETTERS)
    assert ("".join(pieces), found.finish, found.tokens) == ("abcdefgh", "length", 8)


@pytest.mark.parametrize(
    "stop, expected",
    [
        (("d",), "abc"),
        (("cde",), "ab"),  # cut over three tokens
        (("ef", "cd"), "ab"),  # the one that comes first
        (("defx",), "abcdefgh"),  # begins, but does not come
        (("",), "abcdefgh"),
        (("h",), "abcdefg"),
        (("abcdefgh",), ""),
    ],
)
def test_stop_strings(stop: tuple[str, ...], expected: str) -> None:
    pieces, found = stream(LETTERS, *stop)
    assert "".join(pieces) == expected
    assert found.finish == ("length" if expected == "abcdefgh" else "stop")


def test_what_may_become_a_stop_string_is_held_back() -> None:
    found = iter(TextStream(LETTERS, tokenizer(), frozenset({END}), ("bcx",)))
    assert next(found) == "a"
    assert next(found) == "bcd"  # decided only when x does not come
    assert next(found) == "e"


def test_a_stop_string_begins_again_inside_itself() -> None:
    ids = tokenizer().encode("a") * 3 + tokenizer().encode("b")
    pieces, found = stream(ids, "aab")
    assert ("".join(pieces), found.finish) == ("a", "stop")


def test_nothing_is_drawn_after_the_stop() -> None:
    asked: list[int] = []

    def ids() -> Iterator[int]:
        for token in LETTERS:
            asked.append(token)
            yield token

    assert "".join(TextStream(ids(), tokenizer(), frozenset({END}), ("c",))) == "ab"
    assert asked == LETTERS[:3]


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    half = tokenizer().encode("狐")[:1]
    pieces, _ = stream([*LETTERS[:2], *half])
    assert "".join(pieces) == "ab\ufffd"


def test_control_tokens_are_not_text() -> None:
    start = tokenizer().special.im_start
    pieces, found = stream([LETTERS[0], start, LETTERS[1], END])
    assert ("".join(pieces), found.tokens) == ("ab", 3)
