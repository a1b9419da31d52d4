"""What requests for pictures and clips have in common: fields, read from JSON or forms, and media."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, Field, PrivateAttr, ValidationError, WithJsonSchema
from starlette.datastructures import FormData, UploadFile

from openlance.config import ModelConfig
from openlance.errors import InputError
from openlance.infer.messages import prompt as checked
from openlance.infer.orders import override
from openlance.infer.prepare import Size, target_size
from openlance.serve.chat_request import MAX_SEED, PictureSettings, Strict, Words
from openlance.serve.engine import ModelInfo
from openlance.serve.errors import ApiError
from openlance.serve.media_in import check_media, read_media
from openlance.serve.models import choose_adapter
from openlance.serve.security import plain_text
from openlance.serve.settings import ServeConfig

_NAME = re.compile(r"(\w+)(?:\[(\w*)\])?")


class Reference(Strict):
    """A picture or clip: an uploaded file, an address, or, of clips, the id of one made here."""

    image_url: str | None = None
    video_url: str | None = None
    id: str | None = None
    _data: bytes | None = PrivateAttr(None)

    @classmethod
    def upload(cls, data: bytes) -> Reference:
        found = cls()
        found._data = data
        return found

    async def read(self, config: ServeConfig) -> bytes:
        """The bytes of the file. Raises InputError for an address that cannot be used."""
        if self._data is not None:
            return self._data
        given = [address for address in (self.image_url, self.video_url) if address is not None]
        if len(given) != 1:
            raise InputError('give one file, or one address as {"image_url": "data:image/png;base64,…"}')
        return await read_media(given[0], config)


def _no_text(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError('a file is needed, or {"image_url": "data:image/png;base64,…"}, not text')
    return value


_FILE: dict[str, Any] = {"type": "string", "format": "binary"}
_ADDRESS: dict[str, Any] = {
    "type": "object",
    "properties": {name: {"type": "string"} for name in ("image_url", "video_url", "id")},
    "additionalProperties": False,
}

MediaField = Annotated[
    Reference, BeforeValidator(_no_text), WithJsonSchema({"anyOf": [_FILE, _ADDRESS]})
]  # fmt: skip


class MadeFields(PictureSettings):
    """Fields of everything that is made."""

    prompt: Words
    model: str | None = None
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    user: str | None = Field(None, description="taken and not used")
    safety_identifier: str | None = Field(None, description="taken and not used")

    def words(self) -> str:
        """The prompt, in which nothing is a control token. Raises ApiError where it is blank."""
        try:
            return plain_text(checked(self.prompt))
        except InputError as error:
            raise ApiError(400, str(error), param="prompt") from error

    def choices(self) -> dict[str, Any]:
        """The settings that were given, but for seed and size."""
        given = {name: getattr(self, name) for name in PictureSettings.model_fields if name != "size"}
        chosen = {name: value for name, value in given.items() if value is not None}
        if "negative_prompt" in chosen:
            chosen["negative_prompt"] = plain_text(chosen["negative_prompt"])
        return chosen

    def check(self, config: ServeConfig, model: ModelConfig) -> None:
        """Raises ApiError for more than the server takes, InputError for settings that cannot be."""
        letters = len(self.prompt) + len(self.negative_prompt or "")
        if letters > config.max_text:
            message = f"prompt: {letters} characters; at most {config.max_text} are taken here"
            raise ApiError(400, message, param="prompt")
        if self.steps is not None and self.steps > config.max_steps:
            raise ApiError(400, f"steps: at most {config.max_steps} are made here", param="steps")
        settings = self.choices()
        settings.pop("negative_prompt", None)
        override(model.sampling, settings)

    def adapter(self, model: ModelInfo) -> str | None:
        """The one asked for in `model`. Raises ApiError for a model that is not served."""
        return None if self.model is None else choose_adapter(self.model, model)

    def target_size(self, config: ServeConfig, model: ModelConfig, *, video: bool) -> Size:
        """(height, width) that will be made. Raises ApiError for what is beyond the limits."""
        side = model.sizes.video if video else model.sizes.image
        size = _parse(self.size)
        try:
            height, width = target_size(size, (side, side), model)
        except InputError as error:
            raise ApiError(400, str(error), param="size") from error
        if size is not None and max(height, width) > config.max_size:
            raise ApiError(400, f"size: at most {config.max_size} pixels a side are made here", param="size")
        return height, width


def _parse(size: str | None) -> Size | None:
    """(height, width) of WIDTHxHEIGHT."""
    if size is None or size == "auto":
        return None
    width, height = map(int, size.split("x"))
    return height, width


def show_size(size: Size) -> str:
    """WIDTHxHEIGHT of (height, width)."""
    return f"{size[1]}x{size[0]}"


async def read_picture(reference: Reference, name: str, config: ServeConfig) -> bytes:
    """A still picture, its header checked. Raises ApiError that names the field."""
    data, kind = await _read(reference, name, config)
    if kind != "image":
        raise ApiError(400, f"{name}: this is a clip; clips are edited at /v1/videos/edits", param=name)
    return data


async def read_clip(reference: Reference, name: str, config: ServeConfig) -> bytes:
    """A clip, its header checked. Raises ApiError that names the field."""
    data, kind = await _read(reference, name, config)
    if kind != "video":
        raise ApiError(
            400, f"{name}: this is a still picture; pictures are edited at /v1/images/edits", param=name
        )
    return data


async def _read(reference: Reference, name: str, config: ServeConfig) -> tuple[bytes, str]:
    try:
        data = await reference.read(config)
        shown = await asyncio.to_thread(check_media, data, config, name)
    except InputError as error:
        raise ApiError(400, str(error), param=name) from error
    return data, shown.kind


Fields = TypeVar("Fields", bound=BaseModel)


async def read_fields(request: Request, kind: type[Fields]) -> Fields:
    """The fields of a request, from multipart/form-data or JSON.

    Raises RequestValidationError, or ApiError for another type or a malformed form.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if media_type == "multipart/form-data":
            async with request.form() as form:
                return kind.model_validate(await _unflatten(form))
        if media_type == "application/json":
            return kind.model_validate_json(await request.body(), strict=True)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False)) from error
    raise ApiError(
        415, f"Content-Type is {media_type[:100]!r}: send multipart/form-data or application/json",
    )  # fmt: skip


def request_body(kind: type[BaseModel]) -> dict[str, Any]:
    """For `openapi_extra`: what `read_fields` reads."""
    content = {"schema": kind.model_json_schema()}
    types = ("multipart/form-data", "application/json")
    return {"requestBody": {"required": True, "content": dict.fromkeys(types, content)}}


async def _unflatten(form: FormData) -> dict[str, Any]:
    """Values by name: `name[]` and repeated names as lists, `name[key]` as objects."""
    found: dict[str, Any] = {}
    for key, value in form.multi_items():
        item = Reference.upload(await value.read()) if isinstance(value, UploadFile) else value
        match = _NAME.fullmatch(key)
        name, inner = match.groups() if match else (key, None)
        if inner:
            place = found.setdefault(name, {})
            if not isinstance(place, Mapping):
                raise ApiError(400, f"{name}: given twice, in different ways", param=name)
            found[name] = {**place, inner: item}
        elif inner == "" or name in found:
            before = found.get(name, [])
            found[name] = [*(before if isinstance(before, list) else [before]), item]
        else:
            found[name] = item
    return found
