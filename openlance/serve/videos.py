"""Clips over HTTP, as OpenAI's: /v1/videos, where a clip is asked for, waited for, and fetched."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Query, Response
from fastapi import Request as Call
from pydantic import BaseModel, BeforeValidator, Field

from openlance.errors import InputError
from openlance.infer.orders import new_seed
from openlance.infer.prepare import target_frames
from openlance.serve.errors import RESPONSES, ApiError
from openlance.serve.fields import (
    MadeFields,
    MediaField,
    Reference,
    read_clip,
    read_fields,
    read_picture,
    request_body,
    show_size,
)
from openlance.serve.jobs import Request
from openlance.serve.security import key_hash
from openlance.serve.store import VideoJob
from openlance.serve.video_jobs import Status, VideoJobs


@asynccontextmanager
async def _running(app: FastAPI) -> AsyncIterator[None]:
    """The jobs live as long as the app, which ends where they cannot be kept."""
    try:
        videos = VideoJobs(app.state.config, app.state.engine)
    except InputError as error:
        app.state.running.failure = error
        app.state.running.on_failure()
        yield
        return
    app.state.videos = videos
    await videos.start()
    try:
        yield
    finally:
        await videos.stop()


router = APIRouter(prefix="/v1/videos", tags=["videos"], responses=RESPONSES, lifespan=_running)


_MP4: dict[str, Any] = {"content": {"video/mp4": {"schema": {"type": "string", "format": "binary"}}}}
_FILE: dict[int | str, dict[str, Any]] = {200: _MP4, 206: {"description": "the part asked for", **_MP4}}


def _number(given: Any) -> Any:
    """OpenAI's clients send seconds as text."""
    return float(given) if isinstance(given, str) and re.fullmatch(r"\d{1,6}(\.\d{1,6})?", given) else given


class VideoFields(MadeFields):
    """A request for a clip: of words alone, from a first picture, of subjects, or of another clip."""

    seconds: Annotated[float, BeforeValidator(_number), Field(gt=0)] | None = None
    frames: int | None = Field(None, ge=1, description="instead of seconds; made are 4 k + 1")
    input_reference: MediaField | None = Field(None, description="the first frame")
    last: MediaField | None = Field(None, description="the last frame, beside a first")
    references: list[MediaField] | None = Field(None, min_length=1, description="subjects to film")
    video: MediaField | None = Field(None, description="a clip to change")


class VideoError(BaseModel):
    code: str
    message: str


class Video(BaseModel):
    """A clip, or how far it is. Times in seconds since 1970; progress in percent.

    size, WIDTHxHEIGHT, seconds and frames are null while they are not known. settings: all that is needed to
    make it again.
    """

    id: str
    object: Literal["video"] = "video"
    model: str
    prompt: str
    status: Status
    progress: int
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    size: str | None = None
    seconds: str | None = None
    frames: int | None = None
    fps: float | None = None
    seed: int
    settings: dict[str, Any] | None = None
    error: VideoError | None = None


class VideoPage(BaseModel):
    """Clips in the order of their creation."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


@router.post("", openapi_extra=request_body(VideoFields))
async def create(call: Call) -> Video:
    """Ask for a clip. It is made while nobody waits; see GET /v1/videos/{video_id}."""
    return await _create(call, await read_fields(call, VideoFields))


@router.post("/edits", openapi_extra=request_body(VideoFields))
async def edit(call: Call) -> Video:
    """Ask for a clip to be changed: an uploaded one, or, as {"id": …}, one that was made here."""
    fields = await read_fields(call, VideoFields)
    if fields.video is None:
        raise ApiError(400, "video: the clip to change is missing", param="video")
    return await _create(call, fields)


@router.get("")
async def list_videos(
    call: Call,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
) -> VideoPage:
    """Your clips, those after one of them if you say which."""
    videos: VideoJobs = call.app.state.videos
    last = None if after is None else await _find(call, after, param="after")
    found = await videos.page(_owner(call), limit=limit + 1, after=last, newest_first=order == "desc")
    shown = [_show(videos, job) for job in found[:limit]]
    first_id, last_id = (shown[0].id, shown[-1].id) if shown else (None, None)
    return VideoPage(data=shown, first_id=first_id, last_id=last_id, has_more=len(found) > limit)


@router.get("/{video_id}")
async def retrieve(call: Call, video_id: str) -> Video:
    """How far a clip is."""
    return _show(call.app.state.videos, await _find(call, video_id))


@router.get("/{video_id}/content", response_class=Response, responses=_FILE)
async def content(call: Call, video_id: str, variant: Literal["video"] = "video") -> Response:
    """The file of a clip that is completed, or the part of it that a Range header asks for."""
    job, videos = await _find(call, video_id), call.app.state.videos
    if job.status != "completed":
        why = "failed: " + job.error["message"] if job.error else "is not completed: ask for its status"
        raise ApiError(409, f"the video {why}", param="video_id", code="not_completed")
    size = await videos.size(job)
    headers = {"Accept-Ranges": "bytes", "Content-Disposition": f'inline; filename="{job.result}"'}
    wanted = _byte_range(call.headers.get("range", ""), size)
    if wanted is None:
        return Response(await videos.read(job), media_type="video/mp4", headers=headers)
    start, end = wanted
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return Response(await videos.read(job, start, end), 206, headers, "video/mp4")


@router.delete("/{video_id}")
async def delete(call: Call, video_id: str) -> Deleted:
    """Remove a clip; one that is not completed is not made any more."""
    job = await _find(call, video_id)
    await call.app.state.videos.remove(job)
    return Deleted(id=job.id)


# -- asking for a clip ---------------------------------------------------------------------------------


async def _create(call: Call, fields: VideoFields) -> Video:
    engine, videos = call.app.state.engine, call.app.state.videos
    fields.check(call.app.state.config, engine.model.config)
    adapter, words, choices = fields.adapter(engine.model), fields.words(), fields.choices()
    choices["seed"] = new_seed() if fields.seed is None else fields.seed
    method, arguments = await _task(call, fields)
    request = Request(method, {"prompt": words, **arguments, **choices}, adapter, media_type="video/mp4")
    job = VideoJob(
        id=f"video_{secrets.token_hex(16)}",
        owner=_owner(call),
        model=fields.model or engine.model.name,
        prompt=fields.prompt.replace("\0", ""),  # which PostgreSQL does not take
        request={},
        created_at=time.time(),
        size=show_size(arguments["size"]) if "size" in arguments else None,
        frames=arguments.get("frames"),
        fps=engine.model.config.sizes.fps if "frames" in arguments else None,
    )
    await videos.create(job, request)
    return _show(videos, job)


async def _task(call: Call, fields: VideoFields) -> tuple[str, dict[str, Any]]:
    """(method, its arguments but the words and choices), by which media are given. Raises ApiError."""
    config, model = call.app.state.config, call.app.state.engine.model.config
    if fields.video is not None:
        _refuse(fields, "an edit is as long and large as its clip", "input_reference", "last", "references",
                "size", "seconds", "frames")  # fmt: skip
        return "edit", {"source": await _clip(call, fields.video)}
    frames = {"frames": _frames(call, fields)}
    if fields.input_reference is not None:
        _refuse(fields, "a clip has the shape of its first frame", "references", "size")
        ends = {"image": await read_picture(fields.input_reference, "input_reference", config)}
        if fields.last is not None:
            ends["last"] = await read_picture(fields.last, "last", config)
        return "animate", ends | frames
    _refuse(fields, "it needs a first frame, as input_reference", "last")
    size = {"size": fields.target_size(config, model, video=True)}
    if fields.references is None:
        return "generate_video", size | frames
    if len(fields.references) > config.max_pictures:
        raise ApiError(400, f"references: at most {config.max_pictures} are taken here", param="references")
    shown = [await read_picture(reference, "references", config) for reference in fields.references]
    return "subject", {"references": shown, "video": True} | size | frames


def _refuse(fields: VideoFields, why: str, *names: str) -> None:
    """Raises ApiError where one of these is given."""
    for name in names:
        if getattr(fields, name) not in (None, "auto"):
            raise ApiError(400, f"{name}: {why}: leave it out", param=name)


def _frames(call: Call, fields: VideoFields) -> int:
    """How many are made. Raises ApiError for more than the model or the server makes."""
    config, model = call.app.state.config, call.app.state.engine.model.config
    if fields.seconds is not None and fields.frames is not None:
        raise ApiError(400, "seconds: frames are given too: leave one of them out", param="seconds")
    name = "frames" if fields.seconds is None else "seconds"
    wanted = fields.frames or model.sizes.frames
    if fields.seconds is not None:
        wanted = max(1, round(fields.seconds * model.sizes.fps))
    try:
        frames = target_frames(wanted, model)
    except InputError as error:
        raise ApiError(400, f"{name}: {error} (at {model.sizes.fps:g} a second)", param=name) from error
    if frames > config.max_frames:
        raise ApiError(400, f"{name}: at most {config.max_frames} frames are made here", param=name)
    return frames


async def _clip(call: Call, reference: Reference) -> bytes:
    """A clip that was sent, or made here."""
    if reference.id is None:
        return await read_clip(reference, "video", call.app.state.config)
    job = await _find(call, reference.id, param="video")
    if job.status != "completed":
        raise ApiError(409, "video: it is not completed", param="video", code="not_completed")
    return await call.app.state.videos.read(job)


# -- answers -------------------------------------------------------------------------------------------


def _owner(call: Call) -> str:
    """Whose clips the caller sees: those of the same API key; without keys, everybody's."""
    if not call.app.state.config.api_keys:
        return ""
    return key_hash(call.headers["authorization"].partition(" ")[2].strip())


async def _find(call: Call, video_id: str, *, param: str = "video_id") -> VideoJob:
    job = await call.app.state.videos.get(video_id, _owner(call))
    if job is None:
        message = f"there is no video {video_id[:100]!r}: it has expired, or never was"
        raise ApiError(404, message, param=param, code="not_found")
    return job


def _show(videos: VideoJobs, job: VideoJob) -> Video:
    status, progress = videos.progress(job)
    values = {name: getattr(job, name) for name in ("id", "model", "prompt", "size", "frames", "fps")}
    return Video(
        **values,
        status=status,
        progress=progress,
        created_at=int(job.created_at),
        completed_at=None if job.completed_at is None else int(job.completed_at),
        expires_at=None if job.expires_at is None else int(job.expires_at),
        seconds=f"{job.frames / job.fps:g}" if job.frames and job.fps else None,
        seed=job.request["arguments"]["seed"],
        settings=job.settings,
        error=VideoError(**job.error) if job.error else None,
    )


def _byte_range(header: str, size: int) -> tuple[int, int] | None:
    """(start, end) of a Range header; None for the whole: no range, or one of a kind that is not known.

    Raises ApiError 416 for bytes that the file does not have (RFC 9110, section 14).
    """
    match = re.fullmatch(r"bytes=([0-9]{0,15})-([0-9]{0,15})", header.strip())
    if match is None or not any(match.groups()):
        return None
    first, last = (int(bound) if bound else None for bound in match.groups())
    if first is None:
        start, end = max(0, size - (last or 0)), size
    else:
        start, end = first, size if last is None else min(last + 1, size)
    if start >= end:
        unsatisfied = {"Content-Range": f"bytes */{size}"}
        raise ApiError(416, f"the file has {size} bytes: ask for a range in it", headers=unsatisfied)
    return start, end
