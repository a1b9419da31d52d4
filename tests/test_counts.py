"""Guards against slower code that count what is done, not how long it takes: operations, reads by the host,
bytes.

A count below its limit is welcome: lower the limit to it. One above it is a regression, or a price that is
worth paying: then raise the limit in the change that pays it, and say there what it buys. `pytest -s` prints
the counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import CHANNELS, config, network, noise, question, samples
from torch.utils._python_dispatch import TorchDispatchMode

from openlance.config import SamplingConfig, TextConfig
from openlance.infer.generate import Denoising, Target, denoise_together
from openlance.infer.memory import Peak
from openlance.infer.speak import Voice, speak_together
from openlance.model.lance import Lance
from openlance.sequence.template import Message

# Of the tiny network of two layers, as called under inference mode (views and slices among them).
STEP_LIMITS = {"guided": 300, "plain": 260}
WORD_LIMIT = 199
WORDS_LIMIT = 225  # of three answers in one pass
STEP_BYTES = 36_272

GUIDED = SamplingConfig(steps=4, guidance_interval=(0.0, 1.0))
PLAIN = SamplingConfig(steps=4, guidance=1.0)
ASKED = question(Message("user", ("Hello.",)))


class Count(TorchDispatchMode):
    """Operations by name, while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.found[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))

    @property
    def reads(self) -> int:
        """How often the host waited for a value."""
        return self.found["item"] + self.found["_local_scalar_dense"]


def denoising(sampling: SamplingConfig) -> Denoising:
    sample = samples()["image_edit"][:-1]
    return Denoising(network(), [Target(sample, noise(*sample[-1].grid, CHANNELS))], sampling)


@torch.inference_mode()
def counted_steps(sampling: SamplingConfig) -> list[Count]:
    """Of each step after the first."""
    work, counts = denoising(sampling), []
    work.velocity(work.start, 1.0)
    for t in (0.9, 0.6, 0.3):
        with Count() as count:
            work.velocity(work.start, t)
        counts.append(count)
    return counts


@pytest.mark.parametrize(("name", "sampling"), [("guided", GUIDED), ("plain", PLAIN)])
def test_operations_of_a_denoising_step(name: str, sampling: SamplingConfig) -> None:
    first, *others = counted_steps(sampling)
    print(name, first.found.total(), first.found.most_common(8))
    assert all(count.found == first.found for count in others)
    assert first.found.total() <= STEP_LIMITS[name]
    assert first.reads == 0


@pytest.mark.parametrize("sampling", [GUIDED, PLAIN], ids=["guided", "plain"])
def test_denoising_never_reads_a_value_back(sampling: SamplingConfig) -> None:
    """On the meta device there are none: to read one, or copy it to the host, raises."""
    with torch.device("meta"):
        model = Lance(config(), {"und", "gen"}).eval()
    sample = samples()["t2i"][:-1]
    start = torch.empty(*sample[-1].grid, CHANNELS, device="meta")
    steps: list[int] = []
    denoise_together(model, [Target(sample, start)], sampling, lambda step: steps.append(step.number))
    assert steps == [1, 2, 3, 4]


@torch.inference_mode()
def test_steps_leave_nothing_behind_and_allocate_alike() -> None:
    work, live, most = denoising(GUIDED), [], []
    work.velocity(work.start, 1.0)
    for t in (0.9, 0.6, 0.3):
        with Peak(torch.device("cpu")) as peak:
            work.velocity(work.start, t)
        live.append(peak.live)
        most.append(peak.most)
    print(live, most)
    assert len(set(most)) == 1 and most[0] <= STEP_BYTES
    assert len(set(live)) == 1 and live[0] <= 2 * work.start.numel() * work.start.element_size()


def counted_words(answers: int, lookup: int = 0) -> list[Count]:
    """Of each round after the second (which sets up what the later ones go on from)."""
    voices = [Voice(ASKED, TextConfig(max_tokens=7, lookup=lookup)) for _ in range(answers)]
    rounds, counts = speak_together(network(), voices, allowed=320, stop=()), []
    next(rounds), next(rounds)
    while not all(voice.ended for voice in voices):
        with Count() as count:
            next(rounds)
        counts.append(count)
    return counts


@pytest.mark.parametrize(("answers", "limit"), [(1, WORD_LIMIT), (3, WORDS_LIMIT)])
def test_operations_of_a_word(answers: int, limit: int) -> None:
    first, *others = counted_words(answers)
    print(answers, first.found.total(), first.found.most_common(8))
    assert others and all(count.found == first.found for count in others)
    assert first.found.total() <= limit
    assert first.reads == answers  # the id that was said, and no other


def test_guessed_words_read_no_more() -> None:
    assert all(count.reads == 1 for count in counted_words(1, lookup=3))
