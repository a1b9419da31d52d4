"""What a worker has made, as bytes."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from torch import Tensor

from openlance.data.media import from_vae_pixels
from openlance.errors import InputError
from openlance.infer.result import Generated
from openlance.model.vae import VAE
from openlance.serve.jobs import Made

PICTURES = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}
CLIPS = {
    "video/mp4": ".mp4",
    "video/webm": ".webm",
    "video/quicktime": ".mov",
    "image/gif": ".gif",
    "image/webp": ".webp",
}


def media_type_for(wanted: str | None, *, clip: bool) -> str:
    """The media type that a picture or clip is encoded as: the one wanted, or else PNG and MP4.

    Raises InputError for one that it cannot be encoded as.
    """
    known = CLIPS if clip else PICTURES
    if wanted is not None and wanted not in known:
        what = "a clip" if clip else "a picture"
        raise InputError(f"{what} cannot be encoded as {wanted}: choose from {', '.join(known)}")
    return wanted or next(iter(known))


def encode_result(result: Generated, wanted: str | None) -> Made:
    """A file of it, its settings inside. Raises InputError as `media_type_for`."""
    clip = result.fps is not None
    media_type = media_type_for(wanted, clip=clip)
    with TemporaryDirectory(prefix="openlance-") as folder:
        suffix = (CLIPS if clip else PICTURES)[media_type]
        data = result.save(Path(folder) / f"made{suffix}").read_bytes()
    frames, height, width, _ = result.frames.shape
    return Made(data, media_type, (height, width), frames, result.fps, result.settings, result.seconds)


def encode_preview(latents: Tensor, vae: VAE) -> bytes:
    """A PNG of the first frame of latents [frames, rows, columns, channels]."""
    frames = from_vae_pixels(vae.decode(latents[None, :1].to(vae.device, vae.dtype))[0])
    buffer = BytesIO()
    Image.fromarray(frames[0]).save(buffer, "PNG")
    return buffer.getvalue()
