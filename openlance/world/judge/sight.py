"""See a picture of the world: its ground, its things and its words, measured from the pixels alone.

Nothing here draws or knows how a scene is drawn; only the names and colors of the world are shared. A pixel
is read as a blend of the ground and one color. Pixels of one color that touch are a blob, and a blob's shape
is read from its angular moments: a triangle repeats three times in a turn, a cross and a square four times
(in opposite phase), a star five times, and a ring has no middle.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from openlance.errors import InputError
from openlance.world.judge.letters import Reading, read_letters
from openlance.world.scene import COLORS, GROUNDS, LIKE_RINGS, PLACES, TEXT_PLACES, TONES

UNKNOWN = "unknown"
SMOOTHING = 0.7 / 112  # sigma, in shorter sides: quiets noise, leaves a small star its notches
SMALLEST = 0.003  # area of a blob that counts, in squared shorter sides: a quarter of a small star
BETWEEN_SIZES = 0.118  # radius that parts small (0.09) from large (0.15), in shorter sides
NEAR = 45.0  # RGB distance within which a pixel is taken for ground
FAR = 70.0  # RGB distance beyond which a color or ground is none of the world's
FULL = 0.85  # share of its box that no wide letter fills
MARGIN = 2  # pixels that the box of a blob reaches past its solid part
LETTER_GAP = 0.06  # largest gap inside a word, in shorter sides
# Moments of each outline (see `moments`), sharp, and small through a blur of 1.9 pixels: what is seen lies
# between the two, up to the tolerance.
OUTLINES = {
    #            three   four  five hollow spread solid
    "circle": ((0.00, 0.00, 0.00, 0.00, 1.00, 0.97), (0.00, 0.00, 0.00, 0.00, 1.10, 0.94)),
    "square": ((0.00, -0.29, 0.00, 0.00, 1.05, 1.00), (0.00, -0.19, 0.00, 0.00, 1.14, 0.98)),
    "triangle": ((0.55, 0.00, 0.00, 0.00, 1.21, 0.93), (0.38, 0.00, 0.00, 0.00, 1.30, 0.92)),
    "cross": ((0.00, 0.47, 0.00, 0.00, 1.20, 0.72), (0.00, 0.35, 0.00, 0.00, 1.28, 0.82)),
    "star": ((0.00, 0.00, 0.62, 0.00, 1.29, 0.54), (0.00, 0.00, 0.19, 0.00, 1.28, 0.88)),
    "ring": ((0.00, 0.00, 0.00, 1.00, 1.83, 0.68), (0.00, 0.00, 0.00, 0.89, 1.59, 0.77)),
}
TOLERANCE = 0.2


@dataclass(frozen=True)
class SeenThing:
    """A thing as seen: center (x, y) and box (left, top, right, bottom) in fractions of width and height,
    radius in shorter sides.

    Shape or color is "unknown" where it fits none; confidence in [0, 1] is the margin of the shape over the
    second best.
    """

    shape: str
    color: str
    size: str
    place: str
    center: tuple[float, float]
    radius: float
    confidence: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class SeenText:
    """A word in capitals, its color and the row's place ("top", "center", "bottom")."""

    word: str
    color: str
    place: str


@dataclass(frozen=True)
class Seen:
    ground: str
    texture: str
    things: tuple[SeenThing, ...]
    words: tuple[SeenText, ...]


@dataclass(frozen=True)
class Blob:
    """Touching pixels of one color: coverage [h, w] in [0, 1], over a half somewhere, at (top, left)."""

    coverage: np.ndarray
    color: str
    top: int
    left: int

    @property
    def bottom(self) -> int:
        return self.top + self.coverage.shape[0]

    @property
    def right(self) -> int:
        return self.left + self.coverage.shape[1]


def look(picture: np.ndarray) -> Seen:
    """What a picture, uint8 [H, W, 3], shows. Raises InputError for another dtype or shape."""
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.ndim != 3:
        raise InputError("the judge looks at a picture of dtype uint8 and shape [height, width, 3]")
    if picture.shape[2] != 3 or min(picture.shape[:2]) < 16:
        raise InputError(f"a picture has 3 channels and at least 16x16 pixels, not shape {picture.shape}")
    side = min(picture.shape[:2])
    pixels = ndimage.gaussian_filter(picture.astype(np.float32), (SMOOTHING * side, SMOOTHING * side, 0))
    ground, tones = see_ground(pixels)
    best, coverage = unmix(pixels, tones)
    blobs = find_blobs(pixels, best, coverage)
    texture = see_texture(pixels, palette(ground), coverage.max(axis=0))
    words, rest = find_words(blobs, picture.shape[:2])
    things = tuple(see_thing(blob, picture.shape[:2]) for blob in rest)
    if np.median(to_line(border(pixels), palette(ground))) > FAR:
        ground = UNKNOWN
    return Seen(ground, texture, things, words)


def palette(ground: str) -> np.ndarray:
    """The two tones [2, 3] of a ground."""
    return np.array([GROUNDS[ground], TONES[ground]], np.float32)


def border(pixels: np.ndarray) -> np.ndarray:
    """The pixels [N, 3] of a frame three percent wide, where the ground shows most."""
    edge = max(1, round(0.03 * min(pixels.shape[:2])))
    frame = np.ones(pixels.shape[:2], bool)
    frame[edge:-edge, edge:-edge] = False
    return pixels[frame]


def along_line(pixels: np.ndarray, tones: np.ndarray) -> np.ndarray:
    """Where pixels [..., 3] lie from the first tone (0) to the second (1)."""
    step = tones[1] - tones[0]
    return (pixels - tones[0]) @ step / max(float(step @ step), 1e-6)


def to_line(pixels: np.ndarray, tones: np.ndarray) -> np.ndarray:
    """Distance [...] of pixels [..., 3] to the line between two tones [2, 3]; so with any other last axis."""
    share = np.clip(along_line(pixels, tones), 0, 1)
    return np.linalg.norm(pixels - tones[0] - share[..., None] * (tones[1] - tones[0]), axis=-1)


def see_ground(pixels: np.ndarray) -> tuple[str, np.ndarray]:
    """(name, tones [2, 3]): the ground that the frame is nearest to, with its two tones in the picture.

    Things on the frame are cut off as outliers. Tones may be a little off in a picture that a model drew.
    """
    frame = border(pixels)
    name = min(GROUNDS, key=lambda ground: np.minimum(to_line(frame, palette(ground)), FAR).mean())
    near = pixels[to_line(pixels, palette(name)) < NEAR]
    if len(near) == 0:
        return name, palette(name)
    along = along_line(near, palette(name))
    low, high = np.percentile(along, (5, 95))
    middle = (low + high) / 2
    return name, np.stack([near[along <= middle].mean(axis=0), near[along >= middle].mean(axis=0)])


def unmix(pixels: np.ndarray, tones: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read each pixel as (1 - a) ground + a color: (index [H, W] of the best color, a [9, H, W] for each).

    Either tone of the ground may lie below; the one that leaves the smaller rest counts. The last index
    stands for a strange color, far from the ground and from every blend.
    """
    flat = pixels.reshape(-1, 3).T
    inks = np.array(list(COLORS.values()), np.float32)
    found = []
    for below in tones.astype(np.float32):
        steps, above = inks - below, flat - below[:, None]
        along, length = steps @ above, (steps * steps).sum(axis=1, keepdims=True)
        share = np.clip(along / length, 0, 1)
        found.append((share, (above * above).sum(axis=0) + share * (share * length - 2 * along)))
    (share, rest), (other_share, other_rest) = found
    coverage, rest = np.where(other_rest < rest, other_share, share), np.minimum(rest, other_rest)
    strange = to_line(flat.T, tones) > FAR
    coverage = np.concatenate([coverage, strange[None]])
    best = np.concatenate([rest, np.where(strange, FAR**2, np.inf)[None]]).argmin(axis=0)
    return best.reshape(pixels.shape[:2]), coverage.reshape(-1, *pixels.shape[:2])


def find_blobs(pixels: np.ndarray, best: np.ndarray, coverage: np.ndarray) -> list[Blob]:
    """The blobs of all colors, the smallest left out: noise, and seams that look like a third color."""
    side = min(best.shape)
    solid = np.take_along_axis(coverage, best[None], axis=0)[0] > 0.5
    owner = np.zeros(best.shape, int)  # of each pixel: which blob, counted from 1
    colors = []
    for index in range(len(coverage)):
        labels, count = ndimage.label((best == index) & solid)
        for label in np.flatnonzero(
            np.bincount(labels.ravel(), minlength=count + 1) >= SMALLEST * side * side
        ):
            if label:
                colors.append(index)
                owner[labels == label] = len(colors)
    blobs = []
    for number, (index, box) in enumerate(zip(colors, ndimage.find_objects(owner), strict=True), start=1):
        rows = slice(max(0, box[0].start - MARGIN), box[0].stop + MARGIN)
        columns = slice(max(0, box[1].start - MARGIN), box[1].stop + MARGIN)
        mine, full = owner[rows, columns] == number, coverage[index, rows, columns]
        near = ndimage.binary_dilation(mine, iterations=MARGIN) & (mine | (owner[rows, columns] == 0))
        core = pixels[rows, columns][mine & (full >= np.percentile(full[mine], 75))]
        # What is blurred or a little off never covers a whole pixel: measure against its most.
        most = np.percentile(full[mine], 90)
        color = name_color(np.median(core, axis=0))
        blobs.append(Blob(np.clip(full / most, 0, 1) * near, color, rows.start, columns.start))
    return blobs


def name_color(rgb: np.ndarray) -> str:
    distances = {name: float(np.linalg.norm(rgb - np.array(ink))) for name, ink in COLORS.items()}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] < FAR else UNKNOWN


def see_texture(pixels: np.ndarray, tones: np.ndarray, coverage: np.ndarray) -> str:
    """Plain varies little, dots have one tone much more often, stripes vary only from column to column."""
    free = ~ndimage.binary_dilation(coverage > 0.3, iterations=3)
    tone = along_line(pixels, tones)
    if free.sum() < 0.05 * free.size or tone[free].std() < 0.15:
        return "plain"
    low, high = np.percentile(tone[free], (3, 97))
    if (tone[free].mean() - low) / (high - low) < 0.35:
        return "dots"
    rows = free.sum(axis=0)
    columns = np.where(free, tone, 0).sum(axis=0) / np.maximum(rows, 1)
    between = np.average((columns - tone[free].mean()) ** 2, weights=rows)
    return "stripes" if between > 0.5 * tone[free].var() else "checks"


def moments(coverage: np.ndarray) -> np.ndarray:
    """(three, four, five, hollow, spread, solid) of a shape, and what must vanish for every upright outline.

    three, four, five: the share of the second moment that repeats so often in a turn, in the phase of an
    upright triangle, cross, star. hollow: how empty the inner half is. spread: the second moment over a
    disc's. solid: area over the area of the convex hull.
    """
    rows, columns = np.nonzero(coverage > 0.5)
    area = coverage.sum()
    y, x = np.mgrid[: coverage.shape[0], : coverage.shape[1]]
    z = (x - (coverage * x).sum() / area) + 1j * (y - (coverage * y).sum() / area)
    radius = np.abs(z)
    weight = coverage * radius**2
    turn = z / np.maximum(radius, 1e-6)
    two, three, four, five = ((weight * turn**k).sum() / weight.sum() for k in (2, 3, 4, 5))
    inner = radius < 0.5 * np.sqrt(weight.sum() / area)
    hollow = 1 - coverage[inner].mean() if inner.any() else 0.0
    spread = 2 * np.pi * weight.sum() / area**2
    corners = np.concatenate([np.stack([columns + a, rows + b], 1) for a in (-0.5, 0.5) for b in (-0.5, 0.5)])
    try:
        solid = len(rows) / ConvexHull(corners).volume
    except QhullError:
        solid = 0.0
    vanish = [abs(two), three.real, four.imag, five.real]
    return np.array([three.imag, four.real, -five.imag, hollow, spread, solid, *vanish])


def see_shape(coverage: np.ndarray) -> tuple[str, float]:
    """(shape, confidence): the nearest ideal outline, unknown where none is near."""
    seen = moments(coverage)
    far = {
        name: float(np.hypot(to_line(seen[:6], np.array(ends)), np.linalg.norm(seen[6:])))
        for name, ends in OUTLINES.items()
    }
    first, second = sorted(far, key=far.__getitem__)[:2]
    if far[first] > TOLERANCE:
        return UNKNOWN, 0.0
    return first, 1 - far[first] / far[second]


def see_thing(blob: Blob, size: tuple[int, int]) -> SeenThing:
    height, width = size
    shape, confidence = see_shape(blob.coverage)
    rows, columns = np.nonzero(blob.coverage > 0.5)
    left, right = blob.left + columns.min(), blob.left + columns.max() + 1
    top, bottom = blob.top + rows.min(), blob.top + rows.max() + 1
    x, y = float(left + right) / 2 / width, float(top + bottom) / 2 / height
    radius = float(max(np.ptp(rows), np.ptp(columns)) + 1) / 2 / min(size)
    place = PLACES[3 * min(int(3 * y), 2) + min(int(3 * x), 2)]
    size_word = "small" if radius < BETWEEN_SIZES else "large"
    box = (float(left / width), float(top / height), float(right / width), float(bottom / height))
    return SeenThing(shape, blob.color, size_word, place, (x, y), radius, confidence, box)


def find_words(blobs: list[Blob], size: tuple[int, int]) -> tuple[tuple[SeenText, ...], list[Blob]]:
    """(words, the blobs that are no letters): blobs of one color, side by side, that read as letters."""
    words, rest = [], []
    for line in lines_of(blobs, LETTER_GAP * min(size)):
        reading = read_line(line, min(size))
        if reading is None:
            rest += line
            continue
        middle = (min(b.top for b in line) + max(b.bottom for b in line)) / 2 / size[0]
        words.append(SeenText(reading.word, line[0].color, TEXT_PLACES[min(int(3 * middle), 2)]))
    return tuple(words), rest


def lines_of(blobs: list[Blob], gap: float) -> list[list[Blob]]:
    """Blobs gathered from left to right where the next has the same color and height and is close."""
    lines: list[list[Blob]] = []
    for blob in sorted(blobs, key=lambda b: b.left):
        for line in lines:
            last = line[-1]
            shared = min(last.bottom, blob.bottom) - max(last.top, blob.top)
            tall = max(last.bottom - last.top, blob.bottom - blob.top)
            if (
                last.color == blob.color
                and blob.left - last.right + 2 * MARGIN <= gap
                and shared >= 0.6 * tall
            ):
                line.append(blob)
                break
        else:
            lines.append([blob])
    return lines


def read_line(line: list[Blob], side: int) -> Reading | None:
    """The word that a line of blobs spells, or None where they are things: one that has a thing's shape, or
    any that is too tall, too low or too full for letters.
    """
    tall = max(b.bottom - b.top for b in line) - 2 * MARGIN
    if not 0.08 * side < tall < 0.3 * side or any(is_full(blob) for blob in line):
        return None
    if len(line) == 1 and see_shape(line[0].coverage)[0] != UNKNOWN:
        return None
    reading = read_letters([blob.coverage for blob in line])
    if reading.fit < 0.5 or not 1 <= len(reading.word) <= 5:
        return None
    if len(line) == 1:
        wide = (line[0].right - line[0].left - 2 * MARGIN) > 1.3 * tall
        alone = len(reading.word) == 1 and reading.word not in LIKE_RINGS and reading.fit > 0.7
        return reading if wide or alone else None
    return reading


def is_full(blob: Blob) -> bool:
    """Whether a blob fills its box as no letter but a narrow I does."""
    rows, columns = np.nonzero(blob.coverage > 0.5)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    return bool(width > 0.5 * height and len(rows) > FULL * height * width)
