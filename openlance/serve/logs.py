"""The server's log: one JSON object a line, each with the id of the request that it is about; and traces."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.typing import EventDict, WrappedLogger

from openlance import __version__
from openlance.errors import InputError
from openlance.serve.metrics import Metrics
from openlance.serve.security import OPEN

if TYPE_CHECKING:
    from fastapi.telemetry import TelemetryConfig

log = logging.getLogger("openlance.serve")

_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_OFTEN = OPEN | {"/metrics"}
_LOGGERS = ("openlance", "uvicorn", "uvicorn.error")


def write_json_lines() -> None:
    """Have everything that is logged go to stderr as JSON, uvicorn's own and tracebacks included."""
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.ExtraAdder(),
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _without_colours,
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ],
    )
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers.clear()  # the command line's own, which is for people
        logger.propagate = True
        logger.setLevel(logging.INFO)


class Observed:
    """Gives every request an id (`X-Request-Id`: the client's own, or a new one), and says in the log and the
    metrics how it ended. Neither holds what was sent or answered."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        number, start, status = _request_id(scope), time.perf_counter(), 500
        scope.setdefault("state", {})["request_id"] = number

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = number
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=number):
            try:
                await self.app(scope, receive, tell)
            finally:
                self._ended(scope, status, time.perf_counter() - start)

    def _ended(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or "other"
        self.metrics.answered(scope["method"], route, status, seconds)
        client = scope.get("client") or ("",)
        told = {"method": scope["method"], "path": scope["path"], "status": status, "client": client[0]}
        level = logging.DEBUG if _quiet(scope) else logging.INFO
        log.log(level, "request", extra={**told, "seconds": round(seconds, 4)})


def traces(collector: str | None) -> TelemetryConfig | None:
    """FastAPI's own telemetry, its traces sent to a collector (OTLP over HTTP).

    Raises InputError where OpenTelemetry's SDK is not installed.
    """
    if collector is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise InputError("--telemetry needs OpenTelemetry: pip install 'openlance[telemetry]'") from None
    about = Resource.create({"service.name": "openlance", "service.version": __version__})
    provider = TracerProvider(resource=about)
    exporter = OTLPSpanExporter(endpoint=f"{collector.rstrip('/')}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return {"tracer_provider": provider, "metrics": False, "logs": False, "exclude": _quiet}


def _quiet(scope: MutableMapping[str, Any]) -> bool:
    """Whether a request is one of those that machines make all the time."""
    return scope.get("path") in _OFTEN


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _ID.fullmatch(given) else uuid4().hex


def _without_colours(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """uvicorn gives its messages twice, once for terminals."""
    event.pop("color_message", None)
    return event
