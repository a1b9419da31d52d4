"""What is served: the model, and the model with each of its adapters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel

from openlance.serve.engine import ModelInfo
from openlance.serve.errors import RESPONSES, ApiError

router = APIRouter(prefix="/v1/models", tags=["models"], responses=RESPONSES)


class Model(BaseModel):
    """A model by the name to ask for it. tasks: what it can do, as of `openlance.sequence.template.Task`."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "openlance"
    tasks: list[str]


class Models(BaseModel):
    object: str = "list"
    data: list[Model]


@router.get("")
async def list_models(request: Request) -> Models:
    """The model, and `model:adapter` for each of its adapters."""
    return Models(data=list(_served(request.app.state)))


@router.get("/{name:path}")
async def retrieve_model(request: Request, name: str) -> Model:
    """One model by its name."""
    for model in _served(request.app.state):
        if model.id == name:
            return model
    raise unknown_model(name, request.app.state.engine.model)


def choose_adapter(name: str, model: ModelInfo) -> str | None:
    """The adapter that a client asks for by `model` or `model:adapter`. Raises ApiError 404."""
    if name == model.name:
        return None
    base, _, adapter = name.rpartition(":")
    if base == model.name and adapter in model.adapters:
        return adapter
    raise unknown_model(name, model)


def unknown_model(name: str, model: ModelInfo) -> ApiError:
    known = ", ".join(_names(model))
    return ApiError(
        404, f"the model {name[:200]!r} is not served here: ask for {known}", param="model",
        code="model_not_found",
    )  # fmt: skip


def _names(model: ModelInfo) -> list[str]:
    return [model.name, *(f"{model.name}:{adapter}" for adapter in model.adapters)]


def _served(state: Any) -> Iterator[Model]:
    model: ModelInfo = state.engine.model
    for name in _names(model):
        yield Model(id=name, created=state.began, tasks=sorted(map(str, model.tasks)))
