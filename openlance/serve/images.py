"""Pictures over HTTP, as OpenAI's: /v1/images/generations and /v1/images/edits."""

from __future__ import annotations

import json
import time
from base64 import b64encode
from collections import Counter
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from fastapi import Request as Call
from pydantic import BaseModel, BeforeValidator, Field, field_validator
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError

from openlance.infer.orders import new_seed
from openlance.serve.chat_answer import STREAMED
from openlance.serve.chat_request import MAX_SEED
from openlance.serve.engine import Engine
from openlance.serve.errors import RESPONSES, ApiError, as_api_error, error_body
from openlance.serve.fields import (
    MadeFields,
    MediaField,
    read_fields,
    read_picture,
    request_body,
    show_size,
)
from openlance.serve.jobs import Event, JobError, Made, Outcome, Progress, Request
from openlance.serve.settings import ServeConfig
from openlance.serve.work import EventStream, happenings, results, submit

router = APIRouter(prefix="/v1/images", tags=["images"], responses=RESPONSES)


class ImageFields(MadeFields):
    """A request for pictures. As with OpenAI, null is as good as nothing."""

    n: int | None = Field(None, ge=1, description="pictures, of the seeds seed, seed + 1, …; default 1")
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="url gives a data: address: nothing is kept on the server; default b64_json"
    )
    output_format: Literal["png", "jpeg", "webp"] | None = Field(None, description="default png")
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3, description="previews, where pictures are streamed")
    quality: Literal["auto"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto"] | None = None

    @property
    def format(self) -> str:
        return self.output_format or "png"


class EditFields(ImageFields):
    """A request for pictures made from others: one is changed; several are subjects to draw."""

    image: Annotated[list[MediaField], BeforeValidator(lambda given: _as_list(given))] = Field(min_length=1)
    mask: SkipJsonSchema[Any] = None

    @field_validator("mask")
    @classmethod
    def _no_mask(cls, mask: Any) -> Any:
        if mask is not None:
            raise PydanticCustomError(
                "mask", "this model has no masks: say in the prompt what to change, and where"
            )
        return mask


class Picture(BaseModel):
    """One picture. settings: all that is needed to make it again. seconds: time by phase."""

    b64_json: str | None = None
    url: str | None = None
    seed: int
    settings: dict[str, Any]
    seconds: dict[str, float]


class Pictures(BaseModel):
    """What was made. size: WIDTHxHEIGHT."""

    created: int
    data: list[Picture]
    background: Literal["opaque"] = "opaque"
    output_format: str
    size: str


_ANSWERS: dict[str, Any] = {
    "response_model": Pictures,
    "response_model_exclude_none": True,
    "responses": STREAMED,
}


@router.post("/generations", openapi_extra=request_body(ImageFields), **_ANSWERS)
async def generate(call: Call) -> Response | Pictures:
    """Pictures of a prompt."""
    config, engine = call.app.state.config, call.app.state.engine
    fields = await read_fields(call, ImageFields)
    _check(fields, call)
    size = fields.target_size(config, engine.model.config, video=False)
    return await _answer(call, fields, "generate_image", {"size": size}, "image_generation")


@router.post("/edits", openapi_extra=request_body(EditFields), **_ANSWERS)
async def edit(call: Call) -> Response | Pictures:
    """A picture, changed as the prompt says; or, of several pictures, their subjects drawn."""
    config, engine = call.app.state.config, call.app.state.engine
    fields = await read_fields(call, EditFields)
    _check(fields, call)
    if len(fields.image) > config.max_pictures:
        raise ApiError(400, f"image: at most {config.max_pictures} are taken here", param="image")
    shown = [await read_picture(image, "image", config) for image in fields.image]
    if len(shown) > 1:
        size = fields.target_size(config, engine.model.config, video=False)
        return await _answer(call, fields, "subject", {"references": shown, "size": size}, "image_edit")
    if fields.size not in (None, "auto"):
        raise ApiError(400, "size: an edit has the shape of its picture: leave it out", param="size")
    return await _answer(call, fields, "edit", {"source": shown[0]}, "image_edit")


def _as_list(given: Any) -> Any:
    return given if isinstance(given, list) else [given]


def _check(fields: ImageFields, call: Call) -> None:
    """Raises ApiError or InputError for what cannot be made here."""
    config: ServeConfig = call.app.state.config
    fields.check(config, call.app.state.engine.model.config)
    if fields.n is not None and fields.n > config.max_pictures:
        raise ApiError(400, f"n: at most {config.max_pictures} are made here", param="n")


async def _answer(
    call: Call, fields: ImageFields, method: str, arguments: dict[str, Any], kind: str
) -> Response | Pictures:
    """kind: how OpenAI's events are called."""
    engine: Engine = call.app.state.engine
    jobs = submit(engine, _requests(engine, fields, method, arguments))
    if fields.stream:
        told = happenings([(job, job.events()) for job in jobs])
        return EventStream(_events(told, fields, kind), jobs)
    made = [outcome for outcome in await results(call, jobs) if isinstance(outcome, Made)]
    return Pictures(
        created=int(time.time()),
        data=[_picture(one, fields) for one in made],
        output_format=fields.format,
        size=show_size(made[0].size),
    )


def _requests(engine: Engine, fields: ImageFields, method: str, arguments: dict[str, Any]) -> list[Request]:
    """One for each picture; they differ in their seeds."""
    adapter, words, choices = fields.adapter(engine.model), fields.words(), fields.choices()
    seed = new_seed() if fields.seed is None else fields.seed
    steps = choices.get("steps", engine.model.config.sampling.steps)
    previews = fields.partial_images if fields.stream else None
    return [
        Request(
            method,
            {"prompt": words, **arguments, **choices, "seed": (seed + index) % (MAX_SEED + 1)},
            adapter=adapter,
            media_type=f"image/{fields.format}",
            preview_every=-(-steps // (previews + 1)) if previews else 0,
        )
        for index in range(fields.n or 1)
    ]


async def _events(
    told: AsyncIterator[tuple[int, Event | Outcome]], fields: ImageFields, kind: str
) -> AsyncIterator[str]:
    """Server-sent events; image_index, which OpenAI does not have, tells pictures apart."""
    previews: Counter[int] = Counter()
    common = {"background": "opaque", "quality": "auto"}
    try:
        async for number, event in told:
            own = {"image_index": number, **common}
            if isinstance(event, Progress) and event.preview is not None:
                own |= {"partial_image_index": previews[number], "output_format": "png"}
                yield _event(f"{kind}.partial_image", event.preview, own)
                previews[number] += 1
            elif isinstance(event, Made):
                own |= {"output_format": fields.format, "size": show_size(event.size)}
                yield _event(f"{kind}.completed", event.media, own | _record(event))
    except JobError as error:
        said = as_api_error(error)
        yield f"event: error\ndata: {json.dumps(error_body(said.status_code, said.detail))}\n\n"


def _event(kind: str, media: bytes, values: dict[str, Any]) -> str:
    data = {"type": kind, "b64_json": b64encode(media).decode(), "created_at": int(time.time()), **values}
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"


def _picture(made: Made, fields: ImageFields) -> Picture:
    data = b64encode(made.media).decode()
    if fields.response_format == "url":
        return Picture(url=f"data:{made.media_type};base64,{data}", **_record(made))
    return Picture(b64_json=data, **_record(made))


def _record(made: Made) -> dict[str, Any]:
    """What OpenAI's pictures do not say."""
    return {"seed": made.settings["seed"], "settings": dict(made.settings), "seconds": dict(made.seconds)}
