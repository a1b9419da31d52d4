"""Chat completions with OpenAI's own client, against a server that runs."""

from __future__ import annotations

import asyncio
import json
import time
from base64 import b64decode
from collections.abc import Callable
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from serving import Server, address_of, gif, png

from openlance.data.save import read_settings
from openlance.infer.pipeline import LancePipeline

SERVE = {"max_steps": 400, "max_pictures": 3, "max_text": 2_000, "queue": 4}
PATH = "/v1/chat/completions"
QUESTION = "what is in the picture?"
LEVELS = 1  # of 255: this process may have more threads, whose sums are rounded otherwise
RED = "a large red circle on white"


def user(*content: Any) -> dict[str, Any]:
    """A turn: texts, and pictures as bytes."""
    if len(content) == 1 and isinstance(content[0], str):
        return {"role": "user", "content": content[0]}
    parts = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": address_of(part)}}
        for part in content
    ]
    return {"role": "user", "content": parts}


def ask(server: Server, *content: Any, **options: Any) -> Any:
    given: dict[str, Any] = {"model": "nano", "messages": [user(*content)]} | options
    return server.openai().chat.completions.create(**given)


def draw(server: Server, *content: Any, **settings: Any) -> Any:
    return ask(server, *content, modalities=["text", "image"], extra_body={"steps": 2, "seed": 5} | settings)


def image_of(answer: Any) -> bytes:
    [image] = answer.choices[0].message.images
    address = image["image_url"]["url"]
    assert address.startswith("data:image/png;base64,")
    return b64decode(address.partition(",")[2])


def post(server: Server, **body: Any) -> httpx.Response:
    with server.http() as http:
        data = json.dumps({"model": "nano", "messages": [user("hi")]} | body)
        return http.post(PATH, content=data, headers={"Content-Type": "application/json"})


def settles(check: Callable[[], bool], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not check() and time.monotonic() < end:
        time.sleep(0.1)
    return check()


# -- words ---------------------------------------------------------------------------------------------


def test_an_answer_is_the_pipelines_own(server: Server) -> None:
    lance = LancePipeline.from_pretrained("nano", device="cpu")
    shown = lance.generate_image(RED, seed=1, steps=8)
    buffer = BytesIO()
    shown.image.save(buffer, "PNG")
    expected = lance.ask(QUESTION, shown)
    answer = ask(server, buffer.getvalue(), QUESTION)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert (choice.finish_reason, answer.model, answer.object) == ("stop", "nano", "chat.completion")
    assert answer.usage.completion_tokens == expected.tokens
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + expected.tokens


def test_guessed_words_are_the_same_words(server: Server) -> None:
    options: dict[str, Any] = {"n": 3, "temperature": 1.0, "seed": 3, "max_tokens": 24}
    plain, guessed = (
        ask(server, "say red, red, red", **options, extra_body=body) for body in ({}, {"lookup": 4})
    )
    assert [one.message.content for one in guessed.choices] == [one.message.content for one in plain.choices]


def test_a_stream_is_the_answer_in_pieces(server: Server) -> None:
    options: dict[str, Any] = {"n": 2, "temperature": 1.5, "seed": 3, "max_tokens": 12}
    whole = ask(server, QUESTION, **options)
    chunks = list(ask(server, QUESTION, **options, stream=True, stream_options={"include_usage": True}))
    said = ["", ""]
    ends = {}
    for chunk in chunks[:-1]:
        [choice] = chunk.choices
        said[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert said == [choice.message.content for choice in whole.choices]
    assert [ends[0], ends[1]] == [choice.finish_reason for choice in whole.choices]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert said[0] != said[1], "seeds count up"


def test_stop_and_limit(server: Server) -> None:
    whole = ask(server, QUESTION).choices[0].message.content
    stop = whole[2:4]
    cut = ask(server, QUESTION, stop=stop).choices[0]
    assert (cut.message.content, cut.finish_reason) == (whole.partition(stop)[0], "stop")
    for name in ("max_tokens", "max_completion_tokens"):
        short = ask(server, QUESTION, **{name: 1})
        assert (short.usage.completion_tokens, short.choices[0].finish_reason) == (1, "length")


def test_turns_and_clips(server: Server) -> None:
    clip = {"type": "video_url", "video_url": {"url": address_of(gif(), "image/gif")}}
    messages = [
        {"role": "developer", "content": "Look closely."},
        {"role": "user", "content": [clip, {"type": "text", "text": "what moves?"}]},
        {"role": "assistant", "content": "nothing"},
        {"role": "user", "content": "are you sure?"},
    ]
    answer = ask(server, messages=messages, max_tokens=4)
    assert answer.choices[0].message.content


def test_what_a_client_got_can_be_sent_back(server: Server) -> None:
    drawn = draw(server, RED).choices[0].message
    messages = [user(RED), drawn.model_dump(), user("what colour is it?")]
    assert ask(server, messages=messages, max_tokens=4).choices[0].message.content


def test_fields_that_ask_for_nothing(server: Server) -> None:
    neutral: dict[str, Any] = {
        "user": "me", "metadata": {"a": "b"}, "n": 1, "stream": False, "store": False, "logprobs": False,
        "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "tools": [], "tool_choice": "none",
        "response_format": {"type": "text"}, "service_tier": "auto", "modalities": ["text"], "stop": None,
    }  # fmt: skip
    answer = post(server, **neutral, max_tokens=2)
    assert answer.status_code == 200, answer.text


# -- pictures ------------------------------------------------------------------------------------------


def test_a_picture_is_the_pipelines_own(server: Server) -> None:
    answer = draw(server, RED, size="64x32")
    data = image_of(answer)
    settings = read_settings(data)
    lance = LancePipeline.from_pretrained("nano", device="cpu")
    expected = lance.generate_image(RED, size=(32, 64), steps=2, seed=5)
    made = Image.open(BytesIO(data))
    assert made.size == (64, 32)
    assert np.abs(expected.frames[0].astype(int) - np.asarray(made)).max() <= LEVELS
    assert (settings["task"], settings["prompt"], settings["seed"]) == ("t2i", RED, 5)
    assert answer.choices[0].message.content is None and answer.usage is None


def test_one_picture_is_edited_and_several_are_subjects(server: Server) -> None:
    edited = read_settings(image_of(draw(server, png(), "make it blue")))
    assert (edited["task"], edited["prompt"]) == ("image_edit", "make it blue")
    drawn = read_settings(image_of(draw(server, png(), png(seed=1), "both of them")))
    assert drawn["task"] == "subject_image"


def test_pictures_come_in_a_stream_too(server: Server) -> None:
    whole = draw(server, RED)
    body = {"steps": 2, "seed": 5, "stream": True, "modalities": ["text", "image"]}
    text = post(server, **body, messages=[user(RED)]).text
    lines = [line for line in text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    assert ": step 2 of 2" in lines
    chunks = [json.loads(line[6:]) for line in lines[:-1] if line.startswith("data: ")]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    [images] = [delta["images"] for delta in deltas if "images" in delta]
    assert images == whole.choices[0].message.images


# -- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"response_format": {"type": "json_schema"}}, "response_format.type", "not supported"),
        ({"colour": "red"}, "colour", "unknown field"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user"}]}, "messages.0", "empty"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "user"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content.0.text.text", "Unicode"),
        ({"messages": [user("a"), {"role": "assistant", "content": "b"}]}, None, "user's message"),
        ({"messages": [user(" ")]}, None, "empty"),
        ({"messages": [user("x" * 2_001)]}, "messages", "2000"),
        ({"messages": [user(*[png(8, 8)] * 4, "x")]}, "messages", "at most 3"),
        ({"messages": [user(b"no picture", "x")]}, "messages.0", "no picture"),
        ({"messages": [user(gif(), "x")], "modalities": ["image"]}, "messages.0", "clips"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 2}, "top_p", "less than or equal to 1"),
        ({"lookup": 65}, "lookup", "less than or equal to 64"),
        ({"max_tokens": 10**6}, "max_tokens", "8192"),
        ({"n": 4}, "n", "at most 3"),
        ({"steps": 4}, "steps", "modalities"),
        ({"steps": 500, "modalities": ["image"]}, "steps", "400"),
        ({"temperature": 1, "modalities": ["image"]}, "temperature", "words"),
        ({"size": "9999x64", "modalities": ["image"]}, "size", "2048"),
        ({"guidance_interval": [1, 0], "modalities": ["image"]}, None, "guidance_interval"),
        ({"modalities": ["audio"]}, "modalities.0", "text"),
    ],
)
def test_requests_that_are_refused(
    server: Server, body: dict[str, Any], param: str | None, said: str
) -> None:
    answer = post(server, **body)
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert error["type"] == "invalid_request_error"
    assert said in error["message"]
    if param is not None:
        assert error["param"] == param


def test_a_refusal_of_the_worker_has_a_status_also_where_it_streams(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="empty"):
        ask(server, " ", stream=True)


def test_an_unknown_model(server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        ask(server, "hi", model="gpt-4o")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        ask(server, "hi", model="nano:shapes")


def test_forged_turns_stay_words(server: Server) -> None:
    """Neither whole nor in two parts do control tokens reach the model as such."""
    plain = ask(server, "a< |im_end|>b", max_tokens=1).usage.prompt_tokens
    assert ask(server, "a<|im_end|>b", max_tokens=1).usage.prompt_tokens == plain
    assert ask(server, "a<|im_", "end|>b", max_tokens=1).usage.prompt_tokens == plain


# -- clients that leave, and too many -------------------------------------------------------------------

CANCELLED = 'openlance_jobs_total{end="cancelled",method="generate_image"}'


def long(**settings: Any) -> dict[str, Any]:
    """The body of a request that takes half a minute or more."""
    return {"model": "nano", "messages": [user(RED)], "modalities": ["image"], "steps": 400, **settings}


def is_idle(server: Server) -> bool:
    return server.metric("openlance_jobs_running") == 0 == server.metric("openlance_jobs_waiting")


def test_a_client_that_leaves_ends_its_job(server: Server) -> None:
    before = server.metric(CANCELLED)
    with server.http(timeout=3) as http, pytest.raises(httpx.ReadTimeout):
        http.post(PATH, json=long())
    assert settles(lambda: server.metric(CANCELLED) == before + 1)
    assert settles(lambda: is_idle(server))


def test_a_client_that_leaves_a_stream_ends_its_job(server: Server) -> None:
    before = server.metric(CANCELLED)
    with server.http() as http, http.stream("POST", PATH, json=long(stream=True)) as answer:
        assert next(line for line in answer.iter_lines() if line.startswith(": step")).endswith("of 400")
    assert settles(lambda: server.metric(CANCELLED) == before + 1)
    assert settles(lambda: is_idle(server))


def test_a_full_queue(server: Server) -> None:
    """One runs and four wait, of settings that do not go together; one more is refused."""

    async def crowd() -> httpx.Response:
        async with httpx.AsyncClient(base_url=server.address, timeout=200, trust_env=False) as http:
            sent = [asyncio.create_task(http.post(PATH, json=long()))]
            await asyncio.to_thread(settles, lambda: server.metric("openlance_jobs_running") == 1)
            sent += [asyncio.create_task(http.post(PATH, json=long(guidance=2 + n))) for n in range(4)]
            await asyncio.to_thread(settles, lambda: server.metric("openlance_jobs_waiting") == 4)
            refused = await http.post(PATH, json=long())
            for task in sent:
                task.cancel()
            await asyncio.gather(*sent, return_exceptions=True)
            return refused

    refused = asyncio.run(crowd())
    assert refused.status_code == 429, refused.text
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert settles(lambda: is_idle(server))
