"""Words on top of contexts, one by one; several answers in one pass, and guesses of each that it checks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from openlance.config import TextConfig
from openlance.infer.context import Context, encode
from openlance.infer.lookup import Lookup
from openlance.model.cache import Workspace
from openlance.model.lance import Lance
from openlance.sequence.pack import PackedBatch, pack
from openlance.sequence.segment import Kind, Role, Sample, Segment


@dataclass(eq=False)
class Voice:
    """An answer that is being spoken. spoken: its ids so far, a stopping one included.

    ended: nothing more is said. Whoever listens may set it, where they have heard enough.
    """

    sample: Sample
    config: TextConfig
    generator: torch.Generator | None = None
    reuse: Context | None = None
    spoken: list[int] = field(default_factory=list)
    ended: bool = False


@dataclass(eq=False)
class Stream:
    """A voice at its place among those that speak together.

    number: in the workspace. begin: position of the answer's first id; known: length of its context. guesses:
    what may follow its next id; lookup: where they are from, if it guesses.
    """

    voice: Voice
    number: int
    begin: int
    known: int
    lookup: Lookup | None
    guesses: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, voice: Voice, context: Context, number: int) -> Stream:
        shown = [token for part in voice.sample if not part.visual for token in part.ids.tolist()]
        lookup = Lookup([*shown, *voice.spoken]) if voice.config.lookup else None
        return cls(voice, number, int(context.positions[-1].max()) + 1, context.cache.length, lookup)

    @property
    def last(self) -> int:
        """Which id of the answer was said last, from 0."""
        return len(self.voice.spoken) - 1

    def guess(self) -> None:
        """Think of what may follow the next id, as far as there is room."""
        if self.lookup is not None:
            config = self.voice.config
            self.guesses = self.lookup.guess(min(config.lookup, config.max_tokens - self.last - 2))

    def say(self, logits: Tensor, stop: Collection[int]) -> None:
        """Draw the next id from logits [allowed]."""
        voice = self.voice
        voice.spoken.append(_choose(logits, voice.spoken, voice.config, voice.generator))
        voice.ended = voice.spoken[-1] in stop or len(voice.spoken) == voice.config.max_tokens
        if self.lookup is not None:
            self.lookup.add(voice.spoken[-1])


@torch.inference_mode()
def speak_together(
    model: Lance, voices: Sequence[Voice], *, allowed: int, stop: Collection[int]
) -> Iterator[list[Voice]]:
    """Continue samples that end in an open assistant turn; yields, id by id, who said one more.

    There is one forward for all that still speak, each over its own cache. It reads the last id of each and,
    where `lookup` is in its settings, guesses of what may follow; as many of them stand as are what would
    have been said. The ids are those of plain decoding, drawn ones too, up to the rounding of sums. allowed:
    ids at or above are never drawn (the vocabulary is padded). stop: ids that end an answer.
    """
    pairs = [(encode(model, voice.sample, reuse=voice.reuse), voice) for voice in voices]
    pairs.sort(key=lambda pair: (pair[0].cache.length, pair[1].config.max_tokens))  # alike side by side
    contexts, voices = zip(*pairs, strict=True)
    space = Workspace([context.cache for context in contexts], [voice.config.max_tokens for voice in voices])
    streams = [Stream.of(voice, context, number) for number, (context, voice) in enumerate(pairs)]
    hidden = torch.stack([context.last_hidden for context in contexts])
    batch: PackedBatch | None = None
    while True:
        yield from _round(streams, model.head(hidden)[:, :allowed].float(), stop)
        streams = [stream for stream in streams if not stream.voice.ended]
        if not streams:
            return
        for stream in streams:
            space.keep(stream.known + stream.last - space.lengths[stream.number], [stream.number])
            stream.guess()
        batch = _words(model, streams, batch)
        owner, causal = torch.arange(len(streams)), batch.tokens > len(streams)
        if causal:
            owner = owner.repeat_interleave(torch.tensor([1 + len(stream.guesses) for stream in streams]))
        cache, pattern = space.over([stream.number for stream in streams], owner, causal=causal)
        hidden = model(batch, cache, pattern=pattern).hidden


def _round(streams: Sequence[Stream], logits: Tensor, stop: Collection[int]) -> Iterator[list[Voice]]:
    """Each says what follows its last id and those of its guesses that turn out right. logits: [n, allowed],
    of the streams' ids one behind the other. Yields who said one more id."""
    begins = accumulate((1 + len(stream.guesses) for stream in streams), initial=0)
    speaking, rows, place = list(zip(streams, begins, strict=False)), logits.unbind(), 0
    while speaking:
        for stream, begin in speaking:
            stream.say(rows[begin + place], stop)
        yield [stream.voice for stream, _ in speaking]
        speaking = [
            (stream, begin)
            for stream, begin in speaking
            if not stream.voice.ended and stream.voice.spoken[-1:] == stream.guesses[place : place + 1]
        ]
        place += 1


def speak(
    model: Lance,
    sample: Sample,
    config: TextConfig,
    *,
    allowed: int,
    stop: Collection[int],
    generator: torch.Generator | None = None,
    reuse: Context | None = None,
) -> Iterator[int]:
    """One answer alone, id by id: see `speak_together`."""
    voice = Voice(sample, config, generator, reuse)
    for _ in speak_together(model, [voice], allowed=allowed, stop=stop):
        yield voice.spoken[-1]


def _words(model: Lance, streams: Sequence[Stream], last: PackedBatch | None) -> PackedBatch:
    """The last id of each voice with its guesses, as a batch. last: the batch before, which is only moved on
    where nobody left or guesses."""
    said = [[stream.voice.spoken[-1], *stream.guesses] for stream in streams]
    ids = torch.tensor([token for tokens in said for token in tokens])
    if last is not None and last.tokens == len(streams) == len(ids):
        return replace(last, text_ids=ids.to(model.device), positions=last.positions + 1)
    lengths = [len(tokens) for tokens in said]
    words = [[Segment(Kind.TEXT, Role.ANSWER, some)] for some in ids.split(lengths)]
    at = [
        [(stream.begin + stream.last + torch.arange(length)).expand(3, -1)]
        for stream, length in zip(streams, lengths, strict=True)
    ]
    return pack(words, model.config, positions=at, dense=False).to(model.device, model.dtype)


def _choose(logits: Tensor, spoken: list[int], config: TextConfig, generator: torch.Generator | None) -> int:
    """One id from logits [allowed]: repetition penalty, then greedy, or temperature, top-k and top-p."""
    if config.repetition_penalty != 1.0 and spoken:
        seen = torch.tensor(sorted(set(spoken)), device=logits.device)
        value = logits[seen]
        factor = config.repetition_penalty
        logits = logits.index_copy(0, seen, torch.where(value > 0, value / factor, value * factor))
    if config.temperature == 0:
        return int(logits.argmax())
    probability, order = (logits / config.temperature).softmax(-1).sort(descending=True)
    if config.top_k:
        probability[config.top_k :] = 0
    before = probability.cumsum(-1) - probability
    probability[before >= config.top_p] = 0
    drawn = torch.multinomial(probability.cpu(), 1, generator=generator)
    return int(order[int(drawn)])
