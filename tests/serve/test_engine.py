"""The engine on the nano model: what comes out, what goes together, what is refused, what is stopped."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openlance.config import SamplingConfig
from openlance.data.media import load_image
from openlance.data.save import read_settings
from openlance.infer.pipeline import LancePipeline
from openlance.model.adapters import add_lora, save_adapter
from openlance.serve.batching import choose_batch
from openlance.serve.encode import encode_preview, encode_result
from openlance.serve.engine import Engine, Job
from openlance.serve.jobs import (
    Busy,
    Event,
    JobError,
    Made,
    Outcome,
    Piece,
    Progress,
    Request,
    Spoken,
    Started,
    Why,
)
from openlance.serve.settings import ServeConfig
from openlance.serve.wire import Ended, Failed, FromWorker, Returned, Ticket, Told
from openlance.serve.worker import Worker
from openlance.world import Scene, Thing, render

SHOWN = render(Scene("white", things=(Thing("circle", "red", "large", "top left"),)), 96)
ASKED = [{"type": "image", "image": SHOWN}, {"type": "text", "text": "draw a box around the circle"}]
CHAT = [{"role": "user", "content": ASKED}]  # of many tokens, which nano has learnt to answer


def picture(prompt: str = "a red circle", **arguments: Any) -> Request:
    return Request("generate_image", {"prompt": prompt, "size": 48, "steps": 2, "seed": 1, **arguments})


def chat(**arguments: Any) -> Request:
    return Request("chat", {"messages": CHAT, "seed": 1, **arguments}, streamed=True)


@pytest.fixture(scope="module")
def lance() -> LancePipeline:
    return LancePipeline.from_pretrained("nano", device="cpu")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes what is made."""
    folder = tmp_path_factory.mktemp("adapter")
    model = LancePipeline.from_pretrained("nano", device="cpu").model
    add_lora(model, ["gen"], rank=2)
    rng = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=rng)
    save_adapter(model, folder)
    return folder


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engine(loop: asyncio.Runner, adapter: Path) -> Iterator[Engine]:
    engine = Engine(ServeConfig(devices=("cpu",), queue=3, adapters={"loud": str(adapter)}))
    loop.run(engine.start())
    yield engine
    loop.run(engine.stop())


async def follow(engine: Engine, request: Request) -> tuple[Job, list[Event], Outcome]:
    job = engine.submit(request)
    assert job.state == "waiting"
    events = [event async for event in job.events()]
    return job, events, await job.result()


async def outcomes(engine: Engine, *requests: Request) -> list[Outcome]:
    """Of requests that are submitted in one go."""
    jobs = [engine.submit(request) for request in requests]
    return [await job.result() for job in jobs]


async def begun(job: Job) -> None:
    """Until it has taken a step."""
    async for event in job.events():
        if isinstance(event, Progress):
            return


async def failure(job: Job) -> JobError:
    with pytest.raises(JobError) as error:
        await job.result()
    assert job.state == "failed" and job.ended is not None
    return error.value


# -- what comes out --------------------------------------------------------------------------------------


def test_it_says_what_it_serves(engine: Engine, lance: LancePipeline) -> None:
    assert engine.ready and engine.model.name == "nano" and engine.model.adapters == ("loud",)
    assert engine.model.config == lance.config and len(engine.model.tasks) == 10
    [worker] = engine.workers
    assert worker.alive and worker.device == "cpu" and worker.memory_bytes > 100 * 2**20


def test_a_picture_is_the_pipeline_s_own(loop: asyncio.Runner, engine: Engine, lance: LancePipeline) -> None:
    job, events, found = loop.run(follow(engine, picture(steps=3)))
    expected = lance.generate_image("a red circle", size=48, steps=3, seed=1)
    assert isinstance(found, Made) and found.media == encode_result(expected, None).media
    assert (found.media_type, found.size, found.frames, found.fps) == ("image/png", (48, 48), 1, None)
    assert found.settings == expected.settings
    assert read_settings(found.media) == json.loads(json.dumps(found.settings))
    assert events == [Started(), *(Progress(number, 3) for number in (1, 2, 3))]
    assert job.state == "done" and job.progress == Progress(3, 3)
    assert job.started is not None and job.ended is not None and job.created <= job.started <= job.ended


def test_clips_and_media_that_are_sent(loop: asyncio.Runner, engine: Engine, lance: LancePipeline) -> None:
    """Two jobs that go after each other: another method, another media type."""
    source = BytesIO()
    Image.new("RGB", (48, 48), "orange").save(source, "PNG")
    film = Request("generate_video", {"prompt": "it moves", "size": 32, "frames": 5, "steps": 2, "seed": 1})
    edit = {"source": source.getvalue(), "prompt": "make it blue", "steps": 2, "seed": 1}
    clip, edited = loop.run(
        outcomes(
            engine, replace(film, media_type="image/gif"), Request("edit", edit, media_type="image/jpeg")
        )
    )
    expected = lance.generate_video("it moves", size=32, frames=5, steps=2, seed=1)
    assert isinstance(clip, Made) and clip.media == encode_result(expected, "image/gif").media
    assert (clip.media_type, clip.frames, clip.fps) == ("image/gif", 5, expected.fps)
    assert isinstance(edited, Made)
    assert edited.media == encode_result(lance.edit(**edit), "image/jpeg").media


def test_words_come_in_pieces(loop: asyncio.Runner, engine: Engine, lance: LancePipeline) -> None:
    _, events, found = loop.run(follow(engine, chat()))
    expected = lance.chat(CHAT, seed=1)
    assert isinstance(found, Spoken)
    assert (found.text, found.tokens, found.finish) == (expected.text, expected.tokens, "stop")
    assert found.prompt_tokens == sum(map(len, lance.order.chat(CHAT).sample))
    pieces = [event.text for event in events if isinstance(event, Piece)]
    assert len(pieces) > 2 and "".join(pieces) == found.text


def test_words_come_at_once_where_nobody_asked_for_pieces(loop: asyncio.Runner, engine: Engine) -> None:
    _, events, found = loop.run(follow(engine, replace(chat(max_tokens=2), streamed=False)))
    assert events == [Started()]
    assert isinstance(found, Spoken) and (found.tokens, found.finish) == (2, "length")


def test_previews_show_where_it_leads(loop: asyncio.Runner, engine: Engine, lance: LancePipeline) -> None:
    """The picture that a straight path from here would end in; none after the last step, or where unasked."""
    leads: dict[int, bytes] = {}
    assert lance.vae is not None

    def on_step(step: Any) -> None:
        leads[step.number] = encode_preview(step.clean, lance.vae)

    result = lance.generate_image("a red circle", size=48, steps=5, seed=1, on_step=on_step)
    _, events, _ = loop.run(follow(engine, replace(picture(steps=5), preview_every=2)))
    shown = {event.step: event.preview for event in events if isinstance(event, Progress)}
    assert shown == {1: None, 2: leads[2], 3: None, 4: leads[4], 5: None}
    pictures = {step: np.asarray(load_image(data), np.float32) for step, data in leads.items()}
    assert np.array_equal(pictures[5], result.frames[0])
    far = [np.abs(pictures[step] - result.frames[0]).mean() for step in (1, 4)]
    assert far[1] < far[0]


def test_an_adapter_acts_where_it_is_asked_for(
    loop: asyncio.Runner, engine: Engine, lance: LancePipeline, adapter: Path
) -> None:
    asked = replace(picture(), adapter="loud")
    before, with_it, after = loop.run(outcomes(engine, picture(), asked, picture()))
    plain = encode_result(lance.generate_image("a red circle", size=48, steps=2, seed=1), None)
    lance.load_adapter(adapter, "loud")
    loud = encode_result(lance.generate_image("a red circle", size=48, steps=2, seed=1), None)
    lance.unload_adapters()
    assert isinstance(before, Made) and isinstance(with_it, Made) and isinstance(after, Made)
    assert with_it.media == loud.media != plain.media
    for found in (before, after):  # they ran together: rounding
        assert _difference(found.media, plain.media) <= 1


def _difference(one: bytes, other: bytes) -> int:
    """The most by which a pixel's value differs."""
    left, right = (np.asarray(load_image(data), np.int16) for data in (one, other))
    return int(np.abs(left - right).max())


# -- what goes together ----------------------------------------------------------------------------------


def test_alike_jobs_take_their_steps_together(
    loop: asyncio.Runner, engine: Engine, lance: LancePipeline
) -> None:
    """And give what each gives alone; the one that is sampled otherwise comes after them."""
    requests = [picture(seed=1), picture("a blue star", seed=2), picture(steps=3)]

    async def all_of_them() -> tuple[list[tuple[int, int]], list[Outcome]]:
        jobs, steps = [engine.submit(request) for request in requests], []

        async def watch(index: int) -> None:
            async for event in jobs[index].events():
                if isinstance(event, Progress):
                    steps.append((index, event.step))

        await asyncio.gather(*map(watch, range(3)))
        return steps, [await job.result() for job in jobs]

    steps, found = loop.run(all_of_them())
    assert steps == [(0, 1), (1, 1), (0, 2), (1, 2), (2, 1), (2, 2), (2, 3)]
    for request, outcome in zip(requests, found, strict=True):
        alone = encode_result(lance.generate_image(**request.arguments), None)
        assert isinstance(outcome, Made) and _difference(outcome.media, alone.media) <= 1


def test_which_jobs_go_together() -> None:
    """The oldest decides. Answers go together; otherwise method, kind, sampling and adapter must agree."""
    default = SamplingConfig(steps=2)
    still, clip = picture(), Request("generate_video", {"prompt": "it moves", "steps": 2})
    implied = Request("generate_image", {"prompt": "a star"})
    styled, edit = replace(still, adapter="loud"), Request("edit", {"source": b"", "prompt": "", "steps": 2})
    other = replace(chat(temperature=1.0, max_tokens=3), streamed=False)
    subject = Request("subject", {"references": [b""], "prompt": "both", "steps": 2})
    filmed = replace(subject, arguments={**subject.arguments, "video": True})
    waiting = [still, clip, chat(), implied, styled, picture(steps=3), edit, other, subject, filmed, still]
    assert choose_batch(waiting, 8, default) == [0, 3, 10]
    assert choose_batch(waiting, 2, default) == [0, 3]
    assert choose_batch(waiting[2:], 8, default) == [0, 5]
    for alone in (1, 4, 5, 6, 8):
        assert choose_batch(waiting[alone:], 8, default) == [0]


# -- what is refused -------------------------------------------------------------------------------------


def test_one_that_cannot_be_done_leaves_the_others_alone(loop: asyncio.Runner, engine: Engine) -> None:
    async def three() -> tuple[Outcome, JobError, Outcome]:
        jobs = [engine.submit(picture(prompt)) for prompt in ("a star", " ", "a circle")]
        return await jobs[0].result(), await failure(jobs[1]), await jobs[2].result()

    first, error, last = loop.run(three())
    assert isinstance(first, Made) and isinstance(last, Made)
    assert error.why is Why.REFUSED and str(error) == "the prompt is empty: say what you want"


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request("merge_adapters", {}), "unknown method 'merge_adapters'"),
        (Request("edit", {"prompt": "make it blue"}), "missing a required argument: 'source'"),
        (picture(colour="red"), "unknown settings colour"),
        (replace(picture(), media_type="video/mp4"), "a picture cannot be encoded as video/mp4"),
        (replace(picture(), adapter="quiet"), "no adapter quiet; the model has loud"),
        (Request("edit", {"source": b"no picture", "prompt": "x"}), "the given bytes"),
    ],
)
def test_what_is_refused(loop: asyncio.Runner, engine: Engine, request_: Request, words: str) -> None:
    async def one() -> JobError:
        return await failure(engine.submit(request_))

    error = loop.run(one())
    assert error.why is Why.REFUSED and words in str(error)


def test_a_full_queue(loop: asyncio.Runner, engine: Engine) -> None:
    """The one that runs does not count; there is room again once one has left."""

    async def crowd() -> None:
        running = engine.submit(picture(steps=200))
        await begun(running)
        waiting = [engine.submit(picture()) for _ in range(3)]
        assert (engine.running, engine.waiting) == (1, 3)
        with pytest.raises(Busy) as busy:
            engine.submit(picture())
        assert busy.value.retry_after >= 1
        waiting[1].cancel()
        waiting.append(engine.submit(picture()))
        running.cancel()
        assert all([isinstance(await waiting[index].result(), Made) for index in (0, 2, 3)])
        assert (engine.running, engine.waiting) == (0, 0)

    loop.run(crowd())


# -- what is stopped -------------------------------------------------------------------------------------


def test_cancelling_a_job_that_waits_ends_it_at_once(loop: asyncio.Runner, engine: Engine) -> None:
    async def one() -> JobError:
        job = engine.submit(picture())
        before = job.events()
        job.cancel()
        assert job.state == "failed" and job.started is None and engine.waiting == 0
        assert [event async for event in before] == [event async for event in job.events()] == []
        return await failure(job)

    assert loop.run(one()).why is Why.CANCELLED


def test_cancelling_a_job_that_runs(loop: asyncio.Runner, engine: Engine) -> None:
    """It ends after the next step; one that runs with it goes on; done jobs take no harm."""

    async def two() -> tuple[Job, JobError, Job]:
        stopped, other = (engine.submit(picture(steps=30, seed=seed)) for seed in (1, 2))
        await begun(stopped)
        stopped.cancel()
        error = await failure(stopped)
        assert other.state == "running"
        await other.result()
        other.cancel()
        return stopped, error, other

    stopped, error, other = loop.run(two())
    assert error.why is Why.CANCELLED
    assert stopped.progress is not None and stopped.progress.step < 30
    assert other.progress == Progress(30, 30) and other.state == "done"


def test_cancelling_an_answer(loop: asyncio.Runner, engine: Engine) -> None:
    async def one() -> tuple[JobError, list[Event]]:
        events = []
        job = engine.submit(chat(max_tokens=2000, repetition_penalty=1.0, temperature=5.0))
        async for event in job.events():
            events.append(event)
            if isinstance(event, Piece):
                job.cancel()
        return await failure(job), events

    error, events = loop.run(one())
    assert error.why is Why.CANCELLED and 2 <= len(events) < 500


def test_a_job_has_its_time(loop: asyncio.Runner, engine: Engine) -> None:
    async def one() -> JobError:
        return await failure(engine.submit(picture(steps=200), time_limit=0.3))

    error = loop.run(one())
    assert error.why is Why.TIMED_OUT and str(error) == "it took more than 0.3 seconds"
    assert engine.workers[0].restarts == 0


# -- a worker alone --------------------------------------------------------------------------------------


def answered(worker_config: ServeConfig, lance: LancePipeline, *requests: Request) -> list[FromWorker]:
    """What a worker says to a batch, its news left out."""
    posted: list[FromWorker] = []
    worker = Worker(lance, worker_config, None, posted.append, set())
    worker.do([Ticket(str(number), request) for number, request in enumerate(requests)])
    return [message for message in posted if not isinstance(message, Told)]


def test_what_has_no_room_goes_back(lance: LancePipeline) -> None:
    """All that follows too, so that nobody overtakes; one that is too large by itself runs alone."""
    alone = lance.order.generate_image("a red circle", size=48, steps=2).tokens
    requests = [picture(), picture(), picture(size=32), picture()]
    for room, done in ((2 * alone, 2), (1, 1)):
        said = answered(ServeConfig(tokens_together=room), lance, *requests)
        assert {message.id for message in said if isinstance(message, Ended)} == set(map(str, range(done)))
        assert [message.id for message in said if isinstance(message, Returned)] == [
            str(number) for number in range(done, 4)
        ]


def test_too_little_memory_for_all_together(lance: LancePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then they run one by one, and only what has not enough memory alone fails."""
    real = lance.vae.stream

    def stream(latents: torch.Tensor) -> Iterator[torch.Tensor]:
        if latents.shape[2:4] == (4, 4):
            torch.empty(10**15)
        return real(latents)

    monkeypatch.setattr(lance.vae, "stream", stream)
    said = answered(ServeConfig(), lance, picture(), picture(size=64), picture())
    assert [type(message) for message in said] == [Ended, Failed, Ended]
    [failed] = [message for message in said if isinstance(message, Failed)]
    assert (failed.id, failed.why) == ("1", Why.FAILED) and "not enough memory" in failed.message
