"""`openlance data check`, on real files."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ran import Run, refused

from openlance.config import preset
from openlance.data.buckets import Buckets


def jpeg(width: int = 90, height: int = 60) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 99, np.uint8)).save(file, "JPEG")
    return file.getvalue()


def write(rows: list[dict], path: str) -> str:
    import pyarrow
    import pyarrow.parquet

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def clean(run: Run, clip: Path) -> str:
    """A folder of two shards: pictures with captions, and clips with an answer."""
    write([{"caption": f"picture {n}", "image_bytes": jpeg()} for n in range(6)], "rows/a.parquet")
    row = {"video_bytes": clip.read_bytes(), "caption_q": "What?", "caption_a": "Noise."}
    write([row] * 3, "rows/b.parquet")
    return "rows"


def test_a_good_dataset_passes(run: Run, clean: str) -> None:
    ran = run("data", "check", clean, "--rows", 6, "--seed", 1)
    assert ran.code == 0, ran.err
    assert "6 rows looked at, of 2 shards" in ran.out
    assert "t2i 3, x2t_video 3" in ran.out
    report = json.loads(Path("data_check/report.json").read_text())
    assert report["tasks"] == {"t2i": 3, "x2t_video": 3}
    assert (report["rows"], report["bad"], report["reasons"]) == (6, 0, {})
    assert report["width"]["max"] == 90
    assert report["height"]["min"] == 48
    assert report["seconds"]["min"] == pytest.approx(report["seconds"]["max"])
    with Image.open("data_check/sheet.png") as sheet:
        assert sheet.height > sheet.width / 2


def test_the_same_seed_draws_the_same_rows(run: Run, clean: str) -> None:
    reports = []
    for seed in (1, 1, 2):
        assert run("data", "check", clean, "--rows", 4, "--seed", seed).code == 0
        reports.append(Path("data_check/sheet.png").read_bytes())
    assert reports[0] == reports[1]
    assert reports[0] != reports[2]


def test_tokens_are_those_of_the_sample(run: Run) -> None:
    """A preset without files counts a token for four characters, and the buckets of real samples."""
    write([{"caption": "word" * 10, "image_bytes": jpeg()}], "a.parquet")
    assert run("data", "check", "a.parquet", "--model", "lance_3b", model=None).code == 0
    tokens = json.loads(Path("data_check/report.json").read_text())["tokens"]["max"]
    height, width = Buckets(preset("lance_3b").sizes.image).out_size(60, 90, 16)
    inner = height // 16 * (width // 16)
    assert inner + 2 + 10 < tokens < inner + 2 + 10 + 80  # the system prompt and the template are the rest


def test_bad_rows_are_counted_by_reason_and_named(run: Run) -> None:
    good, gone = {"caption": "x", "image_bytes": jpeg()}, {"caption": "x", "image_bytes": None}
    write([good, gone, good, gone, good, {"caption": "x", "image_bytes": b"broken"}], "a.parquet")
    ran = run("data", "check", "a.parquet")
    assert ran.code == 1
    assert "openlance: error: more than 5% of the rows are bad" in ran.err
    assert "bad      3 (50%)" in ran.out
    report = json.loads(Path("data_check/report.json").read_text())
    counted = {reason: found["rows"] for reason, found in report["reasons"].items()}
    assert sorted(counted.values()) == [1, 2]
    (ids,) = (found["first"] for found in report["reasons"].values() if found["rows"] == 2)
    assert [id.rpartition(":")[2] for id in ids] == ["1", "3"]
    assert run("data", "check", "a.parquet", "--max-bad", 0.5).code == 0


def test_lines_and_shards_that_cannot_be_read_are_bad_rows(run: Run) -> None:
    Path("rows").mkdir()
    Path("rows/a.png").write_bytes(jpeg())
    Path("rows/a.jsonl").write_text('{"caption": "x", "image": "a.png"}\n{"caption"\n')
    Path("rows/b.jsonl.gz").write_bytes(b"no gzip")
    ran = run("data", "check", "rows")
    assert ran.code == 1
    assert "a.jsonl:2" in ran.out
    assert "1 x shard: damaged" in ran.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["gone.parquet"], ["gone.parquet", "no such file"]),
        (["a.parquet", "--task", "draw"], ["unknown task 'draw'", "t2i"]),
        (["a.parquet", "--format", "csv"], ["unknown format 'csv'", "webdataset"]),
        (["a.parquet", "--rows", "0"], ["--rows"]),
        (["a.parquet", "--max-bad", "2"], ["--max-bad"]),
        (["a.parquet", "--out", "a.parquet"], ["a.parquet"]),
        (["a.parquet", "--model", "nowhere"], ["nowhere"]),
    ],
)
def test_mistakes_are_refused(run: Run, options: list[str], words: list[str]) -> None:
    write([{"caption": "x", "image_bytes": jpeg()}], "a.parquet")
    model = None if "--model" in options else "nano"
    refused(run("data", "check", *options, model=model), *words)


def test_encoded_rows_are_looked_at_too(run: Run) -> None:
    """They have as many tokens as the rows that they were made from."""
    assert run("data", "example", "edits.parquet", "--task", "image_edit", "--rows", 4, model=None).code == 0
    assert run("data", "encode", "edits.parquet", "--out", "encoded").code == 0
    reports = []
    for address in ("edits.parquet", "encoded"):
        ran = run("data", "check", address, "--out", f"check-{Path(address).stem}")
        assert ran.code == 0, ran.err
        reports.append(json.loads(Path(f"check-{Path(address).stem}/report.json").read_text()))
    raw, encoded = reports
    assert encoded["tasks"] == {"image_edit": 4} and encoded["bad"] == 0
    assert encoded["tokens"] == raw["tokens"]
