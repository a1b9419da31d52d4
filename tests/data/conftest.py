"""Media for the tests of this folder: real files of the shared folder, and clips encoded on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from encoded import Encode

SHARED_MEDIA = Path(__file__).resolve().parents[2].parent / "shared" / "media"


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def shared_media() -> Callable[[str], Path]:
    """A function from a name in the shared media folder to its path; skips by name what is absent."""

    def find(name: str) -> Path:
        if not (SHARED_MEDIA / name).is_file():
            pytest.skip(f"no shared media file {name}")
        return SHARED_MEDIA / name

    return find


@pytest.fixture
def encode(tmp_path: Path) -> Encode:
    """Encode frames [T, H, W, 3] with PyAV alone, so that reading is not tested against our own writing."""

    def write(
        frames: np.ndarray,
        name: str = "clip.mp4",
        *,
        fps: int = 12,
        rotation: float = 0,
        codec: str = "libx264",
    ) -> Path:
        path = tmp_path / name
        flags = {"movflags": "faststart"} if path.suffix in (".mp4", ".mov") else {}
        with av.open(str(path), "w", options=flags) as output:
            stream = output.add_stream(
                codec, rate=fps, options={"b": "4M"} if codec == "mpeg4" else {"crf": "8", "b": "0"}
            )
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            if rotation:
                stream.set_display_rotation(rotation)
            for pixels in frames:
                output.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")))
            output.mux(stream.encode(None))
        return path

    return write
