"""Words on top of contexts, one by one; several answers in one pass, or one with guesses checked in one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from openlance.config import TextConfig
from openlance.infer.context import Context, encode
from openlance.infer.lookup import Lookup
from openlance.model.attention import CausalTail
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


@torch.inference_mode()
def speak_together(
    model: Lance, voices: Sequence[Voice], *, allowed: int, stop: Collection[int]
) -> Iterator[list[Voice]]:
    """Continue samples that end in an open assistant turn; yields, round by round, who said one more id.

    A round is one forward for all that still speak, each over its own cache. One that speaks alone and has
    `lookup` in its settings says the ids of several rounds after one forward, where it guessed them. allowed:
    ids at or above are never drawn (the vocabulary is padded). stop: ids that end an answer.
    """
    if len(voices) == 1 and voices[0].config.lookup:
        yield from ([voices[0]] for _ in _speak_ahead(model, voices[0], allowed=allowed, stop=stop))
        return
    pairs = [(encode(model, voice.sample, reuse=voice.reuse), voice) for voice in voices]
    pairs.sort(key=lambda pair: (pair[0].cache.length, pair[1].config.max_tokens))  # alike side by side
    contexts, voices = zip(*pairs, strict=True)
    space = Workspace([context.cache for context in contexts], [voice.config.max_tokens for voice in voices])
    begins = [_end(context) for context in contexts]
    hidden = torch.stack([context.last_hidden for context in contexts])
    speaking = list(range(len(voices)))
    batch: PackedBatch | None = None
    while True:
        logits = model.head(hidden)[:, :allowed].float()
        for stream, row in zip(speaking, logits, strict=True):
            _say(voices[stream], row, stop)
        yield [voices[stream] for stream in speaking]
        speaking = [stream for stream in speaking if not voices[stream].ended]
        if not speaking:
            return
        batch = _words(
            model, [voices[stream] for stream in speaking], [begins[stream] for stream in speaking], batch
        )
        cache, pattern = space.over(speaking, torch.arange(len(speaking)))
        hidden = model(batch, cache, pattern=pattern).hidden
        space.keep(1, speaking)


def _speak_ahead(model: Lance, voice: Voice, *, allowed: int, stop: Collection[int]) -> Iterator[int]:
    """One answer, id by id, with guesses: a forward reads the last id and what may follow it, and as many
    guesses stand as are what would have been said. The ids are those of plain decoding, drawn ones too, up
    to the rounding of sums."""
    context = encode(model, voice.sample, reuse=voice.reuse)
    assert context.last_hidden is not None
    shown = [token for part in voice.sample if not part.visual for token in part.ids.tolist()]
    lookup, most = Lookup([*shown, *voice.spoken]), voice.config.max_tokens
    begin, known = _end(context), context.cache.length
    space, hidden, guesses = context.cache.frozen(most), context.last_hidden[None], list[int]()
    while True:
        for row, guess in zip(model.head(hidden)[:, :allowed].float(), [*guesses, None], strict=True):
            _say(voice, row, stop)
            lookup.add(voice.spoken[-1])
            yield voice.spoken[-1]
            if voice.ended:
                return
            if voice.spoken[-1] != guess:
                break
        last = len(voice.spoken) - 1
        space.keep(known + last - space.length)  # the guesses that were right
        guesses = lookup.guess(min(voice.config.lookup, most - last - 2))
        words = Segment(Kind.TEXT, Role.ANSWER, torch.tensor([voice.spoken[last], *guesses]))
        at = (begin + last + torch.arange(len(words))).expand(3, -1)
        batch = pack([[words]], model.config, positions=[[at]], dense=False).to(model.device, model.dtype)
        hidden = model(batch, space, pattern=CausalTail()).hidden


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


def _end(context: Context) -> int:
    """The position of what follows a context."""
    return int(context.positions[-1].max()) + 1


def _words(model: Lance, voices: list[Voice], begins: list[int], last: PackedBatch | None) -> PackedBatch:
    """The last id of each voice as a batch. begins: position of each answer's first id. last: the batch of
    the round before, which is only moved on where nobody left."""
    ids = torch.tensor([voice.spoken[-1] for voice in voices])
    if last is not None and last.tokens == len(voices):
        return replace(last, text_ids=ids.to(model.device), positions=last.positions + 1)
    words = [[Segment(Kind.TEXT, Role.ANSWER, one)] for one in ids.split(1)]
    at = [
        [torch.full((3, 1), begin + len(voice.spoken) - 1)]
        for begin, voice in zip(begins, voices, strict=True)
    ]
    return pack(words, model.config, positions=at, dense=False).to(model.device, model.dtype)


def _say(voice: Voice, logits: Tensor, stop: Collection[int]) -> None:
    """Draw the next id from logits [allowed]."""
    voice.spoken.append(_choose(logits, voice.spoken, voice.config, voice.generator))
    voice.ended = voice.spoken[-1] in stop or len(voice.spoken) == voice.config.max_tokens


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
