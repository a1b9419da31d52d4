"""`openlance bench`: measured time over what the device could do at best."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from openlance.cli.options import LoadOptions, given, option
from openlance.errors import InputError

if TYPE_CHECKING:
    from openlance.infer.bench import Bench, Ceilings, Job, Phase

REPEATS = 3
COLUMNS = ("work", "phase", "seconds", "TFLOP", "floor", "ratio")


def bench(
    *,
    task: Annotated[str | None, option("One task only: t2i, t2v, image_edit or chat. Default: all.")] = None,
    quick: Annotated[bool, option("Usual sizes only, each timed once.")] = False,
    out: Annotated[Path | None, option("Also write the numbers to this JSON file.")] = None,
    load: LoadOptions,
) -> None:
    """Measure what a model takes here, phase by phase, beside the least that this device could need.

    First the device's two ceilings: operations of a large matrix product and bytes of a large copy, each a
    second, in the dtype of the model. The floor of a phase is its operations, or its weights read once a
    pass, at these; a ratio of 2 is twice the floor. Of denoising, one step with guidance and one without are
    timed, and counted for all. A preset without weights here (lance_3b) gets random ones.

    For example:
      openlance bench
      openlance bench --model lance_3b --device cuda --task t2v
    """
    from openlance.infer.bench import jobs_of, measure_ceilings

    if out is not None and out.suffix.lower() != ".json":
        raise InputError(f"{out}: the name must end in .json")
    config, made, loaded = _model(load, 1 if quick else REPEATS)
    jobs = _choose(jobs_of(config, quick), task)
    dtype = str(made.model.dtype).removeprefix("torch.")
    ceilings = measure_ceilings(made.model.device, made.model.dtype)
    print(
        f"{config.name}, {dtype}, {_device(made)}: matrix products {ceilings.operations / 1e12:.3g} TFLOP/s, "
        f"memory {ceilings.bytes / 1e9:.3g} GB/s; weights {loaded}\n"
    )
    phases = list(_run(made, jobs, load.quiet))
    print("\n".join(table(phases, ceilings)))
    if out is not None:
        record = _record(phases, ceilings)
        out.write_text(json.dumps({"model": config.name, "dtype": dtype, **record}, indent=1) + "\n")


def table(phases: Sequence[Phase], ceilings: Ceilings) -> list[str]:
    """Lines of a Markdown table: each phase, and each job's sum."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|" + "---:|" * 4]
    for job, members in groupby(phases, key=lambda phase: phase.job):
        own = list(members)
        rows = [(p.name, p.seconds, p.cost.operations, p.cost.floor(ceilings)) for p in own]
        rows.append(("all", *(sum(row[column] for row in rows) for column in (1, 2, 3))))  # type: ignore[arg-type, misc]
        for name, seconds, operations, floor in rows:
            numbers = (f"{seconds:.3g}", f"{operations / 1e12:.3g}", f"{floor:.3g}", f"{seconds / floor:.1f}")
            lines.append(f"| {job.name} | {name} | {' | '.join(numbers)} |")
    return lines


def _record(phases: Sequence[Phase], ceilings: Ceilings) -> dict[str, Any]:
    found = [
        {"work": p.job.name, "phase": p.name, "seconds": p.seconds, "floor": p.cost.floor(ceilings)}
        | asdict(p.cost)
        for p in phases
    ]
    return {"ceilings": asdict(ceilings), "phases": found}


def _model(load: LoadOptions, repeats: int) -> tuple[Any, Bench, str]:
    """(configuration, bench, how its weights came): loaded, or random where a preset has none."""
    import torch

    from openlance.config import PRESETS, preset
    from openlance.infer.bench import Bench, random_bench
    from openlance.infer.device import pick_device
    from openlance.model.hub import BUNDLED
    from openlance.sequence.template import Task

    if load.model in PRESETS and load.model not in BUNDLED:
        useless = sorted(set(given(load)) - {"model", "device", "dtype", "quiet"})
        if useless:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in useless)
            raise InputError(f"{names}: {load.model} has random weights here; give the folder of its weights")
        device = pick_device(load.device)
        dtype = load.dtype or ("float32" if device.type == "cpu" else "bfloat16")
        config = preset(load.model)
        return config, random_bench(config, device, getattr(torch, dtype), repeats), "random"
    start = time.perf_counter()
    lance = load.pipeline(Task)
    assert lance.vae is not None
    seconds = time.perf_counter() - start
    return lance.config, Bench(lance.model, lance.vae, repeats), f"loaded in {seconds:.1f} s"


def _choose(jobs: list[Job], task: str | None) -> list[Job]:
    if task is None:
        return jobs
    chosen = [job for job in jobs if job.task == task]
    if not chosen:
        names = ", ".join(dict.fromkeys(str(job.task) for job in jobs))
        raise InputError(f"--task {task}: nothing is measured of it; choose one of {names}")
    return chosen


def _run(made: Bench, jobs: Sequence[Job], quiet: bool) -> Iterator[Phase]:
    with _bar(quiet) as bar:
        for job in jobs:
            bar.set_description(job.name)
            for phase in made.run(job):
                bar.update()
                yield phase


@contextmanager
def _bar(quiet: bool) -> Iterator[Any]:
    """A bar over phases, on stderr; none where that is no terminal."""
    from tqdm import tqdm

    with tqdm(unit="phase", disable=quiet or not sys.stderr.isatty(), leave=False) as bar:
        yield bar


def _device(made: Bench) -> str:
    import torch

    device = made.model.device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"
