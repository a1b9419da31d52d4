"""Official scorers as programs of their own: called in parts, each of which is whole or not there."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openlance.config import to_dict
from openlance.data.save import save_json
from openlance.errors import InputError
from openlance.eval.harness import Run, Sample, read_back
from openlance.eval.settings import Scorer
from openlance.model.release import read_json

CONTENTS = "part.json"


@dataclass(frozen=True)
class Part:
    """Samples that one call judges. values: what the command names in braces, beside samples and output."""

    name: str
    samples: Sequence[Sample]
    values: Mapping[str, str] = field(default_factory=dict)


def parts_of(samples: Sequence[Sample], together: int, **values: str) -> list[Part]:
    """The samples in their order, so many in each part."""
    starts = range(0, len(samples), together)
    return [Part(f"part-{start:05d}", samples[start : start + together], values) for start in starts]


def score_parts(run: Run, parts: Sequence[Part]) -> None:
    """Call the scorer for each part that is not judged yet; what a call writes is `judged/PART/`.

    A part is judged again where its samples are others than they were. Raises InputError for a call that
    fails, with the last line that it said; the parts before it stay.
    """
    scorer = run.config.scorer
    if scorer is None:
        raise InputError(
            f"no scorer for {run.benchmark.name}: see `openlance eval setup {run.benchmark.name}`, "
            "and give the file that it writes by --config"
        )
    run.judged.mkdir(parents=True, exist_ok=True)
    save_json(read_back(to_dict(scorer) | {"stand_in": scorer.stand_in}), run.judged / "scorer.json")
    for part in run.bar(parts, "score"):
        contents = [_state(run, sample) for sample in part.samples]
        done = run.judged / part.name / CONTENTS
        if done.is_file() and read_json(done).get("samples") == contents:
            continue
        shutil.rmtree(run.judged / part.name, ignore_errors=True)
        _call(run, scorer, part, contents)


def _state(run: Run, sample: Sample) -> list[Any]:
    """What tells a sample from another one of its name."""
    stat = (run.samples / sample.path).stat()
    return [sample.path, stat.st_size, stat.st_mtime_ns]


def _call(run: Run, scorer: Scorer, part: Part, contents: list[Any]) -> None:
    """One call, on a folder of links to the samples; its output gets its name when it has ended well."""
    judged = run.judged.absolute()  # the scorer runs in a folder of its own
    links, output = judged / f".{part.name}.samples", judged / f".{part.name}.output"
    log = run.judged / f"{part.name}.log"
    for folder in (links, output):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    _link(run, part, links)
    values = {"samples": links, "output": output, "python": sys.executable, **part.values}
    command = [_fill(word, values) for word in scorer.command]
    try:
        with log.open("w") as file:
            ended = subprocess.run(
                command, cwd=scorer.folder, env={**os.environ, **scorer.environment}, stdout=file,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=scorer.timeout, check=False,
            ).returncode  # fmt: skip
    except OSError as error:
        raise InputError(f"the scorer cannot be started: {shlex.join(command)}: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{part.name}: the scorer took more than {scorer.timeout:g} s: see {log}") from error
    if ended or not any(output.iterdir()):
        said = log.read_text(errors="replace").strip().splitlines()
        why = f"failed with {ended}" if ended else "wrote nothing"
        raise InputError(
            f"{part.name}: the scorer {why} ({said[-1].strip() if said else 'without a word'}): see {log}; "
            "--stages score goes on from here"
        )
    save_json({"samples": contents}, output / CONTENTS)
    output.rename(run.judged / part.name)
    shutil.rmtree(links)


def _link(run: Run, part: Part, links: Path) -> None:
    for sample in part.samples:
        for name in (sample.path, *run.benchmark.aside(sample)):
            link = links / name
            if not link.is_symlink():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to((run.samples / name).absolute())


def _fill(word: str, values: Mapping[str, object]) -> str:
    """The word with each {name} of the values filled in; other braces stay."""
    for name, value in values.items():
        word = word.replace(f"{{{name}}}", str(value))
    return word


def written(run: Run, pattern: str) -> list[Path]:
    """The files of scorers below `judged/`. Raises InputError where there are none."""
    found = sorted(
        path
        for path in run.judged.rglob(pattern)
        if not any(part.startswith(".") for part in path.relative_to(run.judged).parts)
    )
    if not found:
        raise InputError(f"{run.judged}: no {pattern}: score first, or put the scorer's output there")
    return found
