"""Data that is encoded beforehand: rows with VAE latents and ViT features, in Parquet files.

Encoded rows are read like any others (`open_source`, the lanes). The VAE's latents are the mean of the
posterior; both are kept in half precision. Captions, answers and the task stay with them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from tqdm import tqdm

from openlance.config import ModelConfig, to_dict
from openlance.data.example import Record, Source
from openlance.data.schemas import BadRow, to_example
from openlance.data.storage import need
from openlance.data.tally import Tally
from openlance.data.tasks import Past, Row, View, encode_rows, to_row
from openlance.errors import InputError
from openlance.sequence.template import Task

if TYPE_CHECKING:
    from openlance.model.vae import VAE

ENCODED = "openlance_row"
"""The column that marks an encoded row: its words as JSON. Beside it is `TENSORS`, in safetensors' format."""
TENSORS = "openlance_tensors"
SETTINGS = b"openlance"
"""Metadata of a file: what it was encoded with."""
TOGETHER = 16
"""Rows that are encoded at once."""


@dataclass(frozen=True, eq=False)
class Encoder:
    """What rows are encoded with. task: read them as this one; default, what their columns say.

    vision: patches [n, ...], grids [m, 3] -> features [n / 4, hidden], as `model.vision.Vision`.
    """

    model: ModelConfig
    vae: VAE
    vision: nn.Module
    task: Task | None = None
    seed: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What the result depends on, weights aside."""
        return {
            "model": self.model.name,
            "sizes": to_dict(self.model.sizes),
            "task": None if self.task is None else str(self.task),
            "seed": self.seed,
        }

    def rows(self, records: Iterator[Record], shard: int, tally: Tally) -> Iterator[Row]:
        """The records as encoded rows, some at a time; what cannot be used is counted and passed over."""
        readable = self._readable(records, shard, tally)
        while rows := list(islice(readable, TOGETHER)):
            seen = see_rows(encode_rows(rows, self.vae), self.vision)
            tally.rows += len(seen)
            yield from seen

    def _readable(self, records: Iterator[Record], shard: int, tally: Tally) -> Iterator[Row]:
        rng = np.random.default_rng((self.seed, shard))
        for record in records:
            try:
                example = to_example(record, self.model.sizes, rng, self.task)
                yield to_row(example, self.model)
            except BadRow as error:
                tally.skip(record.id, error.reason)
            except InputError as error:
                tally.skip(record.id, str(error))


@torch.no_grad()
def see_rows(rows: list[Row], vision: nn.Module) -> list[Row]:
    """The rows with the ViT's features [tokens, hidden] float32 on the CPU in place of patches."""
    weight = next(vision.parameters())

    def see(view: View) -> View:
        if view.patches is None or view.grid is None:
            return view
        frames, height, width = view.grid
        grid = torch.tensor([[frames, 2 * height, 2 * width]], device=weight.device)
        features = vision(view.patches.to(weight), grid).float().cpu()
        return replace(view, features=features, patches=None)

    return [row.map_views(see) for row in rows]


def encode_shard(source: Source, shard: int, out: Path, encoder: Encoder) -> Tally:
    """Encode a shard to a file of the folder `out`, which appears when it is whole.

    A file that is there already is left alone (the tally is then empty). Raises InputError where that was
    made with other settings, and for a shard that cannot be read.
    """
    file = out / f"shard-{shard:05d}.parquet"
    settings = {**encoder.settings, "shard": Path(source.shards[shard]).name}
    tally = Tally()
    if file.exists():
        _check_settings(file, settings)
        return tally
    out.mkdir(parents=True, exist_ok=True)
    draft = out / f".{file.name}.{os.getpid()}.draft"
    try:
        _write(draft, encoder.rows(source.read(shard), shard, tally), settings)
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)
    return tally


def encode_source(source: Source, out: Path, encoder: Encoder, *, quiet: bool = False) -> Tally:
    """Encode every shard, one after the other; the same call goes on where an earlier one was stopped."""
    tally = Tally()
    for shard in tqdm(range(len(source.shards)), desc="encode", unit="shard", disable=quiet):
        tally += encode_shard(source, shard, out, encoder)
    return tally


def encode_with_ray(
    source: Source, out: Path, build: Callable[[], Encoder], workers: int, gpus: float = 0
) -> Tally:
    """`encode_source` by Ray Data, in so many processes on any machines that share the folder.

    build: makes the encoder, once in each process. gpus: of each, or a part of one. Raises InputError where
    Ray is not installed.
    """
    try:
        import ray.data
    except ImportError as error:
        raise InputError("--ray needs Ray Data: pip install 'openlance[ray]'") from error

    class Shards:
        def __init__(self) -> None:
            self.encoder = build()

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            done = encode_shard(source, int(row["shard"]), out, self.encoder)
            return {"tally": json.dumps(done.as_dict())}

    count = len(source.shards)
    # A block for each shard from the start: a task that splits them could wait for ever for a CPU, once the
    # encoders hold all that there are.
    shards = ray.data.from_items([{"shard": shard} for shard in range(count)], override_num_blocks=count)
    done = shards.map(Shards, concurrency=workers, num_gpus=gpus)
    return sum((Tally.of(json.loads(row["tally"])) for row in done.iter_rows()), Tally())


def is_encoded(record: Record) -> bool:
    return ENCODED in record.values


def to_encoded_row(record: Record, task: Task | None = None) -> Row:
    """The row that an encoded record holds. Raises BadRow where it is damaged, or of another task."""
    try:
        row = json.loads(record.values[ENCODED])
        tensors = load_tensors(record.values[TENSORS])
        found = Task(row["task"])
        history = [
            Past(
                turn["prompt"],
                _view(f"history.{n}.reply", tensors) if turn["reply"] is None else turn["reply"],
                _views(f"history.{n}.sources", turn["sources"], tensors),
            )
            for n, turn in enumerate(row["history"])
        ]
        made = Row(
            record.id, found, row["prompt"], row["answer"],
            sources=_views("sources", row["sources"], tensors),
            target=_view("target", tensors) if found.generates else None,
            fixed_frames=tuple(row["fixed_frames"]),
            history=tuple(history),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise BadRow(record.id, f"a damaged encoded row ({error})") from error
    if task not in (None, found):
        raise BadRow(record.id, f"encoded for {found}, not {task}")
    return made


def to_values(row: Row) -> dict[str, Any]:
    """The columns of an encoded row: the inverse of `to_encoded_row`."""
    tensors: dict[str, Tensor] = {}
    history = []
    for n, turn in enumerate(row.history):
        _keep_all(f"history.{n}.sources", turn.sources, tensors)
        spoken = isinstance(turn.reply, str)
        if isinstance(turn.reply, View):
            _keep(f"history.{n}.reply", turn.reply, tensors)
        history.append(
            {"prompt": turn.prompt, "reply": turn.reply if spoken else None, "sources": len(turn.sources)}
        )
    _keep_all("sources", row.sources, tensors)
    if row.target is not None:
        _keep("target", row.target, tensors)
    words = {
        "id": row.id, "task": str(row.task), "prompt": row.prompt, "answer": row.answer,
        "sources": len(row.sources), "fixed_frames": list(row.fixed_frames), "history": history,
    }  # fmt: skip
    return {ENCODED: json.dumps(words, ensure_ascii=False), TENSORS: save_tensors(tensors)}


def _keep_all(name: str, views: tuple[View, ...], tensors: dict[str, Tensor]) -> None:
    for n, view in enumerate(views):
        _keep(f"{name}.{n}", view, tensors)


def _keep(name: str, view: View, tensors: dict[str, Tensor]) -> None:
    """Latents, and features with their grid: both [frames, rows, columns, channels]."""
    if view.latents is not None:
        tensors[f"{name}.latents"] = _half(view.latents)
    if view.features is not None and view.grid is not None:
        tensors[f"{name}.features"] = _half(view.features.reshape(*view.grid, -1))


def _half(tensor: Tensor) -> Tensor:
    return tensor.cpu().half().contiguous()


def _views(name: str, count: int, tensors: dict[str, Tensor]) -> tuple[View, ...]:
    return tuple(_view(f"{name}.{n}", tensors) for n in range(count))


def _view(name: str, tensors: dict[str, Tensor]) -> View:
    latents, features = tensors.get(f"{name}.latents"), tensors.get(f"{name}.features")
    if latents is None and features is None:
        raise ValueError(f"{name} is missing")
    view = View() if latents is None else View(latents=latents.float())
    if features is None:
        return view
    frames, rows, columns, _ = features.shape
    return replace(view, grid=(frames, rows, columns), features=features.flatten(0, 2).float())


def _write(file: Path, rows: Iterator[Row], settings: dict[str, Any]) -> None:
    arrow, parquet = need("pyarrow", "encoding"), need("pyarrow.parquet", "encoding")
    schema = arrow.schema(
        [(ENCODED, arrow.string()), (TENSORS, arrow.binary())], metadata={SETTINGS: json.dumps(settings)}
    )
    with parquet.ParquetWriter(file, schema, compression={ENCODED: "zstd", TENSORS: "none"}) as writer:
        while group := [to_values(row) for row in islice(rows, TOGETHER)]:
            writer.write_table(arrow.Table.from_pylist(group, schema))


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    arrow, parquet = need("pyarrow", "encoding"), need("pyarrow.parquet", "encoding")
    try:
        metadata = parquet.read_schema(file).metadata or {}
        found = json.loads(metadata.get(SETTINGS, b"null"))
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({error}): remove it to encode it anew") from error
    if found != settings:
        changed = [name for name in settings if (found or {}).get(name) != settings[name]]
        raise InputError(
            f"{file} was encoded with another {', '.join(changed)}: choose another folder, or remove it"
        )
