"""What a chat completion gives: one JSON object, or chunks as they come."""

from __future__ import annotations

import json
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from fastapi import Request as HTTPRequest
from pydantic import BaseModel, ConfigDict

from openlance.serve.chat_request import ChatRequest
from openlance.serve.engine import Job
from openlance.serve.errors import as_api_error, error_body
from openlance.serve.jobs import Event, JobError, Made, Outcome, Piece, Progress, Spoken, Started
from openlance.serve.work import EventStream, cancel, happenings, while_listening

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
}
DONE = "data: [DONE]\n\n"

Told = tuple[int, Event | Outcome]


class MadeAddress(BaseModel):
    url: str


class MadeImage(BaseModel):
    type: Literal["image_url"]
    image_url: MadeAddress


class AnswerMessage(BaseModel):
    """images: what was drawn, as data:image/png;base64,… addresses; the settings stand in each file."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    images: list[MadeImage] | None = None


class Choice(BaseModel):
    """settings: what is needed to have the same again, the seed among it."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None
    settings: dict[str, Any]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """usage is of words; it is absent where a picture was made."""

    model_config = ConfigDict(title="ChatCompletion")

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


def completion(asked: ChatRequest, jobs: Sequence[Job], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """A `Completion` of what came of the jobs."""
    choices = [
        {
            "index": number,
            "message": {"role": "assistant", "refusal": None, **_said(outcome)},
            "finish_reason": _finish(outcome),
            "logprobs": None,
            "settings": dict(outcome.settings),
        }
        for number, outcome in enumerate(outcomes)
    ]
    whole = {**_head(asked, jobs, "chat.completion"), "choices": choices}
    usage = _usage(outcomes)
    return whole if usage is None else {**whole, "usage": usage}


async def stream(request: HTTPRequest, asked: ChatRequest, jobs: Sequence[Job]) -> EventStream:
    """Chunks as they come. Raises JobError for what fails before there is anything to send: it can then still
    have a status of its own.
    """
    told = happenings([(job, job.events()) for job in jobs])
    try:
        first = await while_listening(request, _first(told))
    except JobError:
        cancel(jobs)
        raise
    return EventStream(_chunks(asked, jobs, first, told), jobs)


async def _first(told: AsyncIterator[Told]) -> Told:
    """The first that is worth telling, or shows that the request can be done."""
    async for number, event in told:
        if not isinstance(event, Started):
            return number, event
    raise AssertionError("each job ends with an outcome")


async def _chunks(
    asked: ChatRequest, jobs: Sequence[Job], first: Told, told: AsyncIterator[Told]
) -> AsyncIterator[str]:
    counts = bool(asked.stream_options and asked.stream_options.include_usage)
    head = _head(asked, jobs, "chat.completion.chunk") | ({"usage": None} if counts else {})
    outcomes: list[Outcome] = []

    def chunk(number: int, delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": number, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _event({**head, "choices": [choice]})

    for number in range(len(jobs)):
        yield chunk(number, {"role": "assistant", "content": ""})
    try:
        async for number, event in _again(first, told):
            if isinstance(event, Piece):
                yield chunk(number, {"content": event.text})
            elif isinstance(event, Progress):
                yield f": step {event.step} of {event.total}\n\n"  # a comment, which keeps proxies awake
            elif isinstance(event, Made):
                yield chunk(number, {"images": _said(event)["images"]})
            if isinstance(event, Outcome):
                outcomes.append(event)
                yield chunk(number, {}, _finish(event))
    except JobError as error:
        told_error = as_api_error(error)
        yield _event(error_body(told_error.status_code, told_error.detail))
        return
    if counts:
        yield _event({**head, "choices": [], "usage": _usage(outcomes)})
    yield DONE


async def _again(first: Told, told: AsyncIterator[Told]) -> AsyncIterator[Told]:
    yield first
    async for each in told:
        yield each


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _head(asked: ChatRequest, jobs: Sequence[Job], kind: str) -> dict[str, Any]:
    number, created = f"chatcmpl-{jobs[0].id}", int(time.time())
    return {"id": number, "object": kind, "created": created, "model": asked.model}


def _said(outcome: Outcome) -> dict[str, Any]:
    """The part of a message that holds what was said or made."""
    if isinstance(outcome, Spoken):
        return {"content": outcome.text}
    address = f"data:{outcome.media_type};base64,{b64encode(outcome.media).decode()}"
    return {"content": None, "images": [{"type": "image_url", "image_url": {"url": address}}]}


def _finish(outcome: Outcome) -> str:
    return outcome.finish if isinstance(outcome, Spoken) else "stop"


def _usage(outcomes: Sequence[Outcome]) -> dict[str, int] | None:
    """What was read, once, and all that was said; None where nothing was said."""
    spoken = [outcome for outcome in outcomes if isinstance(outcome, Spoken)]
    if not spoken:
        return None
    read, said = spoken[0].prompt_tokens, sum(outcome.tokens for outcome in spoken)
    return {"prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said}
