"""Read capital letters by comparing with the glyphs of the font that comes with Pillow.

This is the one place where the judge shares a source with the pictures: the letters' outlines. A line is
read as the sequence of glyphs and gaps that leaves the least ink unexplained, so that letters that touch can
be read too.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

ROWS = 20  # every blob is brought to this height, as every glyph is
EM, BOLD = 160, 6  # pixels: the glyphs' size, and the stroke around them that makes them bold
SOFT = 3  # pixels: a slight blur, as the pictures that are judged have
LETTER_COST = 4.0  # ink a letter must explain at least, lest a smudge be read as an I


@dataclass(frozen=True)
class Reading:
    """A word in capitals and its fit: the share of the ink that it explains, at most 1."""

    word: str
    fit: float


def to_rows(image: Image.Image, stretch: float = 1.0) -> np.ndarray:
    """Crop float ink [h, w] in [0, 1] to where it is at least a half and scale it to [ROWS, w']."""
    ink = np.asarray(image, np.float32)
    rows, columns = np.nonzero(ink >= 0.5)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    width = max(1, round(stretch * ROWS * (box[2] - box[0]) / (box[3] - box[1])))
    return np.asarray(image.resize((width, ROWS), Image.Resampling.BOX, box=box))


@cache
def glyphs() -> dict[int, tuple[str, np.ndarray]]:
    """By width w in columns: (letters, one each, and their ink [letters, ROWS * w]).

    The bold glyphs A to Z, each a little narrower, as it is and a little wider.
    """
    font = ImageFont.load_default(EM)
    found: dict[int, dict[str, np.ndarray]] = {}
    for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ":
        image = Image.new("F", (2 * EM, 2 * EM))
        ImageDraw.Draw(image).text((60, 60), letter, fill=1.0, font=font, stroke_width=BOLD)
        image = Image.fromarray(ndimage.gaussian_filter(np.asarray(image), SOFT))
        for stretch in (0.93, 1.0, 1.07):
            ink = to_rows(image, stretch)
            found.setdefault(ink.shape[1], {})[letter] = ink.ravel()
    return {width: ("".join(inks), np.stack(list(inks.values()))) for width, inks in found.items()}


def read_blob(coverage: np.ndarray) -> tuple[str, float, float]:
    """(letters, unexplained ink, ink) of one blob, coverage [h, w]; ink is summed squares after scaling."""
    ink = np.pad(to_rows(Image.fromarray(coverage.astype(np.float32))), ((0, 0), (1, 1)))
    columns = ink.shape[1]
    blank = np.concatenate([[0.0], np.cumsum((ink**2).sum(axis=0))])
    # What each glyph leaves unexplained, by its last column: (cost, letter, width).
    ends: list[list[tuple[float, str, int]]] = [[] for _ in range(columns + 1)]
    for width, (letters, shapes) in glyphs().items():
        if width > columns:
            continue
        parts = np.lib.stride_tricks.sliding_window_view(ink, width, axis=1)  # [ROWS, starts, width]
        parts = parts.transpose(1, 0, 2).reshape(-1, ROWS * width)
        costs = (parts**2).sum(1)[:, None] - 2 * parts @ shapes.T + (shapes**2).sum(1)
        for start, index in enumerate(costs.argmin(axis=1)):
            ends[start + width].append((float(costs[start, index]), letters[index], width))
    # Best explanation of the columns before each one: a gap of one column, or a glyph that ends there.
    best: list[tuple[float, str]] = [(0.0, "")]
    for end in range(1, columns + 1):
        options = [(best[end - 1][0] + blank[end] - blank[end - 1], best[end - 1][1])]
        for cost, letter, width in ends[end]:
            before, word = best[end - width]
            options.append((before + cost + LETTER_COST, word + letter))
        best.append(min(options))
    return best[-1][1], best[-1][0], float(blank[-1])


def read_letters(line: list[np.ndarray]) -> Reading:
    """The word of a line of blobs, from left to right."""
    read = [read_blob(coverage) for coverage in line if (coverage >= 0.5).any()]
    ink = sum(total for _, _, total in read)
    return Reading(
        "".join(letters for letters, _, _ in read), 1 - sum(cost for _, cost, _ in read) / max(ink, 1e-6)
    )
