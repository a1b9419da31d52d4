"""Orders that ask for words: one answered in pieces as they come, or several together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from openlance.infer.orders import AnswerOrder
from openlance.infer.result import Answer
from openlance.infer.speak import Voice, speak, speak_together
from openlance.infer.stream import TextStream
from openlance.model.lance import Lance
from openlance.tokenizer import Tokenizer

OnText = Callable[[int, str], bool | None]
"""Called with the number of an order and what it says next; returning False ends the answer."""


def stream_answer(model: Lance, tokenizer: Tokenizer, order: AnswerOrder) -> TextStream:
    """What one order says, in pieces."""
    generator, stop = torch.Generator().manual_seed(order.seed), _ends(model)
    ids = speak(model, order.sample, order.text, allowed=tokenizer.size, stop=stop, generator=generator)
    return TextStream(ids, tokenizer, stop, order.text.stop)


def answer_together(
    model: Lance, tokenizer: Tokenizer, orders: Sequence[AnswerOrder], on_text: OnText | None
) -> Iterator[tuple[int, Answer]]:
    """(index, answer), each as it ends."""
    start, ends = time.perf_counter(), _ends(model)
    voices = [Voice(o.sample, o.text, torch.Generator().manual_seed(o.seed)) for o in orders]
    streams = {voice: TextStream((), tokenizer, ends, voice.config.stop) for voice in voices}
    texts, number = dict.fromkeys(voices, ""), {voice: index for index, voice in enumerate(voices)}

    def hear(voice: Voice, piece: str) -> None:
        texts[voice] += piece
        if on_text is not None and on_text(number[voice], piece) is False:
            voice.ended, streams[voice].finish = True, "cancelled"

    for said in speak_together(model, voices, allowed=tokenizer.size, stop=ends):
        for voice in said:
            stream, order = streams[voice], orders[number[voice]]
            hear(voice, stream.push(voice.spoken[-1]))
            voice.ended |= stream.finish == "stop"
            if not voice.ended:
                continue
            if stream.finish != "cancelled" and (rest := stream.rest()):
                hear(voice, rest)
            seconds = {"answer": (time.perf_counter() - start) / len(orders)}
            yield (
                number[voice],
                Answer(texts[voice], stream.tokens, stream.finish, dict(order.record), seconds),
            )


def _ends(model: Lance) -> frozenset[int]:
    """Ids that end an answer."""
    return frozenset({model.config.tokens.im_end, model.config.tokens.endoftext})
