"""Words as they come: ids to text, stop strings, and how the answer ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from openlance.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """Iterate for pieces of text; afterwards `tokens` and `finish` are known.

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

    def __iter__(self) -> Iterator[str]:
        held = ""
        for piece in self._pieces():
            held += piece
            found = [held.index(word) for word in self._stop if word in held]
            if found:
                self.finish = "stop"
                held = held[: min(found)]
                break
            ready = len(held) - self._undecided(held)
            if ready:
                yield held[:ready]
                held = held[ready:]
        if held:
            yield held

    def _pieces(self) -> Iterator[str]:
        for token in self._ids:
            if token in self._ends:
                self.finish = "stop"
                break
            self.tokens += 1
            yield self._decoder.push(token)
        yield self._decoder.finish()

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        lengths = (n for word in self._stop for n in range(1, len(word)) if text.endswith(word[:n]))
        return max(lengths, default=0)
