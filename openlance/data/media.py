"""Pictures and clips from wherever they are: files, bytes, file objects, arrays, tensors.

Everything becomes 8-bit RGB. Files are turned as their EXIF orientation or display matrix says, transparency
is laid over white, greyscale, palette, 16-bit and CMYK are converted, colour profiles are ignored. What is
too large is refused from its header, before any pixel is decoded.

The whole media layer can be imported from here, but for `save.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from openlance.data.buckets import (
    VAE_DIVISOR,
    VIT_DIVISOR,
    Buckets,
    from_vae_pixels,
    resize_to_bucket,
    to_vae_pixels,
    to_vit_patches,
)
from openlance.data.frames import (
    Frames,
    Select,
    Video,
    check_size,
    choose,
    decoding,
    kept_rate,
    over_white,
    read_animation,
    read_container,
    read_npz,
    sample_frames,
)
from openlance.errors import InputError

__all__ = [
    "ARRAY_FPS",
    "VAE_DIVISOR",
    "VIT_DIVISOR",
    "Buckets",
    "Frames",
    "Media",
    "Select",
    "Source",
    "Video",
    "as_frames",
    "from_vae_pixels",
    "load_image",
    "load_media",
    "load_video",
    "resize_to_bucket",
    "sample_frames",
    "to_vae_pixels",
    "to_vit_patches",
]

Media = Image.Image | Video
Source = str | Path | bytes | BinaryIO | Image.Image | NDArray | Tensor | Video

ARRAY_FPS = 12.0
"""The rate that arrays and tensors are taken to have: the model's own."""

_FORMATS = {"PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"}
_ANIMATED = {"PNG", "WEBP", "GIF", "AVIF"}
_CHANNELS = (1, 3, 4)


def load_image(source: Source) -> Image.Image:
    """One picture, as a Pillow image in mode RGB.

    `source` is a path, the bytes of a file, a file object opened in binary mode, or
    - a Pillow image: the frame it shows;
    - a numpy array [H, W] or [H, W, 1, 3 or 4];
    - a torch tensor [1, 3 or 4, H, W], or else in numpy's order. Where both fit, channels come first.
    Arrays and tensors hold uint8, or floats in [0, 1]. Of an animated picture the first frame is taken.
    Raises InputError, naming the source, for whatever cannot be read as a picture.
    """
    if isinstance(source, Image.Image):
        return _still("the image", source)
    if isinstance(source, Video):
        raise InputError("expected a picture, got a clip: take one of its frames")
    if isinstance(source, np.ndarray | Tensor):
        return Image.fromarray(_rgb_array(source, ndim=3))
    with opened(source) as (name, file):
        image = open_image(name, file)
        if image is None:
            formats = ", ".join(_known())
            raise InputError(f"{name}: no picture of a known kind ({formats}); for a clip use load_video")
        return _still(name, image)


def load_video(source: Source, select: Select | None = None, fps: float | None = None) -> Video:
    """One clip: an mp4, mov, webm, mkv or avi file, an animated GIF, WebP or PNG, an .npz, or an array.

    `source` is a path, the bytes of a file, a file object opened in binary mode, a Video, or
    - a numpy array [T, H, W, 1, 3 or 4];
    - a torch tensor [T, 1, 3 or 4, H, W], or else in numpy's order. Where both fit, channels come first.
    Arrays and tensors hold uint8, or floats in [0, 1], and run at `ARRAY_FPS` unless `fps` is given. An .npz
    holds `frames`, uint8 [T, H, W, 3]; its rate stands in a .json file of the same name, as {"fps": 15}.

    `select(num_frames, fps)` gives the indices of the frames to keep, e.g. `sample_frames`; the others are
    decoded but never stored. `fps` overrides the source's rate. The clip's own `fps` is the rate at which the
    frames that were kept play as fast as the source.
    Raises InputError, naming the source, for whatever cannot be read as a clip.
    """
    if isinstance(source, Image.Image):
        raise InputError("expected a clip, got a still picture: use load_image")
    if isinstance(source, np.ndarray | Tensor):
        source = Video(_rgb_array(source, ndim=4), ARRAY_FPS)
    if isinstance(source, Video):
        rate = source.fps if fps is None else fps
        wanted = choose("the clip", len(source), rate, select)
        return Video(source.frames[wanted], kept_rate(rate, wanted))
    with opened(source) as (name, file):
        media = _read(name, file, select, fps)
    if not isinstance(media, Video):
        raise InputError(f"{name}: expected a clip, found a still picture: use load_image")
    return media


def load_media(source: Source, select: Select | None = None, fps: float | None = None) -> Media:
    """A picture or a clip, whichever the source is; see `load_image` and `load_video`.

    Arrays and tensors of four dimensions are clips; so are pictures with several frames, but not TIFF pages.
    """
    if isinstance(source, Image.Image):
        return load_image(source)
    if isinstance(source, np.ndarray | Tensor):
        return load_video(source, select, fps) if source.ndim == 4 else load_image(source)
    if isinstance(source, Video):
        return load_video(source, select, fps)
    with opened(source) as (name, file):
        return _read(name, file, select, fps)


def as_frames(media: Media) -> Frames:
    """The frames uint8 [T, H, W, 3] of a clip, or of an RGB picture with T = 1."""
    return media.frames if isinstance(media, Video) else np.array(media.convert("RGB"))[None]


@contextmanager
def opened(source: str | Path | bytes | BinaryIO) -> Iterator[tuple[str, BinaryIO]]:
    """(what to call the source in messages, a file to read it from)."""
    file: BinaryIO
    if isinstance(source, bytes | bytearray | memoryview):
        name, file = "the given bytes", BytesIO(source)
    elif isinstance(source, str | Path):
        name, file = str(source), _open_path(str(source))
    elif hasattr(source, "read"):
        name = str(getattr(source, "name", "the given file object"))
        data = source.read()
        if not isinstance(data, bytes):
            raise InputError(f"{name}: the file object gives text: open it in binary mode")
        file = BytesIO(data)
    else:
        raise InputError(
            f"cannot read media from {type(source).__name__}: give a path, bytes, a file object, "
            f"a Pillow image, a numpy array or a torch tensor"
        )
    with file:
        if not file.read(1):
            raise InputError(f"{name}: the file is empty")
        file.seek(0)
        yield name, file


def _open_path(path: str) -> BinaryIO:
    if "://" in path:
        raise InputError(f"{path}: addresses are not fetched: download the file and give its path")
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file (looked in {Path.cwd()})") from None
    except IsADirectoryError:
        raise InputError(f"{path}: this is a folder: give one file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be opened ({error})") from error


def _read(name: str, file: BinaryIO, select: Select | None, fps: float | None) -> Media:
    image = open_image(name, file)
    if image is None:
        file.seek(0)
        magic = file.read(4)
        file.seek(0)
        if magic == b"PK\x03\x04":
            return read_npz(name, file, select, fps, sidecar=Path(name).with_suffix(".json"))
        return read_container(name, file, select, fps)
    with decoding(name):
        animated = image.format in _ANIMATED and getattr(image, "is_animated", False)
    if animated:
        return read_animation(name, image, select, fps)
    return _still(name, image)


def _known() -> list[str]:
    """The picture formats that are read here and known to this Pillow."""
    return sorted(_FORMATS & set(Image.registered_extensions().values()))


def open_image(name: str, file: BinaryIO) -> Image.Image | None:
    """The picture in a file, its pixels not decoded yet, or None where it is no picture."""
    try:
        with decoding(name):
            return Image.open(file, formats=_known())
    except InputError as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            return None
        raise


def _still(name: str, image: Image.Image) -> Image.Image:
    """Upright RGB, 8 bits a channel."""
    check_size(name, *image.size)
    with decoding(name):
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith(("I", "F")):
            return Image.fromarray(_rgb_array(_deep(name, upright), ndim=3))
        return over_white(upright)


def _deep(name: str, image: Image.Image) -> NDArray:
    """A picture of more than 8 bits a channel as floats in [0, 1]: integers of 16 bits, or floats already."""
    values = np.asarray(image)
    if image.mode == "F":
        return values
    if values.min() < 0 or values.max() > 65535:
        raise InputError(f"{name}: values from {values.min()} to {values.max()} are not 16-bit pixels")
    return values / 65535


def _rgb_array(source: NDArray | Tensor, ndim: int) -> Frames:
    """An array or tensor of pixels as uint8 [..., 3], `ndim` dimensions in all."""
    shape, kind = list(source.shape), "tensor" if isinstance(source, Tensor) else "array"
    array = _channels_last(source) if isinstance(source, Tensor) else source
    if array.ndim == 2 and ndim == 3:
        array = array[..., None]
    if array.ndim != ndim or array.shape[-1] not in _CHANNELS:
        layout = "H, W, C" if kind == "array" else "C, H, W"
        layout = f"[{layout}]" if ndim == 3 else f"[T, {layout}]"
        raise InputError(f"expected {kind} {layout} with C of 1, 3 or 4, got {shape}: permute its dimensions")
    if array.size == 0:
        raise InputError(f"the {kind} is empty: {shape}")
    values = _to_uint8(array)
    if values.shape[-1] == 4:
        alpha = values[..., 3:].astype(np.float32) / 255
        return (values[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(values, (*values.shape[:-1], 3)))


def _channels_last(tensor: Tensor) -> NDArray:
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    if tensor.ndim >= 3 and tensor.shape[-3] in _CHANNELS:
        tensor = tensor.movedim(-3, -1)
    return tensor.numpy()


def _to_uint8(array: NDArray) -> NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"pixels must be uint8, or floats in [0, 1]; got {array.dtype}")
    low, high = array.min(), array.max()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also refuses NaN
        raise InputError(
            f"float pixels must be in [0, 1], found {low:.3g} to {high:.3g}: scale them, or give uint8 "
            f"(from_vae_pixels takes [-1, 1])"
        )
    return (array.clip(0, 1) * np.float32(255)).round().astype(np.uint8)
