"""Words a second: plain, with words guessed ahead, and several answers at once, against the plainest way.

    python benchmarks/text.py --threads 1                             # nano, on what there is
    python benchmarks/text.py --model ./Lance --device cuda

The plainest way runs the whole sequence anew for each word. All ways take turns in one process, after a first
turn that does not count; times are medians of processor time on the CPU (which other work on the machine
bends less) and of wall time elsewhere. What counts is the ratio. "words a pass" says how many ids a forward
gave: it depends on what is said, and not on the machine. All ways say the same words; the script checks it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import about, describe, options, read, write

from openlance import LancePipeline
from openlance.infer.bench import now
from openlance.infer.orders import AnswerOrder
from openlance.infer.speak import Voice, speak_together
from openlance.sequence.pack import pack
from openlance.sequence.segment import Kind, Role, Segment

QUESTIONS = {
    "chat": "Tell me about circles and squares.",
    "repeats": "Say it ten times: a red circle, a blue square, a red circle, a blue square, a red circle,",
}
LOOKUPS = (0, 2, 4, 8)
TOGETHER = 4
Words = list[list[int]]


class Text:
    """One question, and the ways to answer it; each gives the ids of its answers."""

    def __init__(self, lance: LancePipeline, question: str, words: int):
        self.lance, self.words = lance, words
        order = lance.order.ask(question, max_tokens=words)
        assert isinstance(order, AnswerOrder)
        self.order, self.passes = order, 0
        lance.model.register_forward_pre_hook(self._count)

    def plainest(self) -> Words:
        """The whole sequence for each word."""
        model, said = self.lance.model, list[int]()
        with torch.inference_mode():
            for _ in range(self.words):
                own = [Segment(Kind.TEXT, Role.ANSWER, torch.tensor(said))] if said else []
                batch = pack([[*self.order.sample, *own]], model.config).to(model.device, model.dtype)
                logits = model.head(model(batch).hidden[-1])[: self.lance.tokenizer.size].float()
                said.append(int(logits.argmax()))
        return [said]

    def spoken(self, lookup: int = 0, answers: int = 1) -> Words:
        """With the cache; one answer or several, with guesses or without."""
        config = self.lance.order.ask("?", max_tokens=self.words, lookup=lookup).text
        voices = [Voice(self.order.sample, config) for _ in range(answers)]
        for _ in speak_together(self.lance.model, voices, allowed=self.lance.tokenizer.size, stop=()):
            pass
        return [voice.spoken for voice in voices]

    def _count(self, *_: Any) -> None:
        self.passes += 1


def measure(text: Text, repeats: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """A row for each way, the first being the plainest."""
    ways: dict[str, Callable[[], Words]] = {"whole sequence each word": text.plainest}
    for lookup in LOOKUPS:
        ways[f"cache, lookup {lookup}"] = lambda lookup=lookup: text.spoken(lookup)
    for lookup in LOOKUPS:
        ways[f"cache, {TOGETHER} answers at once, lookup {lookup}"] = lambda lookup=lookup: text.spoken(
            lookup, TOGETHER
        )
    times: dict[str, list[float]] = {name: [] for name in ways}
    count: dict[str, tuple[int, int]] = {}
    for turn in range(repeats + 1):
        for name, run in ways.items():
            text.passes, start = 0, clock()
            said = run()
            if turn:
                times[name].append(clock() - start)
            count[name] = sum(map(len, said)), text.passes
            if turn == 0 and name == "whole sequence each word":
                expected = said[0]
            assert all(ids == expected for ids in said), f"{name}: other words"
    seconds = {name: statistics.median(found) / count[name][0] for name, found in times.items()}
    first = seconds["whole sequence each word"]
    return [
        {
            "way": name,
            "words/s": 1 / seconds[name],
            "ratio": first / seconds[name],
            "words a pass": count[name][0] / count[name][1],
        }
        for name in ways
    ]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--words", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = read(parser)
    lance = LancePipeline.from_pretrained(args.model, device=args.device)
    device = lance.model.device
    clock = time.process_time if device.type == "cpu" else lambda: now(device)
    machine = about(device)
    print(f"{lance.config.name}, {args.words} words; {describe(machine)}\n")
    print("| what is said | how | words/s | ratio | words a pass |\n|---|---|---:|---:|---:|")
    results = {}
    for name, question in QUESTIONS.items():
        results[name] = measure(Text(lance, question, args.words), args.repeats, clock)
        for row in results[name]:
            numbers = f"{row['words/s']:.1f} | {row['ratio']:.2f} | {row['words a pass']:.2f}"
            print(f"| {name} | {row['way']} | {numbers} |", flush=True)
    write(args.out, {"words": args.words, "machine": machine, "results": results})


if __name__ == "__main__":
    main()
