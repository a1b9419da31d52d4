"""Rows of data into samples, by the same builder as inference."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from openlance.config import ModelConfig
from openlance.sequence.segment import Kind, Role, Sample, Segment
from openlance.sequence.template import Encode, Task, compose, system_prompt


@dataclass(frozen=True, eq=False)
class View:
    """One picture or clip as the model sees it.

    grid: (frames, rows, columns) of the merged ViT tokens, with their patches or features (see `Segment`).
    latents: [frames, rows, columns, channels].
    """

    grid: tuple[int, int, int] | None = None
    patches: Tensor | None = None
    features: Tensor | None = None
    latents: Tensor | None = None

    def segments(self, role: Role, *, semantic: bool = True, pixels: bool = True) -> list[Segment]:
        """The ViT segment, then the clean latents, as far as wanted and known."""
        found = []
        if semantic and self.grid is not None:
            found.append(
                Segment(Kind.VIT, role, grid=self.grid, patches=self.patches, features=self.features)
            )
        if pixels and self.latents is not None:
            found.append(
                Segment(Kind.CLEAN, role, grid=tuple(self.latents.shape[:3]), latents=self.latents)  # type: ignore[arg-type]
            )
        return found


@dataclass(frozen=True, eq=False)
class Row:
    """One row of training data.

    prompt: the user's words ("" for a plain caption). answer: words to learn, of an understanding task.
    sources: what the user shows. target: latents [frames, rows, columns, channels] to generate; its
    `fixed_frames` are given (image-to-video).
    """

    id: str
    task: Task
    prompt: str
    answer: str | None = None
    sources: tuple[View, ...] = ()
    target: Tensor | None = None
    fixed_frames: tuple[int, ...] = ()


def to_sample(row: Row, encode: Encode, config: ModelConfig) -> Sample:
    """The row as a training sample, its target clean (the loop mixes noise in)."""
    subject = row.task in (Task.SUBJECT_IMAGE, Task.SUBJECT_VIDEO)
    role = Role.REFERENCE if subject else Role.SOURCE
    parts: list[str | Segment] = []
    for view in row.sources:
        parts += view.segments(role, pixels=row.task.generates)
    if row.prompt:
        parts.append(row.prompt)
    ending: str | Segment
    if row.task.generates:
        assert row.target is not None, f"row {row.id} has no target"
        ending = Segment(
            Kind.NOISY,
            Role.TARGET,
            grid=tuple(row.target.shape[:3]),  # type: ignore[arg-type]
            latents=row.target,
            fixed_frames=row.fixed_frames,
        )
    else:
        assert row.answer is not None, f"row {row.id} has no answer"
        ending = row.answer
    system = system_prompt(row.task, config.system_prompts, caption=not row.prompt)
    return compose(parts, encode, system=system, ending=ending)
