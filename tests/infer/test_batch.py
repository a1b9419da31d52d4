"""Several requests together: each gives what it gives alone, in one forward a step or word."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CHANNELS, GENERATING, network, noise, question, samples, seen
from torch import Tensor

from openlance.config import SamplingConfig, TextConfig
from openlance.errors import InputError
from openlance.infer.generate import (
    Cancelled,
    Denoising,
    Step,
    Target,
    denoise,
    denoise_together,
)
from openlance.infer.orders import GenerateOrder, together
from openlance.infer.pipeline import LancePipeline
from openlance.infer.result import Answer, Generated
from openlance.infer.speak import Voice, speak, speak_together
from openlance.model.attention import Streams, attention
from openlance.model.cache import KVCache, Workspace
from openlance.sequence.template import Message

ATOL = 1e-5  # float32 over three steps, sums in another order
GUIDED = SamplingConfig(steps=3, shift=2.0, guidance=3.0, guidance_interval=(0.4, 1.0))
SIZE = 320  # of the tokenizer


def targets(*names: str) -> list[Target]:
    """Each with noise of its own."""
    chosen = [samples()[name][:-1] for name in names]
    return [Target(s, noise(*s[-1].grid, CHANNELS, seed=seed)) for seed, s in enumerate(chosen)]


def alone(target: Target, settings: SamplingConfig = GUIDED) -> Tensor:
    return denoise(network(), target.sample, settings, target.noise)


def assert_near(actual: Any, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=0)


@pytest.fixture
def passes() -> Iterator[list[int]]:
    """How many tokens each pass of the network ran."""
    counts: list[int] = []
    hook = network().register_forward_pre_hook(lambda module, given: counts.append(given[0].tokens))
    yield counts
    hook.remove()


@pytest.mark.parametrize(
    "settings",
    [GUIDED, replace(GUIDED, visual_guidance=1.6), replace(GUIDED, guidance=1.0),
     replace(GUIDED, released_cached_sampler=True)],
    ids=["guided", "visual", "plain", "released"],
)  # fmt: skip
def test_every_task_together_is_every_task_alone(settings: SamplingConfig) -> None:
    given = targets(*GENERATING, "t2i")
    found = denoise_together(network(), given, settings)
    assert not torch.equal(found[0], found[-1])  # the same words, other noise
    for target, latents in zip(given, found, strict=True):
        assert_near(latents, alone(target, settings))


def test_one_forward_a_step(passes: list[int]) -> None:
    """Of all branches while guidance acts, then of the conditional ones."""
    given = targets("t2i", "image_edit", "first_and_last")
    denoise_together(network(), given, replace(GUIDED, guidance_interval=(0.9, 1.0)))
    tokens = sum(len(target.segment) for target in given)
    assert passes[-3:] == [2 * tokens, tokens, tokens]


def test_one_attention_call_for_targets_alike() -> None:
    """The same words four times: one call a branch; their context is run once."""
    given = targets("t2i", "t2i", "t2i", "t2i", "t2v")
    with torch.inference_mode():
        work = Denoising(network(), given, GUIDED)
        pattern = work._pass(True).pattern
    assert isinstance(pattern, Streams)
    assert sorted(len(group.queries) for group in pattern.groups) == [1, 1, 4, 4]
    contexts = [b.context for b in work.branches if b.kind == 0 and b.number < 4]
    assert len(contexts) == 4 and all(context is contexts[0] for context in contexts)


def test_one_can_be_cancelled(passes: list[int]) -> None:
    """The others go on without it, to what they are alone."""
    given = targets("t2i", "t2v", "subject")
    reported: list[tuple[int, int]] = []

    def stop_the_second(step: Step) -> bool:
        reported.append((step.order, step.number))
        return (step.order, step.number) != (1, 1)

    found = denoise_together(network(), given, replace(GUIDED, guidance=1.0), stop_the_second)
    assert isinstance(found[1], Cancelled) and str(found[1]) == "stopped after step 1 of 3"
    assert reported == [(0, 1), (1, 1), (2, 1), (0, 2), (2, 2), (0, 3), (2, 3)]
    sizes = [len(target.segment) for target in given]
    assert passes[-3:] == [sum(sizes), sizes[0] + sizes[2], sizes[0] + sizes[2]]
    for index in (0, 2):
        assert_near(found[index], alone(given[index], replace(GUIDED, guidance=1.0)))


def test_when_all_are_cancelled_nothing_more_is_run(passes: list[int]) -> None:
    given = targets("t2i", "t2v")
    found = denoise_together(network(), given, GUIDED, lambda step: False)
    assert all(isinstance(one, Cancelled) for one in found)
    assert passes.count(2 * sum(len(target.segment) for target in given)) == 1


def test_streams_see_their_own_stretch_only() -> None:
    """Attention over a workspace, against each stream by itself; one stream is left out."""
    lengths, new = (3, 3, 5, 3), (2, 2, 2, 1)
    contexts = []
    for seed, length in enumerate(lengths):
        cache = KVCache()
        cache.update(0, noise(length, 2, 8, seed=seed), noise(length, 2, 8, seed=seed + 10))
        contexts.append(cache)
    space = Workspace(contexts, new)
    streams, owner = [0, 1, 3], torch.tensor([0, 1, 2, 0, 1])  # their tokens are not side by side
    q, k, v = (noise(5, heads, 8, seed=20 + heads + side) for side, heads in enumerate((4, 2, 2)))
    view, pattern = space.over(streams, owner)
    out = attention(q, *view.update(0, k, v), pattern)
    for index, stream in enumerate(streams):
        mine = owner == index
        key, value = contexts[stream].prefix(1).update(0, k[mine], v[mine])
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (q[mine], key, value)), enable_gqa=True
        )[0].transpose(0, 1)
        assert_near(out[mine], expected)


ASKED = [
    question(Message("system", ("Be brief.",)), Message("user", (seen((1, 2, 3)), "What colour?"))),
    question(Message("user", ("Hello.",))),
    question(Message("user", ("Hallo.",))),
    question(Message("system", ("Be brief.",)), Message("user", (seen((2, 2, 2), seed=5), "And this one?"))),
]
HOW = [
    TextConfig(max_tokens=9),
    TextConfig(max_tokens=12, temperature=2.0),
    TextConfig(max_tokens=3, temperature=1.0, top_k=50),
    TextConfig(max_tokens=7, temperature=1.5, repetition_penalty=1.3),
]


def test_answers_together_are_the_answers_alone(passes: list[int]) -> None:
    """Id for id, each with its settings and randomness; a round is one forward for those still speaking."""
    seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
    voices = [Voice(*given) for given in zip(ASKED, HOW, seeds, strict=True)]
    rounds = [len(said) for said in speak_together(network(), voices, allowed=SIZE, stop=())]
    assert rounds == [4] * 3 + [3] * 4 + [2] * 2 + [1] * 3
    assert passes[-11:] == rounds[1:]
    for seed, (voice, sample, how) in enumerate(zip(voices, ASKED, HOW, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        assert voice.spoken == list(speak(network(), sample, how, allowed=SIZE, stop=(), generator=generator))


def test_a_voice_leaves_at_an_end_or_when_it_was_heard() -> None:
    voices = [Voice(sample, TextConfig(max_tokens=12)) for sample in ASKED[:2]]
    greedy = [list(speak(network(), v.sample, v.config, allowed=SIZE, stop=())) for v in voices]
    end = greedy[0][3]
    for said in speak_together(network(), voices, allowed=SIZE, stop=(end,)):
        for voice in said:
            voice.ended |= voice is voices[1] and len(voice.spoken) == 2
    assert voices[0].spoken == greedy[0][: greedy[0].index(end) + 1]
    assert voices[1].spoken == greedy[1][:2]


@pytest.fixture
def orders(lance: LancePipeline, picture: Any) -> list[Any]:
    """Of several tasks, sizes and settings, answers between them."""
    order, drawn = lance.order, {"temperature": 1.0, "max_tokens": 8}
    return [
        order.generate_image("a red circle", size=(32, 48), seed=1),
        order.ask("What colour?", picture, seed=1, **drawn),
        order.edit(picture, "make it blue", seed=2),
        order.generate_video("it moves", size=32, frames=9, seed=3, negative_prompt="blue"),
        order.chat([{"role": "user", "content": "Why?"}], seed=2, **drawn),
        order.generate_image("a blue square", size=32, seed=4, steps=3),
    ]


def assert_alike(found: Any, expected: Any) -> None:
    """Text exactly; of pixels one in a hundred may have been rounded to the next level."""
    assert found.settings == expected.settings
    assert found.seconds.keys() == expected.seconds.keys()
    if isinstance(expected, Answer):
        assert (found.text, found.tokens, found.finish) == (expected.text, expected.tokens, expected.finish)
        return
    apart = np.abs(found.frames.astype(int) - expected.frames)
    assert apart.max() <= 1 and (apart > 0).mean() < 0.01
    assert (found.fps, len(found.history)) == (expected.fps, len(expected.history))


def test_run_gives_in_order_what_each_gives_alone(
    lance: LancePipeline, picture: Any, orders: list[Any]
) -> None:
    found = lance.run(orders)
    for order, result in zip(orders, found, strict=True):
        assert_alike(result, lance.run([order])[0])
    assert_alike(found[0], lance.generate_image("a red circle", size=(32, 48), seed=1))
    assert_alike(found[1], lance.ask("What colour?", picture, seed=1, temperature=1.0, max_tokens=8))
    assert_alike(found[2], lance.edit(picture, "make it blue", seed=2))
    assert lance.run([]) == []


def test_the_callback_is_told_the_order(lance: LancePipeline, orders: list[Any]) -> None:
    """And stops that order alone; groups come one after the other, the indices are those of the list."""
    reported: list[tuple[int, int]] = []

    def stop_the_edit(step: Step) -> bool:
        reported.append((step.order, step.number))
        return step.order != 2

    found = dict(lance.run_each(orders, on_step=stop_the_edit))
    assert reported == [(0, 1), (2, 1), (3, 1), (0, 2), (3, 2), (5, 1), (5, 2), (5, 3)]
    assert isinstance(found.pop(2), Cancelled)
    assert {index: type(result) for index, result in found.items()} == {
        0: Generated, 1: Answer, 3: Generated, 4: Answer, 5: Generated,
    }  # fmt: skip


def test_groups_agree_and_have_no_more_tokens_than_allowed(orders: list[Any]) -> None:
    assert together(orders, 10**6) == [[0, 2, 3], [1, 4], [5]]
    tokens = [order.tokens for order in orders]
    assert together(orders, tokens[0] + tokens[3]) == [[0, 3], [1, 4], [2], [5]]
    assert together(orders, 1) == [[index] for index in range(6)]


def test_tokens_of_an_order(lance: LancePipeline) -> None:
    """Its sequence, once for each branch; of an answer, with room for it."""

    def made(**given: Any) -> GenerateOrder:
        return lance.order.generate_image("a red circle", size=32, seed=1, **given)

    length = sum(map(len, made().sample))
    assert [made(**given).tokens for given in ({}, {"guidance": 1.0}, {"visual_guidance": 2.0})] == [
        2 * length, length, 3 * length,
    ]  # fmt: skip
    short, long = (lance.order.ask("Why?", max_tokens=n).tokens for n in (1, 101))
    assert long - short == 100


def test_a_limit_changes_no_result(lance: LancePipeline, orders: list[Any]) -> None:
    for result, expected in zip(lance.run(orders, max_tokens_together=1), lance.run(orders), strict=True):
        assert_alike(result, expected)


def test_what_cannot_be_ordered(lance: LancePipeline) -> None:
    """Orders are checked when they are made, the rest before anything runs."""
    with pytest.raises(InputError, match="the prompt is empty"):
        lance.order.generate_image("")
    with pytest.raises(InputError, match="unknown settings on_step"):
        lance.order.generate_image("a circle", on_step=print)
    with pytest.raises(InputError, match=r"no\.png"):
        lance.order.ask("What?", "no.png")
    with pytest.raises(InputError, match=r"unknown order 'a circle': make it with lance\.order"):
        lance.run(["a circle"])
    with pytest.raises(InputError, match="max_tokens_together must be at least 1, not 0"):
        lance.run([], max_tokens_together=0)


def test_words_are_told_as_they_come(lance: LancePipeline) -> None:
    orders = [lance.order.chat([{"role": "user", "content": text}], seed=1) for text in ("a", "the red")]
    alone = lance.run(orders)
    heard: dict[int, list[str]] = {0: [], 1: []}
    together = lance.run(orders, on_text=lambda order, piece: heard[order].append(piece))
    assert ["".join(pieces) for pieces in heard.values()] == [answer.text for answer in together]
    assert [answer.text for answer in together] == [answer.text for answer in alone]


def test_an_answer_ends_where_its_listener_left(lance: LancePipeline) -> None:
    orders = [lance.order.chat([{"role": "user", "content": "a"}], seed=1, max_tokens=6) for _ in range(2)]
    left, whole = lance.run(orders, on_text=lambda order, _: order == 1)
    assert (left.finish, left.tokens) == ("cancelled", 1)
    assert whole.tokens > 1


def test_an_answer_does_not_wait_for_a_longer_one(lance: LancePipeline) -> None:
    ask = [{"role": "user", "content": "a"}]
    heard: list[int] = []
    orders = [lance.order.chat(ask, seed=1, max_tokens=count) for count in (6, 1)]
    each = lance.run_each(orders, on_text=lambda order, _: heard.append(order))
    assert next(each)[0] == 1 and heard.count(0) <= 1
    assert [index for index, _ in each] == [0] and heard.count(0) > 1


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "1", True])
def test_what_is_no_seed_is_refused(lance: LancePipeline, seed: Any) -> None:
    with pytest.raises(InputError, match="seed"):
        lance.order.generate_image("a", seed=seed)
