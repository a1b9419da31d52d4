"""Words as they come: ids to text, stop strings, and how the answer ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from openlance.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """Iterate for pieces of text; afterwards `tokens` and `finish` are known. Or `push` ids, one by one.

    finish: "stop" where the model ended or a stop string came, "length" where the ids ran out.
    Text that may turn out to be the beginning of a stop string is held back until that is decided.
    """

    def __init__(
        self, ids: Iterable[int], tokenizer: Tokenizer, ends: frozenset[int], stop: tuple[str, ...] = ()
    ):
        self.tokens = 0
        self.finish = "length"
        self._ids = ids
        self._decoder = StreamDecoder(tokenizer)
        self._ends = ends
        self._stop = tuple(filter(None, stop))
        self._held = ""
        self._cut = False  # a stop string came: what follows is no part of the answer

    def __iter__(self) -> Iterator[str]:
        for token in self._ids:
            if ready := self.push(token):
                yield ready
            if self.finish == "stop":
                break
        if rest := self.rest():
            yield rest

    def push(self, token: int) -> str:
        """The text that is decided with one more id. `finish` is "stop" where nothing comes after it."""
        if token in self._ends:
            self.finish = "stop"
            return ""
        self.tokens += 1
        return self._decide(self._decoder.push(token))

    def rest(self) -> str:
        """What was held back, when no more ids come."""
        piece = "" if self._cut else self._decoder.finish()
        ready = self._decide(piece)
        held, self._held = self._held, ""
        return ready + held

    def _decide(self, piece: str) -> str:
        """Take up a piece; give what can no longer belong to a stop string, or what stands before one."""
        text = self._held + piece
        found = [text.index(word) for word in self._stop if word in text]
        if found:
            self.finish, self._cut, self._held = "stop", True, ""
            return text[: min(found)]
        ready = len(text) - self._undecided(text)
        self._held = text[ready:]
        return text[:ready]

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        lengths = (n for word in self._stop for n in range(1, len(word)) if text.endswith(word[:n]))
        return max(lengths, default=0)
