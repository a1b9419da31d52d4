"""Scenes as a dataset in the released columns: something to try training on, without any download."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from openlance.data.save import save_video
from openlance.errors import InputError
from openlance.world.edits import edit
from openlance.world.language import caption
from openlance.world.questions import question
from openlance.world.render import render, render_clip
from openlance.world.scene import Scene, WorldConfig, sample_scene

SIDE, FRAMES, FPS = 96, 9, 8
STILL = WorldConfig(max_things=2)
MOVING = WorldConfig(max_things=1, motions=("left", "right", "up", "down", "grow", "shrink"))


def write_example(path: Path, task: str, rows: int, seed: int) -> Path:
    """A Parquet file of scenes for a task (one of `ROWS`), in the columns that training reads.

    Raises InputError for another task.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    if task not in ROWS:
        raise InputError(f"no example data for {task}: choose one of {', '.join(ROWS)}")
    rng = np.random.default_rng(seed)
    table = [ROWS[task](rng) for _ in tqdm(range(rows), desc=task, unit="row")]
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(table), path, row_group_size=64)
    return path


def _picture(rng: np.random.Generator) -> dict[str, Any]:
    scene = sample_scene(rng, STILL)
    return {"caption": caption(scene, rng), "image_bytes": _png(scene)}


def _clip(rng: np.random.Generator) -> dict[str, Any]:
    scene = sample_scene(rng, MOVING)
    return {"caption": caption(scene, rng), "video_bytes": _mp4(scene)}


def _edit(rng: np.random.Generator) -> dict[str, Any]:
    before = sample_scene(rng, STILL)
    change = edit(before, rng)
    return {
        "caption": change.instruction,
        "input_image_bytes": _png(before),
        "output_image_bytes": _png(change.after),
    }


def _question(rng: np.random.Generator) -> dict[str, Any]:
    scene = sample_scene(rng, STILL)
    asked = question(scene, rng)
    return {"image_bytes": _png(scene), "caption_q": asked.question, "caption_a": asked.answer}


ROWS: dict[str, Callable[[np.random.Generator], dict[str, Any]]] = {
    "t2i": _picture,
    "t2v": _clip,
    "image_edit": _edit,
    "x2t_image": _question,
}


def _png(scene: Scene) -> bytes:
    file = io.BytesIO()
    Image.fromarray(render(scene, SIDE)).save(file, "PNG")
    return file.getvalue()


def _mp4(scene: Scene) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return save_video(render_clip(scene, FRAMES, SIDE), Path(folder) / "clip.mp4", FPS).read_bytes()
