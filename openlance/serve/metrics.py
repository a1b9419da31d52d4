"""Numbers for Prometheus: requests, jobs by phase, the queue and the workers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from fastapi import APIRouter, Request, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from openlance.serve.engine import Engine, Job
from openlance.serve.jobs import JobError, Spoken
from openlance.serve.jobs import Request as JobRequest
from openlance.serve.settings import ServeConfig

router = APIRouter(tags=["health"])

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(
        generate_latest(request.app.state.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
    )


class Metrics:
    """What one server counts."""

    def __init__(self, engine: Engine):
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "openlance_requests", "HTTP requests answered", ["method", "route", "status"], registry=registry
        )
        self._request_seconds = Histogram(
            "openlance_request_seconds", "Time of an HTTP request", ["route"], buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self._jobs = Counter("openlance_jobs", "Jobs that ended", ["method", "end"], registry=registry)
        self._phases = Histogram(
            "openlance_job_seconds", "Time of a job by phase", ["method", "phase"], buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self._tokens = Counter("openlance_tokens", "Tokens read and written", ["kind"], registry=registry)
        self._steps = Counter("openlance_steps", "Denoising steps done", registry=registry)
        self._following: set[asyncio.Task[None]] = set()
        ProcessCollector(registry=registry)
        registry.register(_EngineNow(engine))

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request. route: the template of its path, so that there are few."""
        self._requests.labels(method if method in _METHODS else "other", route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def follow(self, job: Job) -> None:
        """Count a job when it ends."""
        task = asyncio.get_running_loop().create_task(self._follow(job))
        self._following.add(task)  # the loop itself keeps no hold of its tasks
        task.add_done_callback(self._following.discard)

    async def _follow(self, job: Job) -> None:
        method, end = job.request.method, "done"
        try:
            outcome = await job.result()
        except JobError as error:
            end = error.why.value
        else:
            for phase, seconds in outcome.seconds.items():
                self._phases.labels(method, phase).observe(seconds)
            if isinstance(outcome, Spoken):
                self._tokens.labels("prompt").inc(outcome.prompt_tokens)
                self._tokens.labels("answer").inc(outcome.tokens)
        self._jobs.labels(method, end).inc()
        if job.started is not None:
            self._phases.labels(method, "waiting").observe(job.started - job.created)
        if job.ended is not None:
            self._phases.labels(method, "whole").observe(job.ended - job.created)
        if job.progress is not None:
            self._steps.inc(job.progress.step)


class _EngineNow(Collector):
    """The engine's state, read when it is asked for."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine = self._engine
        yield GaugeMetricFamily("openlance_jobs_waiting", "Jobs in the queue", engine.waiting)
        yield GaugeMetricFamily("openlance_jobs_running", "Jobs that workers have taken up", engine.running)
        alive = GaugeMetricFamily("openlance_worker_up", "Whether it takes jobs", labels=["worker", "device"])
        memory = GaugeMetricFamily(
            "openlance_worker_memory_bytes", "Resident memory of a worker", labels=["worker", "device"]
        )
        device = GaugeMetricFamily(
            "openlance_worker_device_bytes", "Memory allocated on its device", labels=["worker", "device"]
        )
        starts = CounterMetricFamily(
            "openlance_worker_restarts", "Times a worker was started again", labels=["worker", "device"]
        )
        for number, worker in enumerate(engine.workers):
            labels = [str(number), worker.device]
            alive.add_metric(labels, float(worker.alive))
            memory.add_metric(labels, worker.memory_bytes)
            device.add_metric(labels, worker.device_bytes)
            starts.add_metric(labels, worker.restarts)
        yield from (alive, memory, device, starts)


class Counted(Engine):
    """An engine whose jobs are counted, whoever submits them."""

    def __init__(self, config: ServeConfig):
        super().__init__(config)
        self.metrics = Metrics(self)

    def submit(self, request: JobRequest, *, time_limit: float | None = None) -> Job:
        """As of the engine."""
        job = super().submit(request, time_limit=time_limit)
        self.metrics.follow(job)
        return job
