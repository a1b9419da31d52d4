"""Whether a picture shows the text that its prompt quotes, read by an OCR engine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from openlance.errors import InputError
from openlance.rl.rewards.base import Media, Metadata

# Straight and typographic double quotes, and single ones that stand at the borders of words (not "it's").
QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|(?<!\w)\'(.+?)\'(?!\w)|‘(.+?)’(?!\w)')


def quoted(prompt: str) -> str:
    """All text in quotes of a prompt, joined by blanks. Raises InputError where nothing is quoted."""
    found = [next(filter(None, match.groups())) for match in QUOTED.finditer(prompt)]
    if not "".join(found).strip():
        raise InputError(f'no text to read in the prompt {prompt!r}: put the words that it shows in "quotes"')
    return " ".join(found)


def likeness(read: str, wanted: str) -> float:
    """1 − min(d, n) / n with d the Levenshtein distance of what is read to the n letters that are wanted.

    Both in lower case and without blanks. Text beyond what is wanted costs as much as text that is missing.
    """
    read, wanted = ("".join(text.lower().split()) for text in (read, wanted))
    return 1 - min(distance(read, wanted), len(wanted)) / len(wanted)


def distance(first: str, second: str) -> int:
    """Levenshtein distance: fewest insertions, deletions and substitutions."""
    row = list(range(len(second) + 1))
    for number, letter in enumerate(first, start=1):
        above, row = row, [number]
        for column, other in enumerate(second, start=1):
            row.append(min(above[column] + 1, row[-1] + 1, above[column - 1] + (letter != other)))
    return row[-1]


class OCR:
    """The reward: `likeness` of what RapidOCR reads to what the prompt quotes; of a clip, its middle frame.

    Raises InputError where the engine is not installed.
    """

    def __init__(self) -> None:
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise InputError("the OCR reward needs RapidOCR: pip install 'openlance[rl]'") from error
        self.engine: Any = RapidOCR(params={"Global.log_level": "error"})

    def read(self, picture: np.ndarray) -> str:
        """All text of a picture, uint8 RGB [H, W, 3], in the engine's order; empty where there is none."""
        found = self.engine(picture[:, :, ::-1])  # it takes BGR
        return " ".join(found.txts or ())

    def __call__(
        self, prompts: Sequence[str], media: Sequence[Media], metadata: Sequence[Metadata]
    ) -> Sequence[float]:
        found = []
        for prompt, shown in zip(prompts, media, strict=True):
            wanted = quoted(prompt)
            if isinstance(shown, str):
                raise InputError(f"OCR reads pictures, and {prompt!r} has words")
            found.append(likeness(self.read(shown[len(shown) // 2]), wanted))
        return found
