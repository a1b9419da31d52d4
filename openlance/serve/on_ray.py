"""The server on Ray Serve: replicas on several machines, each with its own worker process and device.

    serve run openlance.serve.on_ray:build model=weights replicas=4 gpus=1

Every replica is a whole server: the same application, engine and worker as of `openlance serve`. It needs
Ray: `pip install "openlance[serve,ray]"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any, get_type_hints

from fastapi import FastAPI
from ray import serve

from openlance.errors import InputError
from openlance.serve.app import create_app
from openlance.serve.logs import write_json_lines
from openlance.serve.settings import ServeConfig


def build(given: Mapping[str, str]) -> serve.Application:
    """An application for `serve run`.

    given: fields of `ServeConfig` as text, lists with commas; replicas: how many; gpus: of each. Host and
    port are Ray's own. Raises InputError for what is no setting, and for keys that are missing: Ray listens
    where it likes, so a server without API keys must say `open=yes`.
    """
    settings = dict(given)
    replicas, gpus = int(settings.pop("replicas", "1")), float(settings.pop("gpus", "0"))
    open_to_all = settings.pop("open", "no") == "yes"
    config = _config(settings)
    if not (config.api_keys or open_to_all):
        raise InputError("give api_keys=HASH (see `openlance serve --new-key`), or open=yes to let all in")
    if replicas > 1:
        config = replace(config, videos=False)  # a job is known to the replica that has it
    deployment = serve.deployment(
        name="openlance",
        num_replicas=replicas,
        max_ongoing_requests=config.queue + config.batch,
        ray_actor_options={"num_gpus": gpus, "num_cpus": 1},
        graceful_shutdown_timeout_s=config.patience + 30,
    )
    return deployment(serve.ingress(partial(_application, config))()).bind()


def _application(config: ServeConfig) -> FastAPI:
    """Made on the replica, where the devices are that Ray gave it."""
    write_json_lines()
    return create_app(config)


def _config(settings: Mapping[str, str]) -> ServeConfig:
    kinds, known = get_type_hints(ServeConfig), {field.name for field in fields(ServeConfig)}
    for name in settings:
        if name not in known or name in ("host", "port", "adapters"):
            raise InputError(f"{name} is no setting here: see openlance.serve.settings.ServeConfig")
    return ServeConfig(**{name: _read(text, kinds[name]) for name, text in settings.items()})


def _read(text: str, kind: Any) -> Any:
    if kind is bool:
        return text.lower() in ("yes", "true", "1")
    if kind in (int, float):
        return kind(text)
    return tuple(text.split(",")) if kind == tuple[str, ...] else text
