"""The application: routes, who may use them, and the engine's life."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import APIRouter, Depends, FastAPI, Request, Security
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from openlance import __version__
from openlance.serve import chat, images, metrics, models, videos
from openlance.serve.errors import RESPONSES, ApiError, add_handlers, error_response
from openlance.serve.logs import Observed, traces
from openlance.serve.metrics import Counted
from openlance.serve.security import BodyLimit, Keys, check_access
from openlance.serve.settings import ServeConfig

log = logging.getLogger("openlance.serve")
health = APIRouter(tags=["health"], responses=RESPONSES)

ABOUT = """Lance over HTTP, in the shapes of OpenAI's API: pictures and clips are described, asked about, made
and edited. Fields that OpenAI does not have are Lance's own settings."""


class Health(BaseModel):
    status: str


class Running:
    """The engine's life beside the application's, which answers /healthz while the model is loaded.

    page: the web page, when it is there. loaded: whether requests can be taken. failure: why it could not
    start. on_failure: called then.
    """

    def __init__(self, config: ServeConfig, engine: Counted):
        self.config, self.engine = config, engine
        self.page: FastAPI | None = None
        self.loaded = False
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._stopping = False
        self._end = asyncio.Event()  # of the page, when all jobs have ended
        self._life: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._life = asyncio.create_task(self._live())
        self._life.add_done_callback(self._ended)

    async def stop(self) -> None:
        """End the jobs and the workers. It may be called more than once."""
        self._stopping = True
        await self.engine.stop()
        self._end.set()
        if self._life is not None:
            await asyncio.wait({self._life})

    async def _live(self) -> None:
        """Load, make the page, and keep it until the end."""
        await self.engine.start()
        async with AsyncExitStack() as stack:
            if self.config.page:
                page = await asyncio.to_thread(_make_page, self.config, self.engine)
                await stack.enter_async_context(page.router.lifespan_context(page))
                self.page = page
            self.loaded = True
            log.info("ready", extra={"model": self.engine.model.name})
            await self._end.wait()

    def _ended(self, life: asyncio.Task[None]) -> None:
        if not life.cancelled() and (error := life.exception()) and not self._stopping:
            self.failure = error
            self.on_failure()


def create_app(config: ServeConfig, engine: Counted | None = None) -> FastAPI:
    """The server as an ASGI application; its lifespan starts and stops the engine.

    engine: default a new one of this configuration. Raises InputError for a configuration that cannot be.
    """
    check_access(config)
    engine = Counted(config) if engine is None else engine
    app = FastAPI(
        title="openlance",
        version=__version__,
        description=ABOUT,
        lifespan=_lifespan,
        telemetry=traces(config.telemetry),
    )
    app.state.config, app.state.engine, app.state.metrics = config, engine, engine.metrics
    app.state.running, app.state.began = Running(config, engine), int(time.time())
    add_handlers(app)
    app.include_router(health)
    app.include_router(metrics.router)
    shown_key = Security(HTTPBearer(auto_error=False, description="an API key, where the server has any"))
    for module in (models, chat, images, *([videos] if config.videos else [])):
        app.include_router(module.router, dependencies=[shown_key, Depends(_when_loaded)])
    app.add_middleware(BodyLimit, most=config.max_body)
    app.add_middleware(Keys, hashes=config.api_keys)
    app.add_middleware(Observed, metrics=engine.metrics)  # the last one added is the outermost
    app.router.default = _Elsewhere(app.router, app.state.running)
    return app


@health.get("/healthz")
async def healthz() -> Health:
    """Whether the process lives."""
    return Health(status="ok")


@health.get("/readyz")
async def readyz(request: Request) -> Health:
    """Whether all workers have the model and jobs are taken; else 503."""
    state = request.app.state
    if not (state.running.loaded and state.engine.ready):
        raise ApiError(503, "not all workers are ready", code="not_ready")
    return Health(status="ready")


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.running.start()
    try:
        yield
    finally:
        await app.state.running.stop()


async def _when_loaded(request: Request) -> None:
    """Refuses what needs the model before it is there."""
    if not request.app.state.running.loaded:
        raise _loading()


class _Elsewhere:
    """What is at all addresses that no route has: the page, or nothing."""

    def __init__(self, router: APIRouter, running: Running):
        self._not_found, self._running = router.not_found, running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        running = self._running
        if not running.config.page or scope["type"] == "lifespan" or scope["path"].startswith("/v1"):
            await self._not_found(scope, receive, send)
        elif running.page is None:
            await error_response(_loading())(scope, receive, send)
        else:
            await running.page(scope, receive, send)


def _loading() -> ApiError:
    return ApiError(503, "the model is being loaded", code="not_ready", headers={"Retry-After": "5"})


def _make_page(config: ServeConfig, engine: Counted) -> FastAPI:
    """The web page as an application of its own, since the model must be known before it can be made."""
    from openlance.serve.page import mount_page  # slow to import, and not needed without the page

    page = FastAPI(openapi_url=None)
    mount_page(page, engine, config)
    return page
