"""The public API: one object that generates, edits and answers."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from openlance.config import ModelConfig, SamplingConfig, Sizes, TextConfig, to_dict
from openlance.data.media import Frames, Media, Source, Video, from_vae_pixels
from openlance.data.tasks import View
from openlance.errors import InputError
from openlance.infer.device import pick_device
from openlance.infer.generate import OnStep, denoise, speak
from openlance.infer.messages import media_of, read
from openlance.infer.messages import prompt as checked
from openlance.infer.messages import question as asked
from openlance.infer.prepare import Resolutions, Size, target_frames, target_size, view
from openlance.infer.result import Answer, Generated
from openlance.infer.stream import TextStream
from openlance.model.checkpoint import find_release, load_model, load_vae, read_config
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


class Options(TypedDict, total=False):
    """What every generating call takes by name; settings that are not given are the checkpoint's own.

    seed: drawn and reported where not given. negative_prompt: what guidance moves away from. on_step: called
    after each step, see `openlance.infer.generate.OnStep`. The rest: see `SamplingConfig`.
    """

    seed: int | None
    negative_prompt: str | None
    on_step: OnStep | None
    steps: int
    shift: float
    guidance: float
    guidance_interval: tuple[float, float]
    renorm: str
    renorm_min: float
    visual_guidance: float | None
    sample_posterior: bool
    released_cached_sampler: bool


class TextOptions(TypedDict, total=False):
    """What every answering call takes by name: `seed`, and the fields of `TextConfig`."""

    seed: int | None
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    stop: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Order:
    """What is to be generated.

    parts: the user's turn. size: (frames, height, width). given: latents of which the `fixed` frames are
    kept. history: earlier turns.
    """

    task: Task
    parts: Sequence[str | Segment]
    size: tuple[int, int, int]
    given: Tensor | None = None
    fixed: tuple[int, ...] = ()
    history: tuple[Message, ...] = ()
    fps: float | None = None


class LancePipeline:
    """A checkpoint ready for use.

    Generating calls take `Options` by name and answering calls `TextOptions`; the same request with the same
    seed gives the same output. Sizes are (height, width) in pixels. Media are whatever `load_media` of
    `openlance.data.media` reads, and earlier results. All raise InputError for what cannot be used.
    """

    def __init__(self, model: Lance, tokenizer: Tokenizer, vae: VAE | None = None):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.vae = None if vae is None else vae.eval()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = "nano",
        *,
        variant: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        tasks: Sequence[Task] | None = None,
        sizes: Mapping[str, Any] | None = None,
    ) -> LancePipeline:
        """Load a checkpoint: "nano" (bundled), a folder in the released layout, or a Hugging Face id.

        variant: "Lance_3B" or "Lance_3B_Video" where both are there. device: default CUDA, MPS or CPU,
        what there is. dtype: default bfloat16, on CPU float32. tasks: load only what these need.
        sizes: fields of `Sizes`, over the checkpoint's own.
        """
        device = pick_device(device)
        dtype = (torch.float32 if device.type == "cpu" else torch.bfloat16) if dtype is None else dtype
        parts = frozenset().union(*(PARTS_OF[task] for task in tasks or list(Task)))
        release = find_release(source, variant, parts)
        tokenizer = Tokenizer.load(release.folder)
        config = read_config(release, tokenizer)
        config = replace(config, sizes=override(config.sizes, sizes or {}))
        vae = load_vae(release, config, device=device, dtype=dtype) if "vae" in parts else None
        model = load_model(release, config, device=device, dtype=dtype, parts=parts - {"vae"})
        return cls(model, tokenizer, vae)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def generate_image(
        self, prompt: str, *, size: Size | int | None = None, **options: Unpack[Options]
    ) -> Generated:
        """Text to image."""
        order = _Order(Task.T2I, [checked(prompt)], (1, *self._size(size, video=False)))
        return self._generate(order, options)

    def generate_video(
        self,
        prompt: str,
        *,
        size: Size | int | None = None,
        frames: int | None = None,
        **options: Unpack[Options],
    ) -> Generated:
        """Text to video; `frames` at the checkpoint's frame rate."""
        shape = (self._frames(frames), *self._size(size, video=True))
        return self._generate(_Order(Task.T2V, [checked(prompt)], shape), options)

    def animate(
        self,
        image: Source | Generated,
        prompt: str,
        *,
        last: Source | Generated | None = None,
        frames: int | None = None,
        **options: Unpack[Options],
    ) -> Generated:
        """Image to video: `image` is the first frame and, where given, `last` the last one.

        The clip takes the aspect ratio of the image.
        """
        self._need(Task.I2V)
        options = _seeded(options)
        count = self._frames(frames)
        first = self._latents(image, options)
        latents = torch.zeros(self._latent_frames(count), *first.shape[1:])
        latents[0] = first[0]
        fixed: tuple[int, ...] = (0,)
        if last is not None:
            ending = self._latents(last, options)
            if ending.shape != first.shape:
                raise InputError("the last frame has another aspect ratio than the first: crop one of them")
            latents[-1], fixed = ending[0], (0, len(latents) - 1)
        if len(latents) <= len(fixed):
            least = len(fixed) * self.config.vae.temporal_stride + 1
            raise InputError(f"{count} frames leave nothing to generate: ask for {least} or more")
        shape = (count, *self._pixels(latents))
        return self._generate(_Order(Task.I2V, [checked(prompt)], shape, given=latents, fixed=fixed), options)

    def edit(
        self,
        source: Source | Generated,
        prompt: str,
        *,
        keep_history: bool = False,
        **options: Unpack[Options],
    ) -> Generated:
        """Change a picture or clip as the words say.

        source may be an earlier result; with `keep_history` the model then also sees the turns that led to
        it, otherwise only the result itself.
        """
        history = source.history if isinstance(source, Generated) and keep_history else ()
        if keep_history and not history:
            raise InputError("keep_history needs an edited result to go on from")
        media = media_of(source, self.config)
        task = Task.VIDEO_EDIT if isinstance(media, Video) else Task.IMAGE_EDIT
        self._need(task)
        options = _seeded(options)
        seen = self._view(media, options, video=task.video)
        assert seen.latents is not None
        frames = (len(seen.latents) - 1) * self.config.vae.temporal_stride + 1
        parts = [] if history else seen.segments(Role.SOURCE)
        order = _Order(
            task,
            [*parts, checked(prompt)],
            (frames, *self._pixels(seen.latents)),
            history=history,
            fps=media.fps if isinstance(media, Video) else None,
        )
        return self._generate(order, options)

    def subject(
        self,
        references: Source | Generated | Sequence[Source | Generated],
        prompt: str,
        *,
        video: bool = False,
        size: Size | int | None = None,
        frames: int | None = None,
        **options: Unpack[Options],
    ) -> Generated:
        """Draw (or film) the subjects of one or several reference pictures as the words say."""
        sources = list(references) if isinstance(references, (list, tuple)) else [references]
        if not sources:
            raise InputError("subject needs at least one reference picture")
        task = Task.SUBJECT_VIDEO if video else Task.SUBJECT_IMAGE
        self._need(task)
        options = _seeded(options)
        parts: list[str | Segment] = []
        for source in sources:
            seen = self._view(media_of(source, self.config), options, video=video)
            parts += seen.segments(Role.REFERENCE)
        shape = (self._frames(frames) if video else 1, *self._size(size, video=video))
        return self._generate(_Order(task, [*parts, checked(prompt)], shape), options)

    def ask(
        self,
        question: str = "",
        media: Source | Generated | Sequence[Source | Generated] = (),
        **options: Unpack[TextOptions],
    ) -> Answer:
        """Answer a question about pictures and clips, or without any; no question asks for a description."""
        return self.chat(asked(question, media), **options)

    def stream(
        self,
        question: str = "",
        media: Source | Generated | Sequence[Source | Generated] = (),
        **options: Unpack[TextOptions],
    ) -> TextStream:
        """Like `ask`, in pieces as they come; `tokens` and `finish` of the stream are known at its end."""
        return self.chat_stream(asked(question, media), **options)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[TextOptions]) -> Answer:
        """Continue a conversation.

        messages: {"role": "system" | "user" | "assistant", "content": text or a list of parts}, a part being
        {"type": "text", "text": …}, {"type": "image", "image": …} or {"type": "video", "video": …}, in any
        order. A system message replaces the checkpoint's.
        """
        config, seed = _text_options(options)
        seconds: dict[str, float] = {}
        with _timed(seconds, "answer"):
            stream = self._speak(messages, config, seed)
            text = "".join(stream)
        record = {"seed": seed, "model": self.config.name, "text": to_dict(config)}
        return Answer(text, stream.tokens, stream.finish, record, seconds)

    def chat_stream(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[TextOptions]
    ) -> TextStream:
        """Like `chat`, in pieces as they come; `tokens` and `finish` of the stream are known at its end."""
        return self._speak(messages, *_text_options(options))

    # -- how it is done ------------------------------------------------------------------------------

    def _generate(self, order: _Order, options: Options) -> Generated:
        self._need(order.task)
        seed, negative, on_step, sampling = self._sampling(options)
        target = self._target(order)
        other = [part for part in order.parts if not isinstance(part, str)]
        away = self._sample(replace(order, parts=[*other, negative]), target) if negative else None
        assert target.grid is not None
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(*target.grid, self.config.vae.channels, generator=generator)
        seconds: dict[str, float] = {}
        with _timed(seconds, "denoise"):
            sample = self._sample(order, target)
            latents = denoise(self.model, sample, sampling, noise, negative=away, on_step=on_step)
        with _timed(seconds, "decode"):
            frames = self._decode(latents)
        fps = (order.fps or self.config.sizes.fps) if order.task.video else None
        record = {
            "task": str(order.task),
            "prompt": " ".join(part for part in order.parts if isinstance(part, str)),
            "negative_prompt": negative,
            "seed": seed,
            "size": list(order.size[1:]),
            "frames": order.size[0],
            "fps": fps,
            "model": self.config.name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "sizes": to_dict(self.config.sizes),
            "sampling": to_dict(sampling),
        }
        return Generated(frames, fps, record, seconds, self._remember(order, frames, latents))

    def _sampling(self, options: Options) -> tuple[int, str | None, OnStep | None, SamplingConfig]:
        """(seed, negative prompt, callback, settings)."""
        settings: dict[str, Any] = dict(_seeded(options))
        seed = settings.pop("seed")
        negative, on_step = settings.pop("negative_prompt", None), settings.pop("on_step", None)
        return seed, negative, on_step, override(self.config.sampling, settings)

    def _target(self, order: _Order) -> Segment:
        frames, height, width = order.size
        stride = self.config.vae.spatial_stride
        grid = (self._latent_frames(frames), height // stride, width // stride)
        return Segment(Kind.NOISY, Role.TARGET, grid=grid, latents=order.given, fixed_frames=order.fixed)

    def _sample(self, order: _Order, target: Segment) -> Sample:
        """The sequence up to its target."""
        sample = compose(
            order.parts,
            self.tokenizer.encode_with_offsets,
            system=system_prompt(order.task, self.config.system_prompts),
            ending=target,
            history=order.history,
        )
        return sample[: sample.index(target) + 1]

    def _remember(self, order: _Order, frames: Frames, latents: Tensor) -> tuple[Message, ...]:
        """The turns so far, the result as the model will see it included; of edits only."""
        if order.task not in (Task.IMAGE_EDIT, Task.VIDEO_EDIT):
            return ()
        resolutions = Resolutions.of(self.config.sizes, video=order.task.video)
        seen = view(Video(frames, 1.0), resolutions, self.config, None)
        shown = replace(seen, latents=latents.cpu()).segments(Role.SOURCE)
        return (
            *order.history,
            Message("user", tuple(order.parts), past=True),
            Message("assistant", tuple(shown), past=True),
        )

    @torch.inference_mode()
    def _decode(self, latents: Tensor) -> Frames:
        """uint8 [T, H, W, 3] of latents [T', H', W', channels]."""
        assert self.vae is not None
        weight = next(self.vae.parameters())
        return from_vae_pixels(self.vae.decode(latents[None].to(weight))[0])

    def _speak(self, messages: Sequence[Mapping[str, Any]], config: TextConfig, seed: int) -> TextStream:
        task, turns = read(messages, self.config)
        self._need(task)
        ends = frozenset({self.config.tokens.im_end, self.config.tokens.endoftext})
        ids = speak(
            self.model,
            build(turns, self.tokenizer.encode_with_offsets, open_turn=True),
            config,
            allowed=self.tokenizer.size,
            stop=ends,
            generator=torch.Generator().manual_seed(seed),
        )
        return TextStream(ids, self.tokenizer, ends, config.stop)

    def _view(self, media: Media, options: Options, *, video: bool, semantic: bool = True) -> View:
        resolutions = Resolutions.of(self.config.sizes, video=video)
        posterior = None
        if options.get("sample_posterior", self.config.sampling.sample_posterior):
            seed = options["seed"]
            assert seed is not None, "_seeded gives every call a seed"
            posterior = torch.Generator().manual_seed(seed)
        return view(media, resolutions, self.config, self.vae, semantic=semantic, posterior=posterior)

    def _latents(self, source: Source | Generated, options: Options) -> Tensor:
        """Latents [frames, rows, columns, channels] of a picture, at the resolution of clips."""
        seen = self._view(media_of(source, self.config), options, video=True, semantic=False)
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

    def _pixels(self, latents: Tensor) -> Size:
        rows, columns = latents.shape[1:3]
        return rows * self.config.vae.spatial_stride, columns * self.config.vae.spatial_stride


def new_seed() -> int:
    """A seed that nobody chose."""
    return secrets.randbelow(2**31)


Config = TypeVar("Config", SamplingConfig, TextConfig, Sizes)


def override(config: Config, settings: Mapping[str, Any]) -> Config:
    """The configuration with some fields replaced. Raises InputError for a name that it does not have."""
    known = {field.name for field in fields(config)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise InputError(f"unknown settings {', '.join(unknown)}: choose from {', '.join(sorted(known))}")
    return replace(config, **settings)


def _seeded(options: Options) -> Options:
    """The options with a seed, a new one where there is none."""
    return options if options.get("seed") is not None else {**options, "seed": new_seed()}


def _text_options(options: TextOptions) -> tuple[TextConfig, int]:
    settings: dict[str, Any] = dict(options)
    seed = settings.pop("seed", None)
    return override(TextConfig(), settings), new_seed() if seed is None else seed


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start
