"""POST /v1/chat/completions: conversations, answered in words or with a picture."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from starlette.responses import JSONResponse, Response

from openlance.config import ModelConfig, TextConfig
from openlance.errors import InputError
from openlance.infer.orders import new_seed, override
from openlance.serve.chat_answer import STREAMED, Completion, completion, stream
from openlance.serve.chat_request import (
    MAX_SEED,
    ChatMessage,
    ChatRequest,
    ImagePart,
    PictureSettings,
    Strict,
    TextPart,
    WordSettings,
)
from openlance.serve.errors import RESPONSES, ApiError
from openlance.serve.jobs import Request
from openlance.serve.media_in import look
from openlance.serve.models import choose_adapter
from openlance.serve.security import plain_text
from openlance.serve.settings import ServeConfig
from openlance.serve.work import results, submit

router = APIRouter(prefix="/v1/chat", tags=["chat"], responses=RESPONSES)

Content = list[dict[str, Any]]
"""Parts as `LancePipeline.chat` takes them, media as bytes."""


@router.post("/completions", response_model=Completion, responses=STREAMED)
async def complete(request: HTTPRequest, asked: ChatRequest) -> Response:
    """Continue a conversation in words or, with `modalities` ["text", "image"], draw what its last turn says:
    a new picture, an edit of the picture that it shows, or a picture of the subjects of several."""
    state = request.app.state
    config: ServeConfig = state.config
    adapter = choose_adapter(asked.model, state.engine.model)
    _check_amounts(asked, config)
    if asked.draws:
        requests = await _pictures(asked, config, state.engine.model.config, adapter)
    else:
        requests = await _answers(asked, config, adapter)
    jobs = submit(state.engine, requests)
    if asked.stream:
        return await stream(request, asked, jobs)
    return JSONResponse(completion(asked, jobs, await results(request, jobs)))


async def _answers(asked: ChatRequest, config: ServeConfig, adapter: str | None) -> list[Request]:
    """One request for each answer that is wanted."""
    _refuse(asked, PictureSettings, 'is for pictures: ask for them with modalities ["text", "image"]')
    settings = asked.given(WordSettings)
    if (most := asked.max_completion_tokens or asked.max_tokens) is not None:
        settings["max_tokens"] = most
    if asked.stop:
        settings["stop"] = tuple(asked.stop)
    TextConfig(**settings)  # what cannot be is refused before media are fetched
    turns = [
        {"role": "system" if message.role == "developer" else message.role, "content": content}
        for number, message in enumerate(asked.messages)
        if (content := await _content(message, config, f"messages.{number}"))
    ]
    return [
        Request("chat", {"messages": turns, "seed": seed, **settings}, adapter, streamed=bool(asked.stream))
        for seed in _seeds(asked)
    ]


async def _pictures(
    asked: ChatRequest, config: ServeConfig, model: ModelConfig, adapter: str | None
) -> list[Request]:
    """One request for each picture that is wanted of the last turn."""
    _refuse(asked, WordSettings, "is for words: leave it out where a picture is made")
    settings = asked.given(PictureSettings)
    size = _size(settings.pop("size", None), config)
    override(model.sampling, {name: settings[name] for name in settings if name != "negative_prompt"})
    last, param = asked.messages[-1], f"messages.{len(asked.messages) - 1}"
    if last.role != "user":
        raise ApiError(400, "a conversation must end with a user's message", param=param)
    content = await _content(last, config, param)
    if any(part["type"] == "video" for part in content):
        raise ApiError(400, "clips are edited at /v1/videos: show a picture", param=param)
    shown = [part["image"] for part in content if part["type"] == "image"]
    settings["prompt"] = " ".join(part["text"] for part in content if part["type"] == "text")
    if "negative_prompt" in settings:
        settings["negative_prompt"] = plain_text(settings["negative_prompt"])
    if len(shown) == 1:
        method, own = "edit", {"source": shown[0]}
    else:
        method, own = ("subject", {"references": shown}) if shown else ("generate_image", {})
        own["size"] = size
    if method == "edit" and size is not None:
        raise ApiError(400, "size: an edit keeps the shape of its picture: leave it out", param="size")
    return [Request(method, {**own, **settings, "seed": seed}, adapter) for seed in _seeds(asked)]


async def _content(message: ChatMessage, config: ServeConfig, param: str) -> Content:
    """The parts of a turn, media loaded and looked at. Words that follow each other are joined first, so that
    no control token can be put together from pieces."""
    parts: Content = []
    for part in message.parts:
        if not isinstance(part, TextPart):
            address = part.image_url.url if isinstance(part, ImagePart) else part.video_url.url
            try:
                data, shown = await look(address, config)
            except InputError as error:
                raise ApiError(400, str(error), param=param) from error
            parts.append({"type": shown.kind, shown.kind: data})
        elif parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += part.text
        else:
            parts.append({"type": "text", "text": part.text})
    for said in parts:
        if said["type"] == "text":
            said["text"] = plain_text(said["text"])
    return parts


def _check_amounts(asked: ChatRequest, config: ServeConfig) -> None:
    """Raises ApiError for more than the server gives to one request."""
    parts = [part for message in asked.messages for part in message.parts]
    media = sum(not isinstance(part, TextPart) for part in parts)
    letters = sum(len(part.text) for part in parts if isinstance(part, TextPart))
    amounts = (
        ("messages", "pictures and clips", media, config.max_pictures),
        ("messages", "characters", letters, config.max_text),
        ("n", "at once", asked.n, config.max_pictures),
        ("steps", "steps", asked.steps, config.max_steps),
        ("max_tokens", "tokens", asked.max_tokens, config.max_tokens),
        ("max_completion_tokens", "tokens", asked.max_completion_tokens, config.max_tokens),
    )
    for param, what, wanted, most in amounts:
        if wanted is not None and wanted > most:
            raise ApiError(400, f"{param}: {wanted} {what}; this server gives at most {most}", param=param)


def _refuse(asked: ChatRequest, group: type[Strict], why: str) -> None:
    """Raises ApiError where a setting of the group was given."""
    for name in asked.given(group):
        raise ApiError(400, f"{name} {why}", param=name)


def _size(size: str | None, config: ServeConfig) -> tuple[int, int] | None:
    """(height, width) of WIDTHxHEIGHT. Raises ApiError beyond the server's limit."""
    if size is None or size == "auto":
        return None
    width, height = map(int, size.split("x"))
    if max(width, height) > config.max_size:
        raise ApiError(400, f"size: at most {config.max_size} pixels a side, not {size}", param="size")
    return height, width


def _seeds(asked: ChatRequest) -> list[int]:
    first = new_seed() if asked.seed is None else asked.seed
    return [(first + number) % (MAX_SEED + 1) for number in range(asked.n or 1)]
