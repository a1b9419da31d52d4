"""How a server is set up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ServeConfig:
    """One server.

    model, variant, dtype, quantize, max_memory: as of `LancePipeline.from_pretrained`. adapters: LoRA folders
    by the name they get. devices: one worker process for each; default all CUDA devices, or the CPU. name:
    what clients call the model; default the checkpoint's own.
    """

    model: str = "nano"
    variant: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    max_memory: str | None = None
    name: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[str, ...] = ()

    host: str = "127.0.0.1"
    """Address to listen on; anything but loopback asks for api keys."""
    port: int = 8000
    page: bool = True
    """Whether the web page is at /."""
    videos: bool = True
    """Whether clips can be asked for as jobs, at /v1/videos."""

    queue: int = 64
    """Jobs that may wait; more are refused with 429."""
    batch: int = 8
    """Jobs that a worker takes up together, at most."""
    tokens_together: int = 32_768
    """Of jobs that run together: bounds the memory."""
    time_limit: float = 600.0
    """Seconds that a job may take once it runs."""
    patience: float = 60.0
    """Seconds that a shutdown waits for the jobs that were accepted."""

    api_keys: tuple[str, ...] = ()
    """SHA-256 of each key that is let in, in hexadecimal; none: everybody is."""
    max_body: int = 64 * 2**20
    """Bytes of a request."""
    max_text: int = 200_000
    """Characters that are said in a request."""
    max_pixels: int = 40_000_000
    """Of a picture that is sent, or a frame."""
    max_input_frames: int = 3_000
    """Of a clip that is sent."""
    max_size: int = 2_048
    """Side of what is made, in pixels."""
    max_frames: int = 241
    """Of a clip that is made."""
    max_steps: int = 200
    max_pictures: int = 8
    """`n` of one request, and pictures that it shows."""
    max_tokens: int = 8_192
    """Of an answer."""
    hosts: tuple[str, ...] = ()
    """Names of the hosts that addresses of media may be fetched from; none: nothing is fetched."""
    safety: str | None = None
    """A function as package.module:name, asked about every prompt and everything made."""

    results: str = "openlance-results"
    """Where clips are kept: a folder, or an fsspec address."""
    database: str | None = None
    """An SQLAlchemy address for the jobs; default an SQLite file in the folder of results."""
    keep_hours: float = 24.0
    """After this, results are removed."""
    telemetry: str | None = None
    """An OpenTelemetry collector (OTLP over HTTP)."""
