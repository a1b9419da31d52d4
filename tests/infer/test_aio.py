"""The pipeline in asyncio: a free event loop, requests together, and tasks that can be cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from openlance.errors import InputError
from openlance.infer.aio import AsyncLance
from openlance.infer.generate import Cancelled, Step
from openlance.infer.pipeline import LancePipeline
from openlance.infer.result import Generated

DRAWN = {"max_tokens": 24, "temperature": 1.0, "seed": 4}
SMALL = {"size": 32, "seed": 1}
LONG = 100_000  # steps, or words, that nobody waits for


@pytest.fixture
def passes(lance: LancePipeline) -> Iterator[list[int]]:
    """One entry for each forward of the network."""
    counts: list[int] = []
    hook = lance.model.register_forward_pre_hook(lambda module, given: counts.append(given[0].tokens))
    yield counts
    hook.remove()


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """To its end; what hangs is an error."""
    return asyncio.run(asyncio.wait_for(main, 120))


def near(one: Generated, other: Generated) -> bool:
    """Up to the rounding of sums in float32, which can move a pixel by one."""
    return int(np.abs(one.frames.astype(int) - other.frames).max()) <= 1


def test_every_method_gives_what_the_pipeline_gives(lance: LancePipeline, picture: Any) -> None:
    async def main() -> list[Any]:
        async with AsyncLance(lance) as aio:
            return [
                await aio.generate_image("a red circle", **SMALL),
                await aio.generate_video("it moves", frames=5, **SMALL),
                await aio.animate(picture, "it moves", frames=5, seed=1),
                await aio.edit(picture, "make it blue", seed=1),
                await aio.subject([picture], "again", **SMALL),
                await aio.ask("What colour?", picture, **DRAWN),
                await aio.chat([{"role": "user", "content": "Why?"}], **DRAWN),
            ]

    *made, answer, chat = run(main())
    expected = [
        lance.generate_image("a red circle", **SMALL),
        lance.generate_video("it moves", frames=5, **SMALL),
        lance.animate(picture, "it moves", frames=5, seed=1),
        lance.edit(picture, "make it blue", seed=1),
        lance.subject([picture], "again", **SMALL),
    ]
    for one, other in zip(made, expected, strict=True):
        assert np.array_equal(one.frames, other.frames) and one.settings == other.settings
    assert answer.text == lance.ask("What colour?", picture, **DRAWN).text
    assert chat.text == lance.ask("Why?", **DRAWN).text


def test_the_event_loop_stays_free(lance: LancePipeline) -> None:
    async def main() -> tuple[int, set[int]]:
        ticks, threads = 0, set()

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        async with AsyncLance(lance) as aio:
            ticking = asyncio.create_task(tick())
            await aio.generate_image(
                "a red circle", steps=20, on_step=lambda step: threads.add(threading.get_ident()), **SMALL
            )
            ticking.cancel()
        return ticks, threads

    ticks, threads = run(main())
    assert ticks > 20 and threads == {threading.get_ident()}


def test_those_that_wait_go_together(lance: LancePipeline) -> None:
    """Results that ran together share the time equally, so equal times tell of one batch."""
    prompts = ["a red circle", "a blue square", "a green star"]

    async def main() -> tuple[Generated, list[Generated]]:
        async with AsyncLance(lance) as aio:
            begun = asyncio.Event()
            first = asyncio.create_task(
                aio.generate_image("it moves", steps=50, on_step=lambda step: begun.set(), **SMALL)
            )
            await begun.wait()
            others = await asyncio.gather(*(aio.generate_image(words, **SMALL) for words in prompts))
            return await first, others

    first, others = run(main())
    times = {result.seconds["denoise"] for result in (first, *others)}
    assert len(times) == 2
    for words, found in zip(prompts, others, strict=True):
        assert near(found, lance.generate_image(words, **SMALL))


def test_a_cancelled_task_stops_its_work_alone(lance: LancePipeline, passes: list[int]) -> None:
    async def main() -> tuple[list[int], Generated]:
        told: list[int] = []
        async with AsyncLance(lance) as aio:
            begun = asyncio.Event()

            def on_step(step: Step) -> None:
                told.append(step.number)
                begun.set()

            long = asyncio.create_task(aio.generate_image("it moves", steps=LONG, on_step=on_step, **SMALL))
            other = asyncio.create_task(aio.generate_image("a red circle", **SMALL))
            never = asyncio.create_task(aio.generate_image("never", steps=LONG, **SMALL))
            await begun.wait()
            never.cancel()
            long.cancel()
            found = await other
            heard = len(told)
            for task in (long, never):
                with pytest.raises(asyncio.CancelledError):
                    await task
            again = await aio.generate_image("a red circle", **SMALL)
            assert len(told) == heard and near(again, found)
            return told, found

    told, found = run(main())
    assert told[0] == 1 and near(found, lance.generate_image("a red circle", **SMALL))
    assert len(passes) < LONG


def test_false_from_the_callback_is_cancelled(lance: LancePipeline, passes: list[int]) -> None:
    async def main() -> None:
        async with AsyncLance(lance) as aio:
            await aio.generate_image("it moves", steps=LONG, on_step=lambda step: False, **SMALL)

    with pytest.raises(Cancelled, match=f"after step 1 of {LONG}"):
        run(main())
    assert len(passes) < LONG


def test_words_as_they_come(lance: LancePipeline, picture: Any) -> None:
    async def main() -> tuple[list[str], Any, Any]:
        async with AsyncLance(lance) as aio:
            stream = aio.stream("What colour?", picture, **DRAWN)
            beside = asyncio.create_task(aio.ask("Why?", **DRAWN))
            pieces = [piece async for piece in stream]
            return pieces, stream.answer, await beside

    pieces, answer, beside = run(main())
    whole = lance.ask("What colour?", picture, **DRAWN)
    assert len(pieces) > 1 and all(pieces) and "".join(pieces) == answer.text == whole.text
    assert (answer.tokens, answer.finish) == (whole.tokens, whole.finish)
    assert beside.text == lance.ask("Why?", **DRAWN).text


def test_who_stops_listening_stops_the_work(lance: LancePipeline, passes: list[int]) -> None:
    async def main() -> str:
        async with AsyncLance(lance) as aio:
            stream = aio.stream("Why?", **{**DRAWN, "max_tokens": LONG, "temperature": 5.0})
            pieces: AsyncIterator[str] = aiter(stream)
            async with aclosing(pieces):  # type: ignore[type-var]
                first = await anext(pieces)
            assert stream.answer is None
            await aio.ask("Why?", **DRAWN)  # the thread is free again
            return first

    assert run(main())
    assert len(passes) < LONG


def test_what_is_wrong_with_one_is_told_to_that_one(lance: LancePipeline, picture: Any) -> None:
    async def main() -> list[Any]:
        async with AsyncLance(lance) as aio:
            calls = [
                aio.generate_image("", **SMALL), aio.edit("absent.png", "larger"), aio.ask("Why?", **DRAWN),
                aio.ask("Why?", top_q=1), aio.generate_image("a red circle", **SMALL),
            ]  # fmt: skip
            return await asyncio.gather(*calls, return_exceptions=True)

    empty, absent, answer, setting, made = run(main())
    for error, told in ((empty, "prompt is empty"), (absent, "absent.png"), (setting, "top_q")):
        assert isinstance(error, InputError) and told in str(error)
    assert answer.text == lance.ask("Why?", **DRAWN).text
    assert near(made, lance.generate_image("a red circle", **SMALL))


def test_what_fails_for_all_is_told_to_all(lance: LancePipeline) -> None:
    async def main() -> list[Any]:
        async with AsyncLance(lance, max_tokens_together=0) as aio:
            calls = [aio.ask("Why?"), aio.generate_image("a red circle")]
            return await asyncio.gather(*calls, return_exceptions=True)

    for error in run(main()):
        assert isinstance(error, InputError) and "max_tokens_together" in str(error)


def test_leaving_the_block_ends_everything(lance: LancePipeline, passes: list[int]) -> None:
    async def main() -> None:
        begun = asyncio.Event()
        async with AsyncLance(lance) as aio:
            slow = {"steps": LONG, "on_step": lambda step: begun.set(), **SMALL}
            running = asyncio.create_task(aio.generate_image("it moves", **slow))
            await begun.wait()
            waiting = asyncio.create_task(aio.ask("Why?"))
            await asyncio.sleep(0)
        for task in (running, waiting):
            with pytest.raises(asyncio.CancelledError):
                await task
        with pytest.raises(InputError, match="AsyncLance is not open: use it inside `async with"):
            await aio.ask("Why?")

    before = threading.active_count()
    run(main())
    assert threading.active_count() == before and len(passes) < LONG


def test_it_is_opened_before_use_and_once(lance: LancePipeline) -> None:
    async def main() -> None:
        aio = AsyncLance(lance)
        with pytest.raises(InputError, match="not open"):
            await aio.ask("Why?")
        with pytest.raises(InputError, match="not open"):
            [piece async for piece in aio.stream("Why?")]
        async with aio:
            with pytest.raises(InputError, match="is open already"):
                await aio.__aenter__()
            assert (await aio.ask("Why?", **DRAWN)).text

    run(main())


def test_anything_else_takes_its_turn(lance: LancePipeline) -> None:
    async def main() -> list[Any]:
        talk = lance.conversation()
        async with AsyncLance(lance) as aio:
            return await asyncio.gather(
                aio.call(talk.ask, "Why?", **DRAWN), aio.ask("Why?", **DRAWN), aio.call(threading.get_ident)
            )

    one, other, thread = run(main())
    assert one.text == other.text and thread != threading.get_ident()
