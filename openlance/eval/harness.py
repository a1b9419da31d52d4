"""One harness for all benchmarks: what a benchmark is, and how its samples are made.

A run has a folder: `samples/` in the layout that the official scorer reads, `judged/` with what the scorer
wrote, `scores.json` and `report.html`. Every step looks at what is there and does the rest.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tqdm import tqdm

from openlance.config import SamplingConfig, to_dict
from openlance.data.media import load_image, load_video
from openlance.data.save import save_json
from openlance.errors import InputError
from openlance.infer.generate import Cancelled
from openlance.infer.orders import Order, override
from openlance.infer.result import Answer, Generated
from openlance.model.release import read_json, some

if TYPE_CHECKING:
    from openlance.eval.results import Scored
    from openlance.eval.settings import EvalConfig
    from openlance.infer.pipeline import LancePipeline

SEED = 42
TOGETHER = 32  # samples that are ordered at once; their media and results are what memory holds of them


@dataclass(frozen=True)
class Sample:
    """One file to make.

    path: where it goes below `samples/`, its name in every message. prompt: the words as published. seeds:
    one for each result that the file is made of. facts: what else the benchmark knows of it.
    """

    path: str
    prompt: str
    seeds: tuple[int, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Making:
    """How samples are made. size: (height, width) in pixels; options: of SamplingConfig, by name."""

    size: tuple[int, int] | None = None
    frames: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = SEED

    def seeds(self, count: int) -> tuple[int, ...]:
        """Of the samples of one prompt: they count up."""
        return tuple(self.seed + index for index in range(count))


_INTERVAL = (0.4, 1.0)
IMAGES = Making(
    (768, 768), None, {"steps": 50, "shift": 3.5, "guidance": 4.0, "guidance_interval": _INTERVAL}
)
"""The settings of Lance's published image results."""
# Lance's video results are given as 50 frames; the VAE makes 4 k + 1, so both samplers make 49 of them.
CLIPS = Making((480, 848), 49, {"steps": 30, "shift": 3.0, "guidance": 4.0, "guidance_interval": _INTERVAL})
"""The settings of Lance's published video results, at the checkpoint's 12 frames a second."""
ANSWERS = Making()

Result = Generated | Answer


class Benchmark(ABC):
    """Samples to make, a score for them, and the numbers that follow.

    tasks: what the model must be able to do. published: entries of the whole benchmark, where it has a size
    of its own. making: how samples are made. limit: only so many entries, spread evenly over the list.
    """

    name: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]]
    published: ClassVar[int | None]
    default: ClassVar[Making] = IMAGES

    def __init__(self, making: Making, limit: int | None = None):
        self.making, self.limit = making, limit

    @abstractmethod
    def entries(self) -> Sequence[Any]:
        """All entries of the data; the limit is not looked at. Raises InputError for data of another form."""

    @abstractmethod
    def samples_of(self, entry: Any) -> list[Sample]:
        """The files that one entry asks for."""

    @abstractmethod
    def orders(self, lance: LancePipeline, sample: Sample, words: str) -> list[Order]:
        """One order for each seed of the sample. words: the prompt, rewritten where that is wanted."""

    @abstractmethod
    def write(self, sample: Sample, results: Sequence[Any], path: Path) -> None:
        """Write the file at once, or not at all."""

    @abstractmethod
    def check(self, sample: Sample, path: Path) -> None:
        """Raises InputError where the file is missing, damaged or of another size."""

    @abstractmethod
    def score(self, run: Run) -> None:
        """Bring the scores of all samples into `judged/`; what is judged already stays."""

    @abstractmethod
    def aggregate(self, run: Run) -> Scored:
        """Numbers from the files in `judged/` alone."""

    def aside(self, sample: Sample) -> Mapping[str, Callable[[Path], object]]:
        """Files that stand beside a sample: path below `samples/` → what writes it."""
        return {}

    def counted(self) -> int:
        """Entries of this run, as `published` counts them."""
        return len(self.chosen())

    def chosen(self) -> list[Any]:
        """The entries of this run: all, or as many as the limit says."""
        entries = self.entries()
        if self.limit is None or self.limit >= len(entries):
            return list(entries)
        return [entries[index * len(entries) // self.limit] for index in range(self.limit)]

    def samples(self) -> list[Sample]:
        """Of this run. Raises InputError where two have one name."""
        found = [sample for entry in self.chosen() for sample in self.samples_of(entry)]
        times = Counter(sample.path for sample in found)
        twice = [path for path, count in times.items() if count > 1]
        if twice:
            raise InputError(f"{self.name}: several samples would be the file {some(twice, 3)}")
        for sample in found:
            if ".." in Path(sample.path).parts or Path(sample.path).is_absolute():
                raise InputError(f"{self.name}: a sample cannot be named {sample.path!r}")
        return found


class Pictures(Benchmark):
    """A benchmark of pictures from words."""

    tasks = ("t2i",)

    def orders(self, lance: LancePipeline, sample: Sample, words: str) -> list[Order]:
        size, options = self.making.size, self.making.options
        return [lance.order.generate_image(words, size=size, seed=seed, **options) for seed in sample.seeds]

    def write(self, sample: Sample, results: Sequence[Any], path: Path) -> None:
        results[0].save(path)

    def check(self, sample: Sample, path: Path) -> None:
        check_picture(path, self.making.size)


@dataclass(frozen=True)
class Run:
    """One run of a benchmark: its folder, and what the configuration says of scorers and judges."""

    benchmark: Benchmark
    folder: Path
    config: EvalConfig
    quiet: bool = False
    as_published: bool = False

    @property
    def samples(self) -> Path:
        return self.folder / "samples"

    @property
    def judged(self) -> Path:
        return self.folder / "judged"

    def bar(self, items: Any, what: str, total: int | None = None) -> tqdm:
        """A progress bar on stderr."""
        return tqdm(
            items, desc=f"{self.benchmark.name}: {what}", total=total, disable=self.quiet, leave=False
        )


def make(
    run: Run, lance: LancePipeline, *, share: tuple[int, int] = (0, 1),
    reword: Callable[[str], str] | None = None,
) -> dict[str, str]:  # fmt: skip
    """Make what is not there yet, of the samples that fall to this process; gives what failed, and why.

    share: (rank, number of processes); sample i falls to process i mod n. A sample fails alone: what cannot
    be used for one (an instruction without words, a source that cannot be read) leaves the others.
    """
    rank, size = share
    mine = run.benchmark.samples()[rank::size]
    todo = [sample for sample in run.bar(mine, "look") if not is_whole(run, sample)]
    failures: dict[str, str] = {}
    with run.bar(None, "sample", total=len(mine)) as bar:
        bar.update(len(mine) - len(todo))
        for start in range(0, len(todo), TOGETHER):
            group = todo[start : start + TOGETHER]
            for sample, failed in _make_some(run, lance, group, reword or str):
                bar.update()
                if failed is not None:
                    failures[sample.path] = str(failed)
    return failures


def _make_some(
    run: Run, lance: LancePipeline, group: list[Sample], reword: Callable[[str], str]
) -> Iterator[tuple[Sample, InputError | None]]:
    """Each sample of the group when its file is written, or with what was wrong."""
    orders: list[Order] = []
    owners: list[Sample] = []
    for sample in group:
        try:
            wanted = run.benchmark.orders(lance, sample, reword(sample.prompt))
        except InputError as error:
            yield sample, error
            continue
        orders += wanted
        owners += [sample] * len(wanted)
    found: dict[str, dict[int, Result]] = {}
    for index, result in lance.run_each(orders):
        assert not isinstance(result, Cancelled), "nothing here cancels"
        sample = owners[index]
        results = found.setdefault(sample.path, {})
        results[index] = result
        if len(results) == len(sample.seeds):
            _write(run, sample, [results[place] for place in sorted(results)])
            del found[sample.path]
            yield sample, None


def _write(run: Run, sample: Sample, results: list[Result]) -> None:
    for name, write in run.benchmark.aside(sample).items():
        write(run.samples / name)
    path = run.samples / sample.path
    path.parent.mkdir(parents=True, exist_ok=True)
    run.benchmark.write(sample, results, path)


def is_whole(run: Run, sample: Sample) -> bool:
    """Whether the file is there, readable, and of the right size, and what stands beside it is there too."""
    path = run.samples / sample.path
    if not path.is_file() or not all((run.samples / name).is_file() for name in run.benchmark.aside(sample)):
        return False
    try:
        run.benchmark.check(sample, path)
    except InputError:
        return False
    return True


def check_samples(run: Run) -> list[Sample]:
    """The samples, all of them there and whole. Raises InputError that names those that are not.

    A file that no sample has is named too: official scorers average over all that they find.
    """
    samples = run.benchmark.samples()
    wrong = []
    for sample in run.bar(samples, "look"):
        path = run.samples / sample.path
        try:
            if not path.is_file():
                raise InputError(f"{path}: missing")
            run.benchmark.check(sample, path)
        except InputError as error:
            wrong.append(str(error))
    if wrong:
        raise InputError(
            f"{len(wrong)} of {len(samples)} samples are missing or not whole; --stages sample makes them: "
            + "; ".join(wrong[:3])
        )
    every = [sample for entry in run.benchmark.entries() for sample in run.benchmark.samples_of(entry)]
    known = {sample.path for sample in every}
    known |= {name for sample in every for name in run.benchmark.aside(sample)}
    strange = sorted(
        str(path.relative_to(run.samples))
        for path in run.samples.rglob("*")
        if path.is_file()
        and not path.name.startswith(".")
        and str(path.relative_to(run.samples)) not in known
    )
    if strange:
        raise InputError(f"{run.samples}: files that no sample has: {some(strange, 3)}: move them away")
    return samples


def check_picture(path: Path, size: tuple[int, int] | None) -> None:
    """Raises InputError for a file that is no whole picture of this (height, width); None: of any."""
    picture = load_image(path)
    if size is not None and picture.size != size[::-1]:
        raise InputError(f"{path}: {picture.height}x{picture.width} pixels, not {size[0]}x{size[1]}")


def check_clip(path: Path, size: tuple[int, int] | None, frames: int | None) -> None:
    """Raises InputError for a file that is no whole clip of this (height, width) and number of frames."""
    count = 0

    def last(found: int, fps: float) -> list[int]:
        nonlocal count
        count = found
        return [found - 1]

    clip = load_video(path, select=last)  # walks through all of it and keeps one frame
    if frames is not None and count != frames:
        raise InputError(f"{path}: {count} frames, not {frames}")
    if size is not None and clip.frames.shape[1:3] != size:
        raise InputError(
            f"{path}: {clip.frames.shape[1]}x{clip.frames.shape[2]} pixels, not {size[0]}x{size[1]}"
        )


def keep_settings(run: Run, settings: Mapping[str, Any]) -> None:
    """Write down what samples are made with; a folder with samples made otherwise is refused."""
    file = run.folder / "settings.json"
    wanted = dict(settings) | {"benchmark": run.benchmark.name, "making": to_dict(run.benchmark.making)}
    override(
        SamplingConfig(), run.benchmark.making.options
    )  # what cannot be is refused before weights are loaded
    wanted = read_back(wanted)
    if file.is_file():
        before = read_json(file)
        changed = sorted(
            name for name in before.keys() | wanted.keys() if before.get(name) != wanted.get(name)
        )
        if changed:
            raise InputError(
                f"{file}: the samples there were made with other settings ({', '.join(changed)}): "
                "give another folder by --out"
            )
    else:
        save_json(wanted, file)


def read_back(value: Any) -> Any:
    """A value as JSON gives it back: tuples are lists, paths are texts."""
    return json.loads(json.dumps(value, default=str))


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most so many of the items, evenly from first to last."""
    step = max(1, -(-len(items) // count))
    return list(islice(items, 0, None, step))
