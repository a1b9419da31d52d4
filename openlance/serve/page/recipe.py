"""The settings inside of what was made, to make it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from openlance.data.save import read_settings
from openlance.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """What the controls of the page hold of a picture's or clip's settings."""

    prompt: str
    negative: str
    seed: int
    height: int
    width: int
    frames: int
    clip: bool
    steps: int
    guidance: float
    shift: float

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Recipe:
        """From the record of an order. Raises InputError where it is none."""
        try:
            sampling = settings["sampling"]
            return cls(
                prompt=str(settings["prompt"]),
                negative=str(settings["negative_prompt"] or ""),
                seed=int(settings["seed"]),
                height=int(settings["size"][0]),
                width=int(settings["size"][1]),
                frames=int(settings["frames"]),
                clip=settings["fps"] is not None,
                steps=int(sampling["steps"]),
                guidance=float(sampling["guidance"]),
                shift=float(sampling["shift"]),
            )
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise InputError("the settings in this file are not those of a picture or clip") from error


def recipe_inside(data: bytes) -> Recipe:
    """Of a file's bytes. Raises InputError where it was not made by openlance."""
    return Recipe.of(read_settings(data))
