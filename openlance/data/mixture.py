"""How much of what: shares of tasks and sizes of media, by step.

The numbers are the paper's (arXiv 2605.18678). Where it gives none, which is where a stage changes from one
mixture or size to the next, ours change after equal numbers of steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Generic, TypeVar

from openlance.config import Sizes
from openlance.errors import InputError
from openlance.sequence.template import Task

T = TypeVar("T")

IMAGES = (Task.T2I, Task.IMAGE_EDIT, Task.SUBJECT_IMAGE)
VIDEOS = (Task.T2V, Task.I2V, Task.VIDEO_EDIT, Task.SUBJECT_VIDEO)
SIDES = ((256, 192), (512, 360), (768, 480))
"""Resolutions of (pictures, clips) from the first steps to the last; of pictures the paper gives the last."""


@dataclass(frozen=True)
class Schedule(Generic[T]):
    """A value for every step: (first step, value) for each change, the first at step 0.

    Raises InputError for steps that do not start at 0 and go up.
    """

    changes: tuple[tuple[int, T], ...]

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.changes]
        if steps[:1] != [0] or any(step >= after for step, after in pairwise(steps)):
            raise InputError(f"the steps of a schedule must start at 0 and go up, not {steps}")

    @classmethod
    def constant(cls, value: T) -> Schedule[T]:
        return cls(((0, value),))

    @classmethod
    def evenly(cls, values: Sequence[T], steps: int) -> Schedule[T]:
        """Each value for an equal part of the steps; of fewer steps than values, the later ones."""
        return cls(tuple({place * steps // len(values): value for place, value in enumerate(values)}.items()))

    def at(self, step: int) -> T:
        return next(value for first, value in reversed(self.changes) if first <= step)

    @property
    def values(self) -> tuple[T, ...]:
        return tuple(value for _, value in self.changes)


@dataclass(frozen=True)
class Mixture:
    """Shares of samples: of the four kinds and of conversations, and within generation of its tasks.

    images: text to image : edit : subject. videos: text to video : image to video : edit : subject. Shares
    compare with others of their line only; 0 is never drawn.
    """

    video_generation: float = 64
    video_understanding: float = 16
    image_generation: float = 16
    image_understanding: float = 4
    chat: float = 0
    images: tuple[float, float, float] = (100, 0, 0)
    videos: tuple[float, float, float, float] = (100, 0, 0, 0)

    def __post_init__(self) -> None:
        if any(share < 0 for share in (*dict(self._kinds()).values(), *self.images, *self.videos)):
            raise InputError(f"the shares of a mixture must be 0 or more: {self}")

    def over(self, tasks: Iterable[Task]) -> dict[Task, float]:
        """Probabilities of the tasks that there is data for.

        The share of a task without data goes to the others of its kind, that of a kind without data to the
        other kinds. Raises InputError where nothing is left.
        """
        have = set(tasks)
        kinds = {
            kind: {task: share for task, share in members.items() if share > 0 and task in have}
            for (kind, _), members in zip(self._kinds(), self._members(), strict=True)
        }
        weights = {kind: weight for kind, weight in self._kinds() if weight > 0 and kinds[kind]}
        if not weights:
            raise InputError(
                f"the mixture draws none of the tasks that there is data for "
                f"({', '.join(sorted(have)) or 'there is none'})"
            )
        return {
            task: weight / sum(weights.values()) * share / sum(kinds[kind].values())
            for kind, weight in weights.items()
            for task, share in kinds[kind].items()
        }

    def missing(self, tasks: Iterable[Task]) -> tuple[Task, ...]:
        """The tasks that have a share and no data."""
        return tuple(task for task in self.over(Task) if task not in set(tasks))

    def _kinds(self) -> tuple[tuple[str, float], ...]:
        names = ("video_generation", "video_understanding", "image_generation", "image_understanding", "chat")
        return tuple((name, getattr(self, name)) for name in names)

    def _members(self) -> tuple[dict[Task, float], ...]:
        """Tasks and shares of each kind, in the order of `_kinds`."""
        return (
            dict(zip(VIDEOS, self.videos, strict=True)),
            {Task.X2T_VIDEO: 1.0},
            dict(zip(IMAGES, self.images, strict=True)),
            {Task.X2T_IMAGE: 1.0},
            {Task.CHAT: 1.0},
        )


PRE_TRAINING = Mixture()
CONTINUAL = (
    replace(PRE_TRAINING, images=(70, 15, 15), videos=(60, 10, 15, 15)),
    replace(PRE_TRAINING, images=(60, 20, 20), videos=(40, 20, 20, 20)),
    replace(PRE_TRAINING, images=(50, 25, 25), videos=(25, 25, 25, 25)),
)
FINE_TUNING = replace(PRE_TRAINING, images=(60, 20, 20), videos=(60, 10, 15, 15))
STAGES: dict[str, tuple[Mixture, ...]] = {
    "pre-training": (PRE_TRAINING,),
    "continual training": CONTINUAL,
    "fine-tuning": (FINE_TUNING,),
}


def mixture_of(stage: str, steps: int) -> Schedule[Mixture]:
    """The mixture of a stage that takes so many steps. Raises InputError for an unknown stage."""
    if stage not in STAGES:
        raise InputError(f"unknown stage {stage!r}: choose one of {', '.join(STAGES)}")
    return Schedule.evenly(STAGES[stage], steps)


def growing(sizes: Sizes, steps: int) -> Schedule[Sizes]:
    """Pictures and clips from small to `sizes`, by step.

    The ViT is frozen, so what it looks at has one size throughout.
    """
    grown = [
        replace(sizes, image=min(image, sizes.image), video=min(video, sizes.video)) for image, video in SIDES
    ]
    stages = list(dict.fromkeys([*grown, sizes]))
    return Schedule.evenly(stages, steps)
