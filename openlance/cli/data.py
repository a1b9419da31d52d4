"""Commands about training data."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional

from openlance.cli.options import check_seed, option
from openlance.errors import InputError

if TYPE_CHECKING:
    from openlance.config import ModelConfig
    from openlance.data.example import Record
    from openlance.data.fields import BadRow
    from openlance.data.sources import Shards
    from openlance.sequence.template import Encode


def check(
    address: Annotated[
        Positional[str],
        option("A file, a folder, a pattern such as data/{000..012}.tar, or hf://datasets/NAME?split=train."),
    ],
    *,
    format: Annotated[
        str | None,
        option("parquet, webdataset, jsonl or datasets. Default: what the names of the files tell."),
    ] = None,
    task: Annotated[
        str | None, option("Read every row as this: t2i, i2v, image_edit, … Default: the columns tell.")
    ] = None,
    rows: Annotated[int, option("How many to look at, spread over the shards.")] = 64,
    seed: Annotated[int, option("Of the rows that are drawn.")] = 0,
    max_bad: Annotated[float, option("The share of bad rows above which the command fails.")] = 0.05,
    out: Annotated[Path, option("Folder for report.json and the contact sheet, sheet.png.")] = Path(
        "data_check"
    ),
    model: Annotated[
        str, option("Whose sizes and tokens count: nano, lance_3b, a folder or a Hugging Face id.")
    ] = "nano",
    variant: Annotated[str | None, option("Lance_3B or Lance_3B_Video.")] = None,
    quiet: Annotated[bool, option("No progress bar.")] = False,
) -> None:
    """Look at a sample of a dataset before training on it: tasks, bad rows, sizes, lengths in tokens.

    Ends with 1 where too many rows are bad. No weights are read.

    For example:
      openlance data check shapes.parquet
      openlance data check "s3://bucket/clips/{000..127}.tar" --task i2v --model lance_3b
    """
    import numpy as np

    from openlance.data.check import Findings, examine
    from openlance.data.save import check_folder, save_image, save_json
    from openlance.data.sources import open_source
    from openlance.sequence.template import parse_task

    if rows < 1 or not 0 <= max_bad <= 1:
        raise InputError("--rows must be at least 1, and --max-bad between 0 and 1")
    check_seed(seed)
    check_folder(out / "report.json")
    wanted = None if task is None else parse_task(task)
    config, encode = _lengths(model, variant)
    source = open_source(address, format=format)
    findings = Findings(address, len(source.shards), max_bad)
    for place, row in enumerate(_sample(source, rows, seed, quiet)):
        findings.add(examine(row, config, encode, np.random.default_rng((seed, place)), wanted))
    settings = {"model": config.name, "seed": seed, "task": task, "max_bad": max_bad}
    report = save_json(findings.report() | settings, out / "report.json")
    print(findings.table())
    if (sheet := findings.sheet()) is not None:
        print(save_image(sheet, out / "sheet.png"))
    print(report)
    if findings.failed:
        print(f"openlance: error: more than {max_bad:.0%} of the rows are bad", file=sys.stderr)
        raise SystemExit(1)


def _sample(source: Shards, rows: int, seed: int, quiet: bool) -> Iterator[Record | BadRow]:
    """The rows one by one, so that no more than one is in memory, with a progress bar."""
    import numpy as np
    from tqdm import tqdm

    from openlance.data.check import draw_rows, read_rows

    picks, unreadable = draw_rows(source, rows, np.random.default_rng(seed))
    yield from unreadable
    total = sum(len(pick.rows) for pick in picks)
    hidden = quiet or not sys.stderr.isatty()
    with tqdm(total=total, desc="look", unit="row", disable=hidden, leave=False) as bar:
        for pick in picks:
            for row in read_rows(source, pick):
                yield row
                bar.update()


def _lengths(model: str, variant: str | None) -> tuple[ModelConfig, Encode]:
    """(sizes, tokenizer) of a model; of a preset without files, a token for every four characters."""
    from openlance.config import PRESETS, preset
    from openlance.infer.memory import four_letters
    from openlance.model.checkpoint import find_release, read_config
    from openlance.model.hub import BUNDLED
    from openlance.tokenizer import Tokenizer

    bundled = BUNDLED.get(model)
    if model in PRESETS and not (bundled and bundled.is_dir()):
        return preset(model), four_letters
    release = find_release(model, variant, weights=False)
    tokenizer = Tokenizer.load(release.folder)
    return read_config(release, tokenizer), tokenizer.encode_with_offsets
