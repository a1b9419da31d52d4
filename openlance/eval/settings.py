"""What a run needs beside the model, from a TOML file: data, scorer, judge, rewriter."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from openlance.errors import InputError


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible service.

    url: up to and with /v1. key: the name of the environment variable that holds the key, if it wants one.
    timeout: seconds for one answer; tries: for each request; parallel: requests at a time.
    """

    url: str
    model: str
    key: str = ""
    timeout: float = 120.0
    tries: int = 4
    parallel: int = 8

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise InputError(f"{self.url!r}: a service's url begins with http:// or https://")
        if self.timeout <= 0 or self.tries < 1 or self.parallel < 1:
            raise InputError(f"{self.url}: timeout must be above 0, tries and parallel at least 1")


@dataclass(frozen=True)
class Scorer:
    """The official scorer, a program of its own.

    command: its words, with {samples} and {output} (folders) and what else the benchmark fills in. folder:
    where it runs. environment: variables over our own. together: samples that one call judges; a call that
    fails loses no others. timeout: seconds for one call.
    """

    command: tuple[str, ...]
    folder: Path = Path()
    environment: Mapping[str, str] = field(default_factory=dict)
    together: int = 400
    timeout: float | None = None

    def __post_init__(self) -> None:
        if not self.command or self.together < 1:
            raise InputError("a scorer needs a command that is not empty, and together of at least 1")

    @property
    def stand_in(self) -> bool:
        """Whether this is the stand-in, whose scores mean nothing."""
        return "openlance.eval.stand_in" in self.command


@dataclass(frozen=True)
class EvalConfig:
    """All of it. data: the benchmark's own files. prompts: VIEScore's vie_prompts.py, for GEdit's judge."""

    data: Path | None = None
    scorer: Scorer | None = None
    judge: Endpoint | None = None
    rewriter: Endpoint | None = None
    prompts: Path | None = None


def read_config(path: Path | None) -> EvalConfig:
    """The configuration; paths in it are as seen from its own folder. Raises InputError that names what is
    wrong in it."""
    if path is None:
        return EvalConfig()
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as TOML ({error})") from error
    known = {item.name for item in fields(EvalConfig)}
    _only(path, "", found, known)
    for name in ("data", "prompts"):
        if name in found:
            found[name] = path.parent / str(found[name])
    config = EvalConfig(
        data=found.get("data"),
        scorer=_table(path, "scorer", found, Scorer),
        judge=_table(path, "judge", found, Endpoint),
        rewriter=_table(path, "rewriter", found, Endpoint),
        prompts=found.get("prompts"),
    )
    if config.scorer is None:
        return config
    command = tuple(map(str, config.scorer.command))
    return replace(
        config, scorer=replace(config.scorer, command=command, folder=path.parent / config.scorer.folder)
    )


def _table(path: Path, name: str, found: Mapping[str, Any], kind: Any) -> Any:
    if name not in found:
        return None
    table = found[name]
    if not isinstance(table, dict):
        raise InputError(f"{path}: {name} must be a table: [{name}]")
    _only(path, f"[{name}] ", table, {item.name for item in fields(kind)})
    try:
        return kind(**table)
    except TypeError as error:
        raise InputError(f"{path}: [{name}] is not whole ({error})") from error


def _only(path: Path, where: str, found: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(found) - known)
    if unknown:
        raise InputError(
            f"{path}: {where}has unknown {', '.join(unknown)}: known are {', '.join(sorted(known))}"
        )
