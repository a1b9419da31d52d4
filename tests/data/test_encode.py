"""Datasets encoded beforehand: what was stored comes back, and the lanes read it like any other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from memory import Pictures, plan
from stored import jpeg, mp4, write_parquet
from tiny import config, network, vae

from openlance.data.encode import (
    Encoder,
    encode_shard,
    encode_source,
    encode_with_ray,
    is_encoded,
    to_encoded_row,
)
from openlance.data.example import Record
from openlance.data.feed import Feed
from openlance.data.lanes import Dataset
from openlance.data.mixture import Mixture, Schedule
from openlance.data.schemas import BadRow, to_example
from openlance.data.sources import open_source
from openlance.data.tasks import Row, View, encode_rows, to_row
from openlance.errors import InputError
from openlance.sequence.segment import Kind, Role
from openlance.sequence.template import Task

ROWS: list[dict[str, Any]] = [
    {"caption": "one", "image_bytes": jpeg(10)},
    {"caption": "two", "input_image_bytes": jpeg(20), "output_image_bytes": jpeg(30)},
    {"image_bytes": jpeg(40), "caption_q": "grey?", "caption_a": "yes"},
    {"caption": "three", "image_bytes": b"no picture"},
    {"caption": "four", "video_bytes": mp4(50)},
    {
        "turns": [
            {"role": "user", "content": [{"type": "image", "image": 0}, {"type": "text", "text": "lighter"}]},
            {"role": "assistant", "content": [{"type": "image", "image": 1}]},
        ],
        "media": [jpeg(60), jpeg(70)],
    },
]  # fmt: skip


def encoder(**changes: Any) -> Encoder:
    return replace(Encoder(config(), vae(), network().vision), **changes)


def dataset(folder: Path, shards: int = 2) -> Path:
    folder.mkdir()
    for shard in range(shards):
        for number, row in enumerate(ROWS[:5]):
            write_parquet(folder / f"{shard}-{number}.parquet", [row])
    return folder


def read(out: Path) -> list[Record]:
    source = open_source(str(out))
    return [record for shard in range(len(source.shards)) for record in source.read(shard)]


def fresh(values: dict[str, Any]) -> Row:
    example = to_example(Record("a", values), config().sizes, np.random.default_rng(0))
    (row,) = encode_rows([to_row(example, config())], vae())
    return row


class InMemory:
    """Rows as one shard."""

    shards = ("rows",)

    def read(self, shard: int, start: int = 0) -> Any:
        return (Record(f"rows:{n}", row) for n, row in enumerate(ROWS[start:], start))


def test_what_was_encoded_comes_back(tmp_path: Path) -> None:
    tally = encode_shard(InMemory(), 0, tmp_path, encoder())
    assert tally.rows == 5 and [found.first for found in tally.skipped.values()] == [["rows:3"]]
    records = read(tmp_path)
    assert all(map(is_encoded, records))
    usable = [values for values in ROWS if values is not ROWS[3]]
    for record, values in zip(records, usable, strict=True):
        found, expected = to_encoded_row(record), fresh(values)
        assert (found.task, found.prompt, found.answer) == (expected.task, expected.prompt, expected.answer)
        assert found.fixed_frames == expected.fixed_frames and len(found.history) == len(expected.history)
        for view, other in zip(found.views(), expected.views(), strict=True):
            assert view.grid == other.grid and view.latent_grid == other.latent_grid
            _same(view.latents, other.latents)
            _same(view.features, None if other.patches is None else see(other))


def see(view: View) -> torch.Tensor:
    assert view.grid is not None
    frames, rows, columns = view.grid
    with torch.no_grad():
        return network().vision(view.patches, torch.tensor([[frames, 2 * rows, 2 * columns]]))


def _same(found: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    """Up to one step of half precision: what is encoded together may be summed in another order."""
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        torch.testing.assert_close(found, expected, rtol=2**-10, atol=1e-6)


def test_the_lanes_read_encoded_rows(tmp_path: Path) -> None:
    """Without a VAE or vision tower, and as many tokens as from the pictures themselves."""
    encode_shard(Pictures(5), 0, tmp_path, encoder())
    settings: dict[str, Any] = {
        "mixture": Schedule.constant(Mixture()),
        "lanes": 1,
        "budget": 400,
        "longest": 400,
    }
    encoded = Feed(plan(Dataset("pictures", open_source(str(tmp_path)), (Task.T2I,)), **settings))
    plain = Feed(plan(Dataset("pictures", Pictures(5), (Task.T2I,)), **settings), vae=vae())
    for step in range(3):
        for found, expected in zip(encoded.packs(step), plain.packs(step), strict=True):
            assert found.tokens == expected.tokens
            assert [row.prompt for row in found.rows] == [row.prompt for row in expected.rows]
            for row, other in zip(found.rows, expected.rows, strict=True):
                assert row.target is not None and other.target is not None
                torch.testing.assert_close(
                    row.target.latents, other.target.latents, atol=4e-3, rtol=1e-3
                )  # fp16


def test_features_stand_in_the_samples(tmp_path: Path) -> None:
    encode_shard(Pictures(3), 0, tmp_path, encoder(task=Task.X2T_IMAGE))
    source = open_source(str(tmp_path))
    feed = Feed(
        plan(Dataset("pictures", source, (Task.X2T_IMAGE,)), mixture=Schedule.constant(Mixture()), lanes=1)
    )
    (pack,) = feed.packs(0)
    seen = [segment for sample in pack.samples for segment in sample if segment.kind is Kind.VIT]
    assert seen and all(s.patches is None and len(s.features) == s.inner for s in seen)  # type: ignore[arg-type]
    assert all(s.role is Role.SOURCE for s in seen)


def test_rows_of_another_task_and_damaged_ones_are_bad(tmp_path: Path) -> None:
    encode_shard(InMemory(), 0, tmp_path, encoder())
    record = read(tmp_path)[0]
    with pytest.raises(BadRow, match="encoded for t2i, not x2t_image"):
        to_encoded_row(record, Task.X2T_IMAGE)
    for damaged in ({"openlance_tensors": b"x" * 9}, {"openlance_row": "{"}, {"openlance_tensors": None}):
        with pytest.raises(BadRow, match="a damaged encoded row"):
            to_encoded_row(Record("a", {**record.values, **damaged}))


def test_shards_that_are_there_are_left_alone(tmp_path: Path) -> None:
    source, out = open_source(str(dataset(tmp_path / "in"))), tmp_path / "out"
    encode_shard(source, 2, out, encoder())
    stamp = (out / "shard-00002.parquet").stat().st_mtime_ns
    tally = encode_source(source, out, encoder(), quiet=True)
    assert tally.rows == 7 and sum(found.count for found in tally.skipped.values()) == 2
    assert (out / "shard-00002.parquet").stat().st_mtime_ns == stamp
    assert sorted(path.name for path in out.iterdir()) == [f"shard-{n:05d}.parquet" for n in range(10)]
    with pytest.raises(InputError, match=r"shard-00000\.parquet was encoded with another seed"):
        encode_source(source, out, encoder(seed=1), quiet=True)


def test_a_failed_shard_leaves_nothing(tmp_path: Path) -> None:
    class Failing(InMemory):
        def read(self, shard: int, start: int = 0) -> Any:
            yield from list(super().read(shard, start))[:1]
            raise InputError("rows: cut short")

    with pytest.raises(InputError, match="cut short"):
        encode_shard(Failing(), 0, tmp_path, encoder())
    assert list(tmp_path.iterdir()) == []


def test_ray_is_asked_for_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(InputError, match=r"--ray needs Ray Data: pip install 'openlance\[ray\]'"):
        encode_with_ray(InMemory(), tmp_path, encoder, workers=1)


@pytest.mark.slow
def test_ray_writes_the_same_files(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="needs the extra `ray`")
    source = open_source(str(dataset(tmp_path / "in", 1)))
    alone = encode_source(source, tmp_path / "alone", encoder(), quiet=True)
    here, above = Path(__file__).parent, Path(__file__).parents[1]
    paths = os.pathsep.join(map(str, (here, above, above.parent)))
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    try:
        there = encode_with_ray(source, tmp_path / "there", encoder, workers=2)
    finally:
        ray.shutdown()
    assert (there.rows, len(there.skipped)) == (alone.rows, len(alone.skipped)) == (4, 1)
    for file in sorted((tmp_path / "alone").iterdir()):
        assert (tmp_path / "there" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_the_command_encodes(tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder = dataset(tmp_path / "in", 1)
    command = [
        sys.executable,
        "-m",
        "openlance",
        "data",
        "encode",
        str(folder),
        "--out",
        str(tmp_path / "out"),
    ]
    options = ["--model", str(tiny_checkpoint), "--device", "cpu", "--quiet"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "out: 4 rows; skipped 1 (" in done.stdout
    assert len(read(tmp_path / "out")) == 4


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder, out = dataset(tmp_path / "in", 8), tmp_path / "out"
    command = [
        sys.executable, "-m", "openlance", "data", "encode", str(folder), "--out", str(out),
        "--model", str(tiny_checkpoint), "--device", "cpu", "--quiet",
    ]  # fmt: skip
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while first.poll() is None and len(list(out.glob("shard-*"))) < 3:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    whole = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    assert len(whole) >= 3
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert len(read(out)) == 32
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    assert {name: after[name] for name in whole} == whole
