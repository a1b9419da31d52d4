"""Draw a scene: signed distances in pixels, smoothed over one pixel, each inside its own box."""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from openlance.errors import InputError
from openlance.world.scene import COLORS, GROUNDS, RADII, STEPS, TONES, Scene, Text, Thing, cell

PERIOD = 1 / 7  # of a texture, in shorter sides: one 16-pixel patch at 112 pixels
FONT_HEIGHT = 0.25  # of the letters' em, in shorter sides
BOLD = 0.03  # extra stroke on each side of a letter's lines, in ems: one pixel at 112 pixels
STAR_NOTCH = 0.42  # inner over outer radius
# How far each outline of `distance` reaches from the middle, in radii: left and right, up, down.
REACH = {
    "circle": (1.0, 1.0, 1.0),
    "square": (0.88, 0.88, 0.88),
    "triangle": (1.0, 0.92, 0.82),
    "cross": (1.0, 1.0, 1.0),
    "star": (1.008, 1.007, 0.911),
    "ring": (1.0, 1.0, 1.0),
}

Size = int | tuple[int, int]
Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels, between pixels: a picture's own box is (0, 0, width, height)."""


def height_width(size: Size) -> tuple[int, int]:
    """`size` as (height, width); raises InputError unless both are positive multiples of 16."""
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 16 or height % 16 or width % 16:
        raise InputError(f"cannot draw {height}x{width} pixels: both must be positive multiples of 16")
    return height, width


def distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Signed distance [h, w] to the outline, negative inside; x [1, w] and y [h, 1] from the middle, y down.

    All in pixels; the shape fills a box of about 2 r. Exact near the edges, where only the sign flip matters.
    """
    if shape == "circle":
        return np.sqrt(x * x + y * y) - r
    if shape == "ring":
        return np.abs(np.sqrt(x * x + y * y) - 0.77 * r) - 0.23 * r
    x = np.abs(x)
    if shape == "square":
        return np.maximum(x, np.abs(y)) - 0.88 * r
    if shape == "triangle":  # apex (0, -0.92 r), base corners (+-r, 0.82 r)
        slope = np.hypot(1.74, 1.0)
        return np.maximum((1.74 * x - (y + 0.92 * r)) / slope, y - 0.82 * r)
    if shape == "cross":
        y, bar = np.abs(y), 0.34 * r
        return np.minimum(np.maximum(x - r, y - bar), np.maximum(x - bar, y - r))
    # Star: fold the plane into a tenth turn from a point (on the axis) to a notch, then one straight edge.
    r *= 1.06
    y = y - 0.05 * r  # the lower points end above the circle: this centres the box
    angle = np.arctan2(x, -y)
    angle = np.abs(angle - np.round(angle / (0.4 * np.pi)) * (0.4 * np.pi))
    radius = np.sqrt(x * x + y * y)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    notch_x, notch_y = STAR_NOTCH * r * np.cos(0.2 * np.pi), STAR_NOTCH * r * np.sin(0.2 * np.pi)
    return ((along - r) * notch_y + across * (r - notch_x)) / np.hypot(r - notch_x, notch_y)


@lru_cache(maxsize=256)
def draw_ground(ground: str, texture: str, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3]; shared, so copy before drawing on it."""
    base, tone = np.array(GROUNDS[ground], np.float32), np.array(TONES[ground], np.float32)
    period = PERIOD * min(height, width)
    x = (np.arange(width, dtype=np.float32) + 0.5) % period
    y = ((np.arange(height, dtype=np.float32) + 0.5) % period)[:, None]
    odd_x, odd_y = x > period / 2, y > period / 2
    share = {
        "plain": lambda: np.zeros((height, width)),
        "stripes": lambda: np.broadcast_to(odd_x, (height, width)),
        "checks": lambda: odd_x ^ odd_y,
        "dots": lambda: np.clip(0.5 + 0.25 * period - np.hypot(x - period / 2, y - period / 2), 0, 1),
    }[texture]()
    return np.rint(base + np.asarray(share, np.float32)[..., None] * (tone - base)).astype(np.uint8)


@lru_cache(maxsize=1024)
def draw_word(word: str, height: int, width: int) -> np.ndarray:
    """Coverage float32 [h, w] of a word, trimmed to its ink; smaller letters where the row would overflow."""
    em = FONT_HEIGHT * min(height, width)
    wide = ImageFont.load_default(em).getlength(word)
    em = min(em, em * 0.9 * width / wide)
    font, stroke = ImageFont.load_default(em), round(BOLD * em)
    left, top, right, bottom = font.getbbox(word, stroke_width=stroke)
    image = Image.new("L", (int(right - left) + 1, int(bottom - top) + 1))
    ImageDraw.Draw(image).text((-left, -top), word, fill=255, font=font, stroke_width=stroke)
    return np.asarray(image, np.float32) / 255


def paint(picture: np.ndarray, coverage: np.ndarray, color: str, top: int, left: int) -> None:
    """Blend a color into picture [H, W, 3] in place, where coverage [h, w] in [0, 1] says."""
    area = picture[top : top + coverage.shape[0], left : left + coverage.shape[1]]
    ink = np.array(COLORS[color], np.float32)
    area[:] = area + coverage[..., None] * (ink - area) + 0.5


def progress(thing: Thing, frame_time: float) -> float:
    """The share of its motion that a thing has behind it."""
    if thing.when == "early":
        return min(1.0, 2 * frame_time)
    return max(0.0, 2 * frame_time - 1) if thing.when == "late" else frame_time


def placed(thing: Thing, height: int, width: int, frame_time: float) -> tuple[float, float, float]:
    """(x, y, radius) in pixels."""
    done = progress(thing, frame_time)
    column, row = cell(thing.place)
    dx, dy = STEPS.get(thing.motion, (0, 0))
    x = width * ((column + 0.5 + done * dx) / 3 + thing.offset[0])
    y = height * ((row + 0.5 + done * dy) / 3 + thing.offset[1])
    begin = RADII[thing.size]
    end = {"grow": RADII["large"], "shrink": RADII["small"]}.get(thing.motion, begin)
    return x, y, min(height, width) * (begin + done * (end - begin))


def box(thing: Thing, size: Size = 112, frame_time: float = 0.0) -> Box:
    """The smallest box around a thing, rounded to whole pixels."""
    x, y, r = placed(thing, *height_width(size), frame_time)
    side, up, down = REACH[thing.shape]
    return round(x - side * r), round(y - up * r), round(x + side * r), round(y + down * r)


def draw_thing(picture: np.ndarray, thing: Thing, frame_time: float) -> None:
    height, width = picture.shape[:2]
    x, y, r = placed(thing, height, width, frame_time)
    left, right = max(int(x - 1.1 * r) - 1, 0), min(int(x + 1.1 * r) + 3, width)
    top, bottom = max(int(y - 1.1 * r) - 1, 0), min(int(y + 1.1 * r) + 3, height)
    across = np.arange(left, right, dtype=np.float32)[None] + np.float32(0.5 - x)
    down = np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5 - y)
    coverage = np.clip(0.5 - distance(thing.shape, across, down, r), 0, 1)
    paint(picture, coverage, thing.color, top, left)


def draw_text(picture: np.ndarray, text: Text) -> None:
    height, width = picture.shape[:2]
    coverage = draw_word(text.word, height, width)
    middle = height * (cell(text.place)[1] + 0.5) / 3
    top = round(middle - coverage.shape[0] / 2)
    paint(picture, coverage, text.color, top, (width - coverage.shape[1]) // 2)


def render(scene: Scene, size: Size = 112, frame_time: float = 0.0) -> np.ndarray:
    """uint8 [H, W, 3] of a scene at a time in [0, 1]; size is a side or (height, width) in pixels."""
    if not 0 <= frame_time <= 1:
        raise InputError(f"frame_time is {frame_time}: give a time from 0 (first frame) to 1 (last frame)")
    picture = draw_ground(scene.ground, scene.texture, *height_width(size)).copy()
    for thing in scene.things:
        draw_thing(picture, thing, frame_time)
    if scene.text:
        draw_text(picture, scene.text)
    return picture


def render_clip(scene: Scene, frames: int, size: Size = 112) -> np.ndarray:
    """uint8 [T, H, W, 3]: `frames` pictures at even times from the first (0) to the last (1)."""
    if frames < 1:
        raise InputError(f"a clip needs at least one frame, not {frames}")
    return np.stack([render(scene, size, time) for time in np.linspace(0, 1, frames)])
