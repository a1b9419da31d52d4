"""Orders: requests that have been checked and prepared, and wait to be run, alone or together."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from openlance.config import ModelConfig, SamplingConfig, Sizes, TextConfig, to_dict
from openlance.data.media import Media, Source, Video
from openlance.data.tasks import View
from openlance.errors import InputError
from openlance.infer.messages import media_of, read
from openlance.infer.messages import prompt as checked
from openlance.infer.messages import question as asked
from openlance.infer.prepare import Resolutions, Size, target_frames, target_size, view
from openlance.infer.result import Generated
from openlance.model.lance import Lance
from openlance.model.vae import VAE
from openlance.sequence.segment import Kind, Role, Sample, Segment
from openlance.sequence.template import Message, Task, build, compose, system_prompt
from openlance.tokenizer import Tokenizer

PARTS_OF: dict[Task, frozenset[str]] = {
    **dict.fromkeys((Task.T2I, Task.T2V, Task.I2V), frozenset({"und", "gen", "vae"})),
    **dict.fromkeys(
        (Task.IMAGE_EDIT, Task.VIDEO_EDIT, Task.SUBJECT_IMAGE, Task.SUBJECT_VIDEO),
        frozenset({"und", "gen", "vision", "vae"}),
    ),
    **dict.fromkeys((Task.X2T_IMAGE, Task.X2T_VIDEO), frozenset({"und", "vision"})),
    Task.CHAT: frozenset({"und"}),
}
"""Which parts of a checkpoint each task needs; the others need not be loaded."""


class Choices(TypedDict, total=False):
    """What every generating order takes by name; settings that are not given are the checkpoint's own.

    seed: drawn and reported where not given. negative_prompt: what guidance moves away from. The rest: see
    `SamplingConfig`.
    """

    seed: int | None
    negative_prompt: str | None
    steps: int
    solver: str
    shift: float
    guidance: float
    guidance_interval: tuple[float, float]
    renorm: str
    renorm_min: float
    visual_guidance: float | None
    sample_posterior: bool
    released_cached_sampler: bool
    reuse: float
    reuse_order: int


class TextOptions(TypedDict, total=False):
    """What every answering call takes by name: `seed`, and the fields of `TextConfig`."""

    seed: int | None
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    stop: tuple[str, ...]
    lookup: int


@dataclass(frozen=True, eq=False)
class GenerateOrder:
    """A picture or clip to make.

    sample: the sequence up to its target, its last segment; negative: the same with the words to move away
    from. fps: of a clip. record: the settings that the result will carry. turns: of an edit, those that led
    to it, its own included, so that its result can be edited with their history.
    """

    task: Task
    sample: Sample
    sampling: SamplingConfig
    seed: int
    record: dict[str, Any]
    fps: float | None = None
    negative: Sample | None = None
    turns: tuple[Message, ...] = ()

    @property
    def tokens(self) -> int:
        """That it holds in memory: its sequence, for each guidance branch."""
        guided = self.sampling.guidance != 1.0
        visual = self.sampling.visual_guidance is not None
        return sum(map(len, self.sample)) * (1 + (guided or visual) + visual)


@dataclass(frozen=True, eq=False)
class AnswerOrder:
    """A question, or a conversation, to answer."""

    sample: Sample
    text: TextConfig
    seed: int
    record: dict[str, Any]

    @property
    def tokens(self) -> int:
        """That it holds in memory: what was said, and room for the answer."""
        return sum(map(len, self.sample)) + self.text.max_tokens


Order = GenerateOrder | AnswerOrder


def together(orders: Sequence[Order], most: int) -> list[list[int]]:
    """Which orders run together, as indices: answers, or targets that are sampled alike, up to `most` tokens.

    Each goes into the first group that has room for it; one that is larger than `most` runs alone.
    """
    groups: list[list[int]] = []
    for index, order in enumerate(orders):
        for group in groups:
            room = most - sum(orders[member].tokens for member in group)
            if _kind(orders[group[0]]) == _kind(order) and order.tokens <= room:
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def _kind(order: Order) -> SamplingConfig | None:
    return order.sampling if isinstance(order, GenerateOrder) else None


@dataclass(frozen=True)
class _Chosen:
    """What `Choices` come to."""

    seed: int
    negative: str | None
    sampling: SamplingConfig

    def posterior(self) -> torch.Generator | None:
        """What draws the latents of conditions, where they are not their mean."""
        return torch.Generator().manual_seed(self.seed) if self.sampling.sample_posterior else None


class Orders:
    """Makes orders: methods as those of `LancePipeline`, which run one each, with the same arguments.

    Media are loaded and encoded here, and everything is checked: raises InputError for what cannot be used.
    """

    def __init__(self, model: Lance, tokenizer: Tokenizer, vae: VAE | None):
        self.model, self.tokenizer, self.vae = model, tokenizer, vae

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def generate_image(
        self, prompt: str, *, size: Size | int | None = None, **options: Unpack[Choices]
    ) -> GenerateOrder:
        """Text to image."""
        target = self._target(1, self._size(size, video=False))
        return self._generate(Task.T2I, [checked(prompt)], target, self._chosen(options))

    def generate_video(
        self,
        prompt: str,
        *,
        size: Size | int | None = None,
        frames: int | None = None,
        **options: Unpack[Choices],
    ) -> GenerateOrder:
        """Text to video."""
        target = self._target(self._frames(frames), self._size(size, video=True))
        return self._generate(Task.T2V, [checked(prompt)], target, self._chosen(options))

    def animate(
        self,
        image: Source | Generated,
        prompt: str,
        *,
        last: Source | Generated | None = None,
        frames: int | None = None,
        **options: Unpack[Choices],
    ) -> GenerateOrder:
        """Image to video."""
        self._need(Task.I2V)
        words, chosen = [checked(prompt)], self._chosen(options)
        count = self._frames(frames)
        first = self._latents(image, chosen)
        latents = torch.zeros(self._latent_frames(count), *first.shape[1:])
        latents[0] = first[0]
        fixed: tuple[int, ...] = (0,)
        if last is not None:
            ending = self._latents(last, chosen)
            if ending.shape != first.shape:
                raise InputError("the last frame has another aspect ratio than the first: crop one of them")
            latents[-1], fixed = ending[0], (0, len(latents) - 1)
        if len(latents) <= len(fixed):
            least = len(fixed) * self.config.vae.temporal_stride + 1
            raise InputError(f"{count} frames leave nothing to generate: ask for {least} or more")
        target = replace(_like(latents), latents=latents, fixed_frames=fixed)
        return self._generate(Task.I2V, words, target, chosen)

    def edit(
        self,
        source: Source | Generated,
        prompt: str,
        *,
        keep_history: bool = False,
        **options: Unpack[Choices],
    ) -> GenerateOrder:
        """Change a picture or clip."""
        history = source.history if isinstance(source, Generated) and keep_history else ()
        if keep_history and not history:
            raise InputError("keep_history needs an edited result to go on from")
        words, chosen = checked(prompt), self._chosen(options)
        media = media_of(source, self.config)
        task = Task.VIDEO_EDIT if isinstance(media, Video) else Task.IMAGE_EDIT
        self._need(task)
        seen = self._view(media, chosen, video=task.video)
        assert seen.latents is not None
        parts: list[str | Segment] = [words] if history else [*seen.segments(Role.SOURCE), words]
        fps = media.fps if isinstance(media, Video) else None
        order = self._generate(task, parts, _like(seen.latents), chosen, history, fps)
        return replace(order, turns=(*history, Message("user", tuple(parts), past=True)))

    def subject(
        self,
        references: Source | Generated | Sequence[Source | Generated],
        prompt: str,
        *,
        video: bool = False,
        size: Size | int | None = None,
        frames: int | None = None,
        **options: Unpack[Choices],
    ) -> GenerateOrder:
        """Draw (or film) subjects."""
        sources = list(references) if isinstance(references, (list, tuple)) else [references]
        if not sources:
            raise InputError("subject needs at least one reference picture")
        task = Task.SUBJECT_VIDEO if video else Task.SUBJECT_IMAGE
        self._need(task)
        words, chosen = checked(prompt), self._chosen(options)
        target = self._target(self._frames(frames) if video else 1, self._size(size, video=video))
        parts: list[str | Segment] = []
        for source in sources:
            seen = self._view(media_of(source, self.config), chosen, video=video)
            parts += seen.segments(Role.REFERENCE)
        return self._generate(task, [*parts, words], target, chosen)

    def ask(
        self,
        question: str = "",
        media: Source | Generated | Sequence[Source | Generated] = (),
        **options: Unpack[TextOptions],
    ) -> AnswerOrder:
        """Answer a question."""
        return self.chat(asked(question, media), **options)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[TextOptions]) -> AnswerOrder:
        """Continue a conversation."""
        settings: dict[str, Any] = dict(options)
        seed = _seed(settings)
        config = override(TextConfig(), settings)
        task, turns = read(messages, self.config)
        self._need(task)
        sample = build(turns, self.tokenizer.encode_with_offsets, open_turn=True)
        record = {"seed": seed, "model": self.config.name, "text": to_dict(config)}
        return AnswerOrder(sample, config, seed, record)

    # -- how it is done ------------------------------------------------------------------------------

    def _generate(
        self,
        task: Task,
        parts: Sequence[str | Segment],
        target: Segment,
        chosen: _Chosen,
        history: tuple[Message, ...] = (),
        fps: float | None = None,
    ) -> GenerateOrder:
        """parts: the user's turn. history: the turns before it. fps: where it is not the checkpoint's."""
        self._need(task)
        assert target.grid is not None
        frames, *sides = target.grid
        vae, sizes = self.config.vae, self.config.sizes
        fps = (fps or sizes.fps) if task.video else None
        record = {
            "task": str(task),
            "prompt": " ".join(part for part in parts if isinstance(part, str)),
            "negative_prompt": chosen.negative,
            "seed": chosen.seed,
            "size": [side * vae.spatial_stride for side in sides],
            "frames": (frames - 1) * vae.temporal_stride + 1,
            "fps": fps,
            "model": self.config.name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "sizes": to_dict(sizes),
            "sampling": to_dict(chosen.sampling),
        }
        sample, negative = self._sample(task, parts, target, history), None
        if chosen.negative:
            shown = [part for part in parts if not isinstance(part, str)]
            negative = self._sample(task, [*shown, chosen.negative], target, history)
        return GenerateOrder(task, sample, chosen.sampling, chosen.seed, record, fps, negative)

    def _sample(
        self, task: Task, parts: Sequence[str | Segment], target: Segment, history: tuple[Message, ...]
    ) -> Sample:
        """The sequence up to its target."""
        encode, system = self.tokenizer.encode_with_offsets, system_prompt(task, self.config.system_prompts)
        sample = compose(parts, encode, system=system, ending=target, history=history)
        return sample[: sample.index(target) + 1]

    def _chosen(self, options: Choices) -> _Chosen:
        settings: dict[str, Any] = dict(options)
        seed, negative = _seed(settings), settings.pop("negative_prompt", None)
        return _Chosen(seed, negative, override(self.config.sampling, settings))

    def _target(self, frames: int, size: Size) -> Segment:
        stride = self.config.vae.spatial_stride
        grid = (self._latent_frames(frames), size[0] // stride, size[1] // stride)
        return Segment(Kind.NOISY, Role.TARGET, grid=grid)

    def _view(self, media: Media, chosen: _Chosen, *, video: bool, semantic: bool = True) -> View:
        resolutions = Resolutions.of(self.config.sizes, video=video)
        posterior = chosen.posterior()
        return view(media, resolutions, self.config, self.vae, semantic=semantic, posterior=posterior)

    def _latents(self, source: Source | Generated, chosen: _Chosen) -> Tensor:
        """Latents [frames, rows, columns, channels] of a picture, at the resolution of clips."""
        seen = self._view(media_of(source, self.config), chosen, video=True, semantic=False)
        assert seen.latents is not None
        return seen.latents

    def _need(self, task: Task) -> None:
        have = self.model.parts | ({"vae"} if self.vae is not None else set())
        missing = PARTS_OF[task] - have
        if missing:
            raise InputError(f"{task} needs {', '.join(sorted(missing))}: load the checkpoint with this task")

    def _size(self, size: Size | int | None, *, video: bool) -> Size:
        side = self.config.sizes.video if video else self.config.sizes.image
        return target_size(size, (side, side), self.config)

    def _frames(self, frames: int | None) -> int:
        return target_frames(self.config.sizes.frames if frames is None else frames, self.config)

    def _latent_frames(self, frames: int) -> int:
        return (frames - 1) // self.config.vae.temporal_stride + 1


def _like(latents: Tensor) -> Segment:
    """A target of the shape of latents [frames, rows, columns, channels]."""
    frames, rows, columns, _ = latents.shape
    return Segment(Kind.NOISY, Role.TARGET, grid=(frames, rows, columns))


def new_seed() -> int:
    """A seed that nobody chose."""
    return secrets.randbelow(2**31)


def _seed(settings: dict[str, Any]) -> int:
    """Taken out of the settings; a new one where there is none. Raises InputError for what is no seed."""
    seed = settings.pop("seed", None)
    if seed is None:
        return new_seed()
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InputError(f"seed must be a whole number from 0 to 2^63 - 1, not {seed!r}")
    return seed


Config = TypeVar("Config", SamplingConfig, TextConfig, Sizes)


def override(config: Config, settings: Mapping[str, Any]) -> Config:
    """The configuration with some fields replaced. Raises InputError for a name that it does not have."""
    known = {field.name for field in fields(config)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise InputError(f"unknown settings {', '.join(unknown)}: choose from {', '.join(sorted(known))}")
    return replace(config, **settings)
