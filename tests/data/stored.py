"""Small datasets of real pictures and clips, in every format."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from encoded import grey_levels
from PIL import Image

from openlance.config import Sizes
from openlance.data.save import save_video

SIZES = Sizes(image=64, video=48, vit_image=56, vit_video=56, frames=9, fps=4.0, max_seconds=2.0)


def jpeg(level: int = 128, width: int = 64, height: int = 48, kind: str = "JPEG") -> bytes:
    """A picture of one grey level, which tells it from others."""
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), level, np.uint8)).save(file, kind)
    return file.getvalue()


@lru_cache
def mp4(level: int = 128, frames: int = 16, fps: int = 8) -> bytes:
    """A clip that starts at this grey level and becomes lighter by two a frame."""
    with TemporaryDirectory() as folder:
        levels = range(level, level + 2 * frames, 2)
        return save_video(grey_levels(list(levels)), Path(folder) / "clip.mp4", fps).read_bytes()


def level(picture: Image.Image | np.ndarray) -> int:
    return round(float(np.asarray(picture).mean()))


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], group: int = 2) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, row_group_size=group)
    return path


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_jsonl(
    path: Path, rows: Iterable[Mapping[str, Any] | str], files: Mapping[str, bytes] | None = None
) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    for name, data in (files or {}).items():
        (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
        (path.parent / name).write_bytes(data)
    return path
