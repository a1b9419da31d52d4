"""The command that writes a dataset to try training on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from openlance.cli.options import check_seed, option
from openlance.errors import InputError


def example(
    out: Annotated[Positional[Path], option("Parquet file to write.")],
    *,
    task: Annotated[str, option("t2i, t2v, image_edit or x2t_image.")] = "t2i",
    rows: Annotated[int, option("How many.")] = 256,
    seed: Annotated[int, option("Of the scenes.")] = 0,
) -> None:
    """Write a small dataset of coloured shapes, to try training on. Nothing is downloaded.

    For example:
      openlance data example shapes.parquet
      openlance data example edits.parquet --task image_edit --rows 1000
    """
    from openlance.data.save import check_folder
    from openlance.world.export import write_example

    check_seed(seed)
    if rows < 1:
        raise InputError("--rows must be at least 1")
    if out.suffix != ".parquet":
        raise InputError(f"{out}: the name of the file must end in .parquet")
    check_folder(out)
    print(write_example(out, task, rows, seed))
