"""A look at a sample of a dataset: what its rows teach, which are bad, how large and how long they are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from openlance.config import ModelConfig
from openlance.data.encode import is_encoded, to_encoded_row
from openlance.data.example import Example, Record
from openlance.data.fields import BadRow
from openlance.data.media import Media, Video, as_frames
from openlance.data.save import contact_sheet
from openlance.data.schemas import to_example
from openlance.data.sources import Shards
from openlance.data.tasks import Row, to_row, to_sample
from openlance.errors import InputError
from openlance.sequence.template import Encode, Task

STREAM_FACTOR = 4  # of a stream whose length is not known, the sample is drawn from so many times its size
IDS = 3  # named of each kind of bad row
HEIGHT, GAP = 240, 8  # of a row of first frames, in pixels


@dataclass(frozen=True)
class Pick:
    """The rows of a shard that were drawn, in order. stream: the shard can only be read from its start."""

    shard: int
    rows: tuple[int, ...]
    stream: bool


@dataclass(frozen=True, eq=False)
class Seen:
    """A row that can be learned from.

    words: what is said and answered. tokens: of its sequence. sizes: (width, height) of its pictures and
    clips; clips: (frames that are kept, seconds from the first to the last) of the latter. picture: all first
    frames side by side.
    """

    id: str
    task: Task
    words: str
    tokens: int
    sizes: tuple[tuple[int, int], ...]
    clips: tuple[tuple[int, float], ...]
    picture: Image.Image | None


def draw_rows(source: Shards, rows: int, rng: np.random.Generator) -> tuple[list[Pick], list[BadRow]]:
    """(about `rows` rows, spread evenly over as many shards as possible; shards that cannot be read)."""
    chosen = sorted(rng.permutation(len(source.shards))[:rows].tolist())
    picks, bad = [], []
    for place, shard in enumerate(chosen):
        quota = rows // len(chosen) + (place < rows % len(chosen))
        try:
            count = source.count(shard)
        except InputError as error:
            bad.append(_bad_shard(source.shards[shard], error))
            continue
        among = STREAM_FACTOR * quota if count is None else count
        drawn = rng.choice(among, min(quota, among), replace=False)
        picks.append(Pick(shard, tuple(sorted(drawn.tolist())), stream=count is None))
    return picks, bad


def read_rows(source: Shards, pick: Pick) -> Iterator[Record | BadRow]:
    """The rows of a pick, as far as there are so many; a shard that breaks off gives a bad row."""
    try:
        if pick.stream:
            read = islice(source.read(pick.shard), pick.rows[-1] + 1)
            yield from (record for row, record in enumerate(read) if row in pick.rows)
        else:
            for row in pick.rows:
                yield from islice(source.read(pick.shard, row), 1)
    except InputError as error:
        yield _bad_shard(source.shards[pick.shard], error)


def examine(
    row: Record | BadRow,
    config: ModelConfig,
    encode: Encode,
    rng: np.random.Generator,
    task: Task | None = None,
) -> Seen | BadRow:
    """One row that was read, through the same functions as in training."""
    if isinstance(row, BadRow):
        return row
    try:
        if is_encoded(row):
            return look_encoded(to_encoded_row(row, task), config, encode)
        return look(to_example(row, config.sizes, rng, task), config, encode)
    except BadRow as bad:
        return bad


def look(example: Example, config: ModelConfig, encode: Encode) -> Seen:
    """What is worth knowing of an example. Raises InputError where the model's sizes are too small."""
    shown = [*example.sources, *([] if example.target is None else [example.target])]
    frames = [as_frames(media) for media in shown]
    return Seen(
        example.id,
        example.task,
        _words(example),
        sum(map(len, to_sample(to_row(example, config), encode, config))),
        tuple((clip.shape[2], clip.shape[1]) for clip in frames),
        tuple((len(media), (len(media) - 1) / media.fps) for media in shown if isinstance(media, Video)),
        _side_by_side([_first(media) for media in shown]) if shown else None,
    )


def look_encoded(row: Row, config: ModelConfig, encode: Encode) -> Seen:
    """The same of a row that was encoded beforehand: there is nothing to be looked at in it."""
    stride = config.vae.spatial_stride
    grids = [view.latent_grid for view in row.views()]
    sizes = tuple((grid[2] * stride, grid[1] * stride) for grid in grids if grid is not None)
    tokens = sum(map(len, to_sample(row, encode, config)))
    return Seen(row.id, row.task, _words(row), tokens, sizes, (), None)


def _words(row: Example | Row) -> str:
    said = f"{row.prompt} -> {row.answer}" if row.answer is not None else row.prompt
    return (f"(after {len(row.history)} turns) " if row.history else "") + said


@dataclass
class Findings:
    """What was seen so far."""

    address: str
    shards: int
    max_bad: float
    seen: list[Seen] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of bad rows among all that were looked at."""
        return len(self.bad) / max(1, len(self.bad) + len(self.seen))

    @property
    def failed(self) -> bool:
        return self.share > self.max_bad

    def add(self, found: Seen | BadRow) -> None:
        if isinstance(found, BadRow):
            self.bad.append(found)
        else:
            self.seen.append(found)

    def report(self) -> dict[str, Any]:
        """Everything as JSON."""
        reasons: dict[str, list[str]] = {}
        for row in self.bad:
            reasons.setdefault(_kind(row.reason), []).append(row.id)
        return {
            "address": self.address,
            "shards": self.shards,
            "rows": len(self.seen) + len(self.bad),
            "tasks": dict(Counter(str(row.task) for row in self.seen)),
            "bad": len(self.bad),
            "bad_share": self.share,
            "reasons": {
                reason: {"rows": len(ids), "first": ids[:IDS]}
                for reason, ids in sorted(reasons.items(), key=lambda item: -len(item[1]))
            },
            "width": _spread([size[0] for row in self.seen for size in row.sizes]),
            "height": _spread([size[1] for row in self.seen for size in row.sizes]),
            "seconds": _spread([seconds for row in self.seen for _, seconds in row.clips]),
            "tokens": _spread([row.tokens for row in self.seen]),
        }

    def table(self) -> str:
        """The report for reading."""
        report = self.report()
        tasks = ", ".join(f"{task} {count}" for task, count in report["tasks"].items())
        lines = [f"{report['rows']} rows looked at, of {self.shards} shards", f"tasks    {tasks or 'none'}"]
        for name in ("width", "height", "seconds", "tokens"):
            if spread := report[name]:
                values = ", ".join(f"{key} {value:g}" for key, value in spread.items())
                lines.append(f"{name:8} {values}")
        lines.append(f"bad      {report['bad']} ({self.share:.0%})")
        for reason, found in report["reasons"].items():
            lines.append(f"  {found['rows']} x {reason}: {', '.join(found['first'])}")
        return "\n".join(lines)

    def sheet(self) -> Image.Image | None:
        """The good rows with their words, what is shown left of what is to be made; None without any."""
        items: list[tuple[str, Media | str]] = [
            (f"{row.task}, {row.tokens} tokens{_length(row)}: {row.words}", row.picture or row.words)
            for row in self.seen
        ]
        return contact_sheet(items) if items else None


def _length(row: Seen) -> str:
    return "".join(f", {frames} frames of {seconds:.1f} s" for frames, seconds in row.clips)


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Smallest, middle, 95th percentile and largest; nothing of nothing."""
    if not values:
        return {}
    quantiles = np.quantile(values, (0, 0.5, 0.95, 1)).round(2).tolist()
    return dict(zip(("min", "median", "p95", "max"), quantiles, strict=True))


def _kind(reason: str) -> str:
    """A reason without the numbers and names that differ from row to row."""
    return re.sub(r"\b\d[\d.]*", "N", re.sub(r"'[^']*'", "'…'", reason))


def _bad_shard(address: str, error: InputError) -> BadRow:
    return BadRow(address, f"shard: {str(error).removeprefix(f'{address}: ')}")


def _first(media: Media) -> Image.Image:
    return Image.fromarray(media.frames[0]) if isinstance(media, Video) else media


def _side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """The pictures at one height, in a row."""
    fitted = [ImageOps.contain(picture, (4 * HEIGHT, HEIGHT)) for picture in pictures]
    row = Image.new("RGB", (sum(p.width + GAP for p in fitted) - GAP, max(p.height for p in fitted)), "white")
    left = 0
    for picture in fitted:
        row.paste(picture, (left, (row.height - picture.height) // 2))
        left += picture.width + GAP
    return row
