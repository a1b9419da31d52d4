"""The settings inside of what was made, to make it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from openlance.config import SamplingConfig
from openlance.data.save import read_settings
from openlance.errors import InputError

FAST: dict[str, Callable[[Any], Any]] = {"solver": str, "reuse": float, "reuse_order": int}
"""Settings of fewer and shorter steps."""


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
    solver: str = "euler"
    reuse: float = 0.0
    reuse_order: int = 0

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Recipe:
        """From the record of an order. Raises InputError where it is none.

        What older records do not say was not there then: it is as where nothing is chosen.
        """
        try:
            sampling = settings["sampling"]
            fast = {name: kind(sampling[name]) for name, kind in FAST.items() if name in sampling}
            SamplingConfig(**fast)  # refuses what cannot be chosen
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
                **fast,
            )
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise InputError("the settings in this file are not those of a picture or clip") from error


def recipe_inside(data: bytes) -> Recipe:
    """Of a file's bytes. Raises InputError where it was not made by openlance."""
    return Recipe.of(read_settings(data))
