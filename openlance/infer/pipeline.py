"""The public API: one object that generates, edits and answers."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from openlance.config import ModelConfig, SamplingConfig, Sizes, TextConfig, to_dict
from openlance.data.media import Frames, Media, Source, Video, from_vae_pixels
from openlance.errors import InputError
from openlance.infer.generate import OnStep, denoise, speak
from openlance.infer.prepare import Resolutions, Size, load, target_frames, target_size, view
from openlance.infer.result import Answer, Generated
from openlance.infer.stream import TextStream
from openlance.model.checkpoint import find_release, load_model, load_vae, read_config
from openlance.model.lance import Lance
from openlance.model.vae import VAE
from openlance.sequence.segment import Kind, Role, Segment
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


class LancePipeline:
    """A checkpoint ready for use.

    Every method takes `seed` (drawn and reported where not given: the same request with the same seed gives
    the same output) and settings of `SamplingConfig` or `TextConfig` by name, over the checkpoint's own.
    Sizes are (height, width) in pixels. All raise InputError for what cannot be used.
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
        self,
        prompt: str,
        *,
        size: Size | int | None = None,
        negative_prompt: str | None = None,
        seed: int | None = None,
        on_step: OnStep | None = None,
        **settings: Any,
    ) -> Generated:
        """Text to image."""
        height, width = target_size(size, (self.config.sizes.image,) * 2, self.config)
        return self._generate(
            Task.T2I, [_words(prompt)], (1, height, width), seed, on_step, settings, negative=negative_prompt
        )

    def generate_video(
        self,
        prompt: str,
        *,
        size: Size | int | None = None,
        frames: int | None = None,
        negative_prompt: str | None = None,
        seed: int | None = None,
        on_step: OnStep | None = None,
        **settings: Any,
    ) -> Generated:
        """Text to video; `frames` at the checkpoint's frame rate."""
        height, width = target_size(size, self._video_size(), self.config)
        return self._generate(
            Task.T2V,
            [_words(prompt)],
            (self._frames(frames), height, width),
            seed,
            on_step,
            settings,
            negative=negative_prompt,
        )

    def animate(
        self,
        image: Source,
        prompt: str,
        *,
        last: Source | None = None,
        frames: int | None = None,
        negative_prompt: str | None = None,
        seed: int | None = None,
        on_step: OnStep | None = None,
        **settings: Any,
    ) -> Generated:
        """Image to video: `image` is the first frame and, where given, `last` the last one.

        The clip takes the aspect ratio of the image.
        """
        count = self._frames(frames)
        resolutions = Resolutions.of(self.config.sizes, video=True)
        first = self._view(image, resolutions, semantic=False).latents
        assert first is not None
        latents = torch.zeros(self._latent_frames(count), *first.shape[1:])
        latents[0], fixed = first[0], (0,)
        if last is not None:
            ending = self._view(last, resolutions, semantic=False).latents
            assert ending is not None
            if ending.shape != first.shape:
                raise InputError("the last frame has another aspect ratio than the first: crop one of them")
            latents[-1], fixed = ending[0], (0, len(latents) - 1)
        stride = self.config.vae.spatial_stride
        size = (count, latents.shape[1] * stride, latents.shape[2] * stride)
        return self._generate(
            Task.I2V,
            [_words(prompt)],
            size,
            seed,
            on_step,
            settings,
            negative=negative_prompt,
            given=latents,
            fixed=fixed,
        )

    def edit(
        self,
        source: Source | Generated,
        prompt: str,
        *,
        keep_history: bool = False,
        negative_prompt: str | None = None,
        seed: int | None = None,
        on_step: OnStep | None = None,
        **settings: Any,
    ) -> Generated:
        """Change a picture or clip as the words say.

        source may be an earlier result; with `keep_history` the model then also sees the turns that led to
        it, otherwise only the result itself.
        """
        history = source.history if isinstance(source, Generated) and keep_history else ()
        if keep_history and not history:
            raise InputError("keep_history needs an edited result to go on from")
        media = self._load(source)
        video = isinstance(media, Video)
        task = Task.VIDEO_EDIT if video else Task.IMAGE_EDIT
        self._need(task)
        seen = self._view(media, Resolutions.of(self.config.sizes, video=video))
        assert seen.latents is not None
        parts = [] if history else seen.segments(Role.SOURCE)
        stride = self.config.vae
        frames = (len(seen.latents) - 1) * stride.temporal_stride + 1
        size = (frames, *(side * stride.spatial_stride for side in seen.latents.shape[1:3]))
        return self._generate(
            task,
            [*parts, _words(prompt)],
            size,
            seed,
            on_step,
            settings,
            negative=negative_prompt,
            history=history,
            fps=_fps(media),
        )

    def subject(
        self,
        references: Source | Sequence[Source],
        prompt: str,
        *,
        video: bool = False,
        size: Size | int | None = None,
        frames: int | None = None,
        negative_prompt: str | None = None,
        seed: int | None = None,
        on_step: OnStep | None = None,
        **settings: Any,
    ) -> Generated:
        """Draw (or film) the subjects of one or several reference pictures as the words say."""
        sources = list(references) if isinstance(references, (list, tuple)) else [references]
        if not sources:
            raise InputError("subject needs at least one reference picture")
        task = Task.SUBJECT_VIDEO if video else Task.SUBJECT_IMAGE
        self._need(task)
        resolutions = Resolutions.of(self.config.sizes, video=video)
        parts: list[str | Segment] = []
        for source in sources:
            parts += self._view(source, resolutions).segments(Role.REFERENCE)
        default = self._video_size() if video else (self.config.sizes.image,) * 2
        height, width = target_size(size, default, self.config)
        count = self._frames(frames) if video else 1
        return self._generate(
            task,
            [*parts, _words(prompt)],
            (count, height, width),
            seed,
            on_step,
            settings,
            negative=negative_prompt,
        )

    def ask(
        self,
        question: str = "",
        media: Source | Generated | Sequence[Source | Generated] = (),
        *,
        seed: int | None = None,
        **settings: Any,
    ) -> Answer:
        """Answer a question about pictures and clips, or without any; no question asks for a description."""
        return self._collect(self._question(question, media), seed, settings)

    def stream(
        self,
        question: str = "",
        media: Source | Generated | Sequence[Source | Generated] = (),
        *,
        seed: int | None = None,
        **settings: Any,
    ) -> Iterator[str]:
        """Like `ask`, in pieces as they come."""
        config = override(TextConfig(), settings)
        return iter(
            self._stream(self._question(question, media), new_seed() if seed is None else seed, config)
        )

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, seed: int | None = None, **settings: Any
    ) -> Answer:
        """Continue a conversation.

        messages: {"role": "system" | "user" | "assistant", "content": text or a list of parts}, a part being
        {"type": "text", "text": …}, {"type": "image", "image": …} or {"type": "video", "video": …}, in any
        order. A system message replaces the checkpoint's.
        """
        return self._collect(self._conversation(messages), seed, settings)

    def chat_stream(
        self, messages: Sequence[Mapping[str, Any]], *, seed: int | None = None, **settings: Any
    ) -> TextStream:
        """Like `chat`, in pieces as they come; its `tokens` and `finish` are known at the end."""
        config = override(TextConfig(), settings)
        return self._stream(self._conversation(messages), new_seed() if seed is None else seed, config)

    # -- how it is done ------------------------------------------------------------------------------

    def _generate(
        self,
        task: Task,
        parts: Sequence[str | Segment],
        size: tuple[int, int, int],
        seed: int | None,
        on_step: OnStep | None,
        settings: dict[str, Any],
        *,
        negative: str | None = None,
        given: Tensor | None = None,
        fixed: tuple[int, ...] = (),
        history: tuple[Message, ...] = (),
        fps: float | None = None,
    ) -> Generated:
        """Generate `size` (frames, height, width); given: latents of which `fixed` frames are kept."""
        self._need(task)
        assert self.vae is not None
        sampling = override(self.config.sampling, settings)
        seed = new_seed() if seed is None else seed
        frames, height, width = size
        stride = self.config.vae.spatial_stride
        grid = (self._latent_frames(frames), height // stride, width // stride)
        target = Segment(Kind.NOISY, Role.TARGET, grid=grid, latents=given, fixed_frames=fixed)
        system = system_prompt(task, self.config.system_prompts)

        def sample(parts: Sequence[str | Segment]) -> list[Segment]:
            made = compose(
                parts, self.tokenizer.encode_with_offsets, system=system, ending=target, history=history
            )
            return made[: made.index(target) + 1]

        other = [p for p in parts if not isinstance(p, str)]
        away = sample([*other, negative]) if negative else None
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(*grid, self.config.vae.channels, generator=generator)
        seconds: dict[str, float] = {}
        with _timed(seconds, "denoise"):
            latents = denoise(self.model, sample(parts), sampling, noise, negative=away, on_step=on_step)
        with _timed(seconds, "decode"):
            pixels = self._decode(latents)
        if task.video:
            fps = fps or self.config.sizes.fps
        words = [part for part in parts if isinstance(part, str)]
        record = {
            "task": str(task), "prompt": " ".join(words), "negative_prompt": negative, "seed": seed,
            "size": [height, width], "frames": frames, "fps": fps, "model": self.config.name,
            "dtype": str(self.model.dtype).removeprefix("torch."), "device": self.model.device.type,
            "sizes": to_dict(self.config.sizes), "sampling": to_dict(sampling),
        }  # fmt: skip
        history = self._remember(task, history, parts, pixels, latents)
        return Generated(pixels, fps if task.video else None, record, seconds, history)

    def _remember(
        self,
        task: Task,
        history: tuple[Message, ...],
        parts: Sequence[str | Segment],
        pixels: Any,
        latents: Tensor,
    ) -> tuple[Message, ...]:
        """The turns so far, the result as the model will see it included; of edits only."""
        if task not in (Task.IMAGE_EDIT, Task.VIDEO_EDIT):
            return ()
        resolutions = Resolutions.of(self.config.sizes, video=task.video)
        seen = view(Video(pixels, 1.0), resolutions, self.config, None)
        shown = replace(seen, latents=latents.cpu()).segments(Role.SOURCE)
        return (
            *history,
            Message("user", tuple(parts), past=True),
            Message("assistant", tuple(shown), past=True),
        )

    @torch.inference_mode()
    def _decode(self, latents: Tensor) -> Frames:
        """uint8 [T, H, W, 3] of latents [T', H', W', channels]."""
        assert self.vae is not None
        weight = next(self.vae.parameters())
        return from_vae_pixels(self.vae.decode(latents[None].to(weight))[0])

    def _question(self, question: str, media: Any) -> list[Message]:
        sources = list(media) if isinstance(media, (list, tuple)) else [media]
        content: list[dict[str, Any]] = [{"type": "media", "media": source} for source in sources]
        if question.strip():
            content.append({"type": "text", "text": question})
        if not content:
            raise InputError("nothing is asked: give a question, or something to look at")
        return self._conversation([{"role": "user", "content": content}])

    def _conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[Message]:
        """The messages with their media seen, and a system prompt in front."""
        loaded = [(message.get("role", ""), self._content(message.get("content"))) for message in messages]
        if not loaded or loaded[-1][0] != "user":
            raise InputError("a conversation must end with a user's message")
        media = [part for _, parts in loaded for part in parts if not isinstance(part, str)]
        video = any(isinstance(part, Video) for part in media)
        task = (Task.X2T_VIDEO if video else Task.X2T_IMAGE) if media else Task.CHAT
        self._need(task)
        caption = not any(isinstance(part, str) for role, parts in loaded for part in parts if role == "user")
        turns = [Message(role, tuple(self._see(part) for part in parts)) for role, parts in loaded]
        if turns[0].role == "system":
            return turns
        prompt = system_prompt(task, self.config.system_prompts, caption=caption)
        return [Message("system", (prompt,)), *turns]

    def _content(self, content: Any) -> list[str | Media]:
        if isinstance(content, str):
            return [_words(content)]
        if not isinstance(content, (list, tuple)) or not content:
            raise InputError("a message's content must be a text, or a list of parts that is not empty")
        parts: list[str | Media] = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind not in ("text", "image", "video", "media") or kind not in part:
                raise InputError(
                    f'unknown part {part!r}: give {{"type": "text", "text": …}}, "image" or "video"'
                )
            parts.append(_words(part["text"]) if kind == "text" else self._load(part[kind]))
        return parts

    def _see(self, part: str | Media) -> str | Segment:
        if isinstance(part, str):
            return part
        resolutions = Resolutions.of(self.config.sizes, video=isinstance(part, Video))
        return view(part, resolutions, self.config, None).segments(Role.SOURCE)[0]

    def _stream(self, messages: list[Message], seed: int, config: TextConfig) -> TextStream:
        encode = self.tokenizer.encode_with_offsets
        ends = frozenset({self.config.tokens.im_end, self.config.tokens.endoftext})
        ids = speak(
            self.model,
            build(messages, encode, open_turn=True),
            config,
            allowed=self.tokenizer.size,
            stop=ends,
            generator=torch.Generator().manual_seed(seed),
        )
        return TextStream(ids, self.tokenizer, ends, config.stop)

    def _collect(self, messages: list[Message], seed: int | None, settings: dict[str, Any]) -> Answer:
        config = override(TextConfig(), settings)
        seed = new_seed() if seed is None else seed
        seconds: dict[str, float] = {}
        with _timed(seconds, "answer"):
            stream = self._stream(messages, seed, config)
            text = "".join(stream)
        record = {"seed": seed, "model": self.config.name, "text": to_dict(config)}
        return Answer(text, stream.tokens, stream.finish, record, seconds)

    def _load(self, source: Any) -> Media:
        return source.media if isinstance(source, Generated) else load(source, self.config.sizes)

    def _view(self, source: Any, resolutions: Resolutions, *, semantic: bool = True) -> Any:
        media = self._load(source)
        return view(media, resolutions, self.config, self.vae, semantic=semantic)

    def _need(self, task: Task) -> None:
        have = self.model.parts | ({"vae"} if self.vae is not None else set())
        missing = PARTS_OF[task] - have
        if missing:
            raise InputError(f"{task} needs {', '.join(sorted(missing))}: load the checkpoint with this task")

    def _frames(self, frames: int | None) -> int:
        return target_frames(self.config.sizes.frames if frames is None else frames, self.config)

    def _latent_frames(self, frames: int) -> int:
        return (frames - 1) // self.config.vae.temporal_stride + 1

    def _video_size(self) -> Size:
        side = self.config.sizes.video
        return side, side


def default_device() -> str:
    """CUDA, else MPS, else CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def pick_device(name: str | torch.device | None) -> torch.device:
    """The device of this name, or the best there is. Raises InputError where it is not there."""
    try:
        device = torch.device(default_device() if name is None else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise InputError(
            f"device {name} cannot be used here ({reason}): choose {default_device()} or cpu"
        ) from error
    return device


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


def _words(text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise InputError("the prompt is empty: say what you want")
    return text


def _fps(media: Media) -> float | None:
    return media.fps if isinstance(media, Video) else None


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start
