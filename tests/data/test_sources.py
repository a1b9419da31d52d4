"""Datasets by address: what is read, from where on, and what is said of those that cannot be read."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from stored import jpeg, write_jsonl, write_parquet, write_tar

from openlance.data.example import Record
from openlance.data.fields import UNREADABLE
from openlance.data.parquet import ParquetSource
from openlance.data.sources import open_source
from openlance.data.storage import expand_braces
from openlance.errors import InputError

Make = Callable[[Path], str]
NUMBERS = range(5)


def parquet(folder: Path) -> str:
    for shard in "ab":
        write_parquet(folder / f"{shard}.parquet", [{"caption": f"{shard}{n}"} for n in NUMBERS])
    return str(folder)


def tars(folder: Path) -> str:
    for shard in "ab":
        files = [
            (f"x/{n}.{kind}", data)
            for n in NUMBERS
            for kind, data in (("jpg", jpeg(n)), ("txt", f"{shard}{n}".encode()))
        ]
        write_tar(folder / f"{shard}.tar", files)
    return str(folder / "{a,b}.tar")


def jsonl(folder: Path) -> str:
    for shard in "ab":
        write_jsonl(folder / f"{shard}.jsonl", [{"caption": f"{shard}{n}"} for n in NUMBERS])
    return str(folder / "*.jsonl")


def saved(folder: Path) -> str:
    from datasets import Dataset

    rows = [{"caption": f"{shard}{n}"} for shard in "ab" for n in NUMBERS]
    Dataset.from_list(rows).save_to_disk(str(folder / "saved"), num_shards=2)
    return str(folder / "saved")


FORMATS: list[Make] = [parquet, tars, jsonl, saved]


def captions(records: Iterator[Record]) -> list[str]:
    return [record.values["caption"] for record in records]


@pytest.mark.parametrize("make", FORMATS)
def test_shards_are_read_in_stored_order_from_any_row(make: Make, tmp_path: Path) -> None:
    source = open_source(make(tmp_path))
    assert list(source.shards) == sorted(source.shards)
    for shard, name in enumerate("ab"):
        rows = [f"{name}{n}" for n in NUMBERS]
        assert captions(source.read(shard)) == rows
        for start in (1, 2, 3, 4, 5, 9):
            assert captions(source.read(shard, start)) == rows[start:]


@pytest.mark.parametrize("make", FORMATS)
def test_ids_do_not_depend_on_the_start(make: Make, tmp_path: Path) -> None:
    source = open_source(make(tmp_path))
    ids = [record.id for record in source.read(1)]
    assert len(set(ids)) == len(ids)
    assert [record.id for record in source.read(1, 3)] == ids[3:]
    assert all(id.startswith(source.shards[1]) for id in ids)


@pytest.mark.parametrize("make", FORMATS)
def test_counts_are_what_reading_gives_or_unknown(make: Make, tmp_path: Path) -> None:
    assert open_source(make(tmp_path)).count(1) in (None, len(NUMBERS))


@pytest.mark.parametrize("make", FORMATS)
def test_sources_can_be_sent_to_another_process(make: Make, tmp_path: Path) -> None:
    source = pickle.loads(pickle.dumps(open_source(make(tmp_path))))
    assert captions(source.read(0)) == [f"a{n}" for n in NUMBERS]


@pytest.mark.parametrize("make", [parquet, tars, jsonl])
def test_remote_files_read_like_local_ones(make: Make, tmp_path: Path) -> None:
    local = open_source(make(tmp_path))
    memory = fsspec.filesystem("memory")
    for shard in local.shards:
        memory.pipe_file(f"/{tmp_path.name}/{Path(shard).name}", Path(shard).read_bytes())
    remote = open_source(f"memory://{tmp_path.name}")
    assert all(shard.startswith("memory://") for shard in remote.shards)
    assert [r.values for r in remote.read(1, 2)] == [r.values for r in local.read(1, 2)]
    memory.rm(f"/{tmp_path.name}", recursive=True)


def test_parquet_row_groups_before_the_start_are_not_read(tmp_path: Path) -> None:
    import pyarrow.parquet

    rows = [{"caption": str(n), "image_bytes": bytes([n]) * 5000} for n in range(6)]
    path = write_parquet(tmp_path / "a.parquet", rows, group=2)
    column = pyarrow.parquet.read_metadata(path).row_group(0).column(1)
    data = bytearray(path.read_bytes())
    begin = column.dictionary_page_offset or column.data_page_offset
    data[begin : begin + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(bytes(data))
    source = ParquetSource.open(str(path))
    assert captions(source.read(0, 2)) == ["2", "3", "4", "5"]
    with pytest.raises(InputError, match="damaged"):
        list(source.read(0, 1))


def test_webdataset_names_say_the_columns(tmp_path: Path) -> None:
    files = [
        ("d/7.output.png", b"after"), ("d/7.input.jpg", b"before"), ("d/7.json", b'{"seed": 3}'),
        ("d/7.reference.1.jpg", b"second"), ("d/7.reference.0.webp", b"first"), ("d/7.mp4", b"clip"),
        ("d/7.caption_q.txt", b"why?\n"), ("d/7.turns.json", b"[1]"), ("d/7.media.0.png", b"shown"),
        ("d/7.cls", b"4"), ("d/.8.jpg", b"hidden"), ("d/9.txt", "drôle".encode()),
    ]  # fmt: skip
    first, second = (
        record.values for record in open_source(str(write_tar(tmp_path / "a.tar", files))).read(0)
    )
    assert first == {
        "output_image_bytes": b"after", "input_image_bytes": b"before", "seed": 3,
        "reference_image_bytes": [b"first", b"second"], "video_bytes": b"clip",
        "caption_q": "why?", "turns": [1], "media": [b"shown"],
    }  # fmt: skip
    assert second == {"caption": "drôle"}


@pytest.mark.parametrize(("name", "data"), [("1.json", b"{"), ("1.json", b"[]"), ("1.txt", b"\xff\xfe")])
def test_a_bad_file_in_a_tar_spoils_its_row_alone(name: str, data: bytes, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.txt", b"good"), (name, data), ("2.txt", b"good")])
    rows = [record.values for record in open_source(str(path)).read(0)]
    assert [UNREADABLE in row for row in rows] == [False, True, False]


def test_jsonl_reads_the_files_that_it_names(tmp_path: Path) -> None:
    row = {
        "caption": "x",
        "image": "images/a.jpg",
        "reference_images": ["b.png", "images/a.jpg"],
        "video": None,
        "media": ["b.png"],
    }
    path = write_jsonl(tmp_path / "a.jsonl", ["", row], {"images/a.jpg": b"one", "b.png": b"two"})
    (record,) = open_source(str(path)).read(0)
    assert record.id == f"{path}:2"
    assert record.values == {
        "caption": "x", "image_bytes": b"one", "reference_image_bytes": [b"two", b"one"],
        "video_bytes": None, "media": [b"two"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"caption": ', "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"image": "gone.jpg"}', "'gone.jpg' cannot be read"),
        ('{"image": "../secret.jpg"}', "does not stay inside"),
        ('{"image": "a/../../secret.jpg"}', "does not stay inside"),
        ('{"media": ["/etc/hostname"]}', "does not stay inside"),
        ('{"image": "file:///etc/hostname"}', "does not stay inside"),
        ('{"image": 5}', "not a path"),
        ('{"caption": "\\ud800', "not JSON"),
    ],
)
def test_a_bad_line_is_a_bad_row_with_its_number(line: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    path = write_jsonl(tmp_path / "data" / "a.jsonl", ['{"caption": "1"}', line, '{"caption": "3"}'])
    records = list(open_source(str(path)).read(0))
    assert [record.id for record in records] == [f"{path}:{number}" for number in (1, 2, 3)]
    assert list(records[1].values) == [UNREADABLE]
    assert reason in records[1].values[UNREADABLE]


def test_datasets_streams_give_media_as_bytes(tmp_path: Path) -> None:
    data = jpeg(30)
    (tmp_path / "train").mkdir()
    write_jsonl(
        tmp_path / "train" / "metadata.jsonl", [{"file_name": "a.jpg", "text": "grey"}], {"a.jpg": data}
    )
    source = open_source(f"{tmp_path}?split=train", format="datasets")
    (record,) = source.read(0)
    assert record.values["text"] == "grey"
    assert record.values["image"] == data


def test_braces() -> None:
    assert expand_braces("a-{08..10}.{x,y}") == [f"a-{n}.{s}" for n in ("08", "09", "10") for s in "xy"]
    assert expand_braces("plain") == ["plain"]


def truncated(make: Callable[[Path], Path], share: float) -> Make:
    def cut(folder: Path) -> str:
        path = make(folder)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        return str(path)

    return cut


def one_tar(folder: Path) -> Path:
    return write_tar(folder / "a.tar", [(f"{n}.txt", bytes(600)) for n in range(20)])


def one_parquet(folder: Path) -> Path:
    return write_parquet(folder / "a.parquet", [{"caption": "x" * 100}] * 20)


@pytest.mark.parametrize(
    "make", [truncated(one_parquet, 0.7), truncated(one_tar, 0.3), truncated(one_tar, 0.35)]
)
def test_a_shard_that_was_cut_short_is_named(make: Make, tmp_path: Path) -> None:
    address = make(tmp_path)
    with pytest.raises(InputError, match="cut short") as error:
        list(open_source(address).read(0))
    assert str(error.value).startswith(address)


def empty_parquet(folder: Path) -> str:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"caption": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    return str(folder)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: str(folder / "gone.parquet"), "no such file or folder"),
        (lambda folder: str(folder / "{0..2}.tar"), "0.tar: no such file or folder"),
        (lambda folder: str(folder / "*.tar"), "no files there"),
        (str, "no files there that end in .parquet"),
        (lambda folder: str(write_jsonl(folder / "a.jsonl", ["", " "])), "there are no rows"),
        (lambda folder: str(write_tar(folder / "a.tar", [])), "there are no rows"),
        (empty_parquet, "there are no rows"),
        (lambda folder: str(write_jsonl(folder / "a.csv", ["x"])), "tells no format"),
        (lambda folder: parquet(folder) if tars(folder) else "", "parquet and webdataset: give the format"),
        (lambda folder: "nowhere://x/a.tar", "not an address"),
        (lambda folder: str(folder / "{3..1}.tar"), "must go up"),
    ],
)
def test_addresses_without_data_are_refused(make: Make, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        open_source(make(tmp_path))
    assert reason in str(error.value)


def test_an_unknown_format_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="parquet, webdataset, jsonl, datasets"):
        open_source(parquet(tmp_path), format="csv")


def test_options_of_datasets_that_are_not_known_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown option spilt: choose of config, split, revision"):
        open_source(f"{tmp_path}?spilt=train", format="datasets")


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read as a Hugging Face dataset"):
        open_source(f"{jsonl(tmp_path).removesuffix('*.jsonl')}?split=other", format="datasets")


@pytest.mark.parametrize(("library", "make"), [("pyarrow", parquet), ("datasets", saved)])
def test_a_missing_library_is_named(
    library: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = make(tmp_path)
    found = importlib.import_module

    def without(name: str, package: str | None = None) -> object:
        if name.split(".")[0] == library:
            raise ImportError(name)
        return found(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(InputError, match=rf"needs {library}: pip install 'openlance\[train\]'"):
        open_source(address)
