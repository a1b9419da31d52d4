"""The public API: one object that generates, edits and answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from openlance.config import ModelConfig
from openlance.data.media import Frames, Source, Video, from_vae_pixels
from openlance.errors import InputError
from openlance.infer.answer import OnText, answer_together, stream_answer
from openlance.infer.conversation import Conversation
from openlance.infer.generate import Cancelled, OnStep, Target, denoise_together
from openlance.infer.load import load
from openlance.infer.messages import question as asked
from openlance.infer.orders import (
    AnswerOrder,
    Choices,
    GenerateOrder,
    Order,
    Orders,
    TextOptions,
    together,
)
from openlance.infer.plan import Plan
from openlance.infer.prepare import Resolutions, Size, view
from openlance.infer.result import Answer, Generated
from openlance.infer.spread import Spread, join
from openlance.infer.stream import TextStream
from openlance.model.adapters import load_adapter, merge_adapters, set_adapter, unload_adapters
from openlance.model.lance import Lance
from openlance.model.offload import Placement, paused
from openlance.model.quantize import Quantize
from openlance.model.vae import VAE
from openlance.sequence.segment import Role
from openlance.sequence.template import Message, Task
from openlance.tokenizer import Tokenizer

Result = Generated | Answer | Cancelled
"""What an order comes to; `Cancelled` where the callback stopped it."""

TOKENS_TOGETHER = 32_768
"""Of orders that run together: six pictures of 768 x 768 with guidance, say. The released shapes in bfloat16
then take 4 GB beside the weights: 1.2 for keys and values, 2.9 where the activations are widest."""


class Options(Choices, total=False):
    """What every generating call takes by name: `Choices`, and `on_step`, called after each step (see
    `openlance.infer.generate.OnStep`); where it returns False, the call raises `Cancelled`."""

    on_step: OnStep | None


class LancePipeline:
    """A checkpoint ready for use.

    Generating calls take `Options` by name and answering calls `TextOptions`; the same request with the same
    seed gives the same output. Sizes are (height, width) in pixels. Media are whatever `load_media` of
    `openlance.data.media` reads, and earlier results. All raise InputError for what cannot be used.

    order: the same methods, to make orders that `run` then runs together. spread: the processes that do every
    request together with this one, where there are any.
    """

    def __init__(self, model: Lance, tokenizer: Tokenizer, vae: VAE | None = None):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.vae = None if vae is None else vae.eval()
        self.order = Orders(self.model, tokenizer, self.vae)
        self.placement: Placement | None = None
        self.spread: Spread | None = None
        self._most_together = TOKENS_TOGETHER

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
        quantize: Quantize | None = None,
        max_memory: str | int | None = None,
        largest: Mapping[str, Any] | None = None,
        spread: str | None = None,
    ) -> LancePipeline:
        """Load a checkpoint: "nano" (bundled), a folder in the released layout, or a Hugging Face id.

        variant: "Lance_3B" or "Lance_3B_Video" where both are there. device: default CUDA, MPS or CPU,
        what there is. dtype: default bfloat16, on CPU float32. tasks: load only what these need.
        sizes: fields of `Sizes`, over the checkpoint's own. quantize: "int8", "fp8" or "int4" weights for
        both experts, or a scheme by part, see `openlance.model.quantize`. max_memory: of the device, as "8GB"
        or in bytes, for requests of these sizes; default what a GPU has free. See `openlance.infer.plan`.
        largest: of the largest request to come, for that plan: "size" (height, width) and "frames", or the
        "source" that is edited or animated; and "reuse", "reuse_order". Default: those of `sizes`.
        spread: "guidance" or "tokens", in processes that torchrun started: they do each request together,
        each on its device. All must make the same calls, and all get the whole result.
        """
        together = None if spread is None else join(spread, device)
        device = device if together is None else together.device
        loaded = load(source, variant, device, dtype, tasks, sizes, quantize, max_memory, largest)
        made = cls(loaded.model, loaded.tokenizer, loaded.vae)
        if loaded.plan is not None:
            made.follow(loaded.plan, loaded.device)
        if together is not None:
            made.share(together)
        return made

    def follow(self, plan: Plan, device: torch.device) -> None:
        """Keep to a memory plan from here on; where it moves weights, they must be on the host."""
        self._most_together = plan.tokens
        if self.vae is not None:
            self.vae.tiles = plan.tiles
        if not plan.resident:
            self.placement = Placement(self.model, self.vae, device, plan.layers)

    def share(self, spread: Spread) -> None:
        """Do every request together with other processes from here on, in the memory that all have."""
        self.spread = spread
        self._most_together = spread.least(self._most_together)
        if self.vae is not None:
            self.vae.tiles = spread.tiles(self.vae.tiles)

    @property
    def main(self) -> bool:
        """Whether this process is the one to save and print: of those that `spread` a request, the first."""
        return self.spread is None or self.spread.main

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def run(
        self,
        orders: Sequence[Order],
        *,
        on_step: OnStep | None = None,
        on_text: OnText | None = None,
        max_tokens_together: int = TOKENS_TOGETHER,
    ) -> list[Result]:
        """Run orders, made by the methods of `order`, together; results in their order. See `run_each`."""
        each = self.run_each(
            orders, on_step=on_step, on_text=on_text, max_tokens_together=max_tokens_together
        )
        found = dict(each)
        return [found[index] for index in range(len(orders))]

    def run_each(
        self,
        orders: Sequence[Order],
        *,
        on_step: OnStep | None = None,
        on_text: OnText | None = None,
        max_tokens_together: int = TOKENS_TOGETHER,
    ) -> Iterator[tuple[int, Result]]:
        """Run orders together and yield (index, result) as they are done.

        Each gives what it gives alone, up to the rounding of sums. Answers go together, each there as soon as
        it ends, and targets with the same sampling settings, as many as have `max_tokens_together` tokens:
        their sequences, once for each guidance branch; that bounds the memory. `on_step` is called for each
        generating order, `Step.order` its index; where it returns False, that order alone stops, and its
        result is a `Cancelled`. `on_text` is called for each answering order and word, with its index and the
        text that is decided; where it returns False, that answer ends there, its `finish` "cancelled". Those
        that ran together share the time equally in their `seconds`.
        """
        for order in orders:
            if not isinstance(order, (GenerateOrder, AnswerOrder)):
                raise InputError(f"unknown order {order!r}: make it with lance.order, as lance.order.ask(…)")
        if max_tokens_together < 1:
            raise InputError(f"max_tokens_together must be at least 1, not {max_tokens_together}")
        return self._run(orders, on_step, on_text, min(max_tokens_together, self._most_together))

    def generate_image(
        self, prompt: str, *, size: Size | int | None = None, **options: Unpack[Options]
    ) -> Generated:
        """Text to image."""
        return self._make(self.order.generate_image, options, prompt, size=size)

    def generate_video(
        self,
        prompt: str,
        *,
        size: Size | int | None = None,
        frames: int | None = None,
        **options: Unpack[Options],
    ) -> Generated:
        """Text to video; `frames` at the checkpoint's frame rate."""
        return self._make(self.order.generate_video, options, prompt, size=size, frames=frames)

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
        return self._make(self.order.animate, options, image, prompt, last=last, frames=frames)

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
        return self._make(self.order.edit, options, source, prompt, keep_history=keep_history)

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
        own = {"video": video, "size": size, "frames": frames}
        return self._make(self.order.subject, options, references, prompt, **own)

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
        [answer] = self.run([self.order.chat(messages, **options)])
        assert isinstance(answer, Answer)
        return answer

    def chat_stream(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[TextOptions]
    ) -> TextStream:
        """Like `chat`, in pieces as they come; `tokens` and `finish` of the stream are known at its end."""
        return self.stream_order(self.order.chat(messages, **options))

    def stream_order(self, order: AnswerOrder) -> TextStream:
        """Like `run` of one answering order, in pieces as they come."""
        return stream_answer(self.model, self.tokenizer, order)

    def conversation(self, system: str | None = None) -> Conversation:
        """A conversation that remembers its turns. system: replaces the checkpoint's prompt for answers."""
        return Conversation(self, system)

    def load_adapter(self, folder: str | Path, name: str = "default") -> None:
        """Add a LoRA adapter, as `openlance train` or PEFT wrote it, under a name; it is now the active
        one."""
        with paused(self.placement):
            load_adapter(self.model, folder, name)

    def set_adapters(self, *names: str) -> None:
        """Make these adapters, and no others, the active ones; what several add is summed."""
        set_adapter(self.model, names)

    def merge_adapters(self) -> None:
        """Add what the active adapters do to the weights, and remove them all: no cost any more."""
        with paused(self.placement):
            merge_adapters(self.model)

    def unload_adapters(self) -> None:
        """Remove all adapters: the model as it was before."""
        with paused(self.placement):
            unload_adapters(self.model)

    # -- how it is done ------------------------------------------------------------------------------

    def _make(
        self, order: Callable[..., GenerateOrder], options: Options, *given: Any, **own: Any
    ) -> Generated:
        """One order, made and run."""
        choices = {name: value for name, value in options.items() if name != "on_step"}
        [result] = self.run([order(*given, **own, **choices)], on_step=options.get("on_step"))
        if isinstance(result, Cancelled):
            raise result
        assert isinstance(result, Generated)
        return result

    def _run(
        self, orders: Sequence[Order], on_step: OnStep | None, on_text: OnText | None, most: int
    ) -> Iterator[tuple[int, Result]]:
        for group in together(orders, most):
            answers = [order for index in group if isinstance(order := orders[index], AnswerOrder)]
            targets = [order for index in group if isinstance(order := orders[index], GenerateOrder)]
            found: Iterator[tuple[int, Result]]
            if answers:
                hear = _renumbered_text(on_text, group)
                found = answer_together(self.model, self.tokenizer, answers, hear)
            else:
                found = enumerate(self._generate(targets, _renumbered(on_step, group)))
            yield from ((group[place], result) for place, result in found)

    def _generate(
        self, orders: list[GenerateOrder], on_step: OnStep | None
    ) -> Iterator[Generated | Cancelled]:
        """Orders of the same sampling settings."""
        start = time.perf_counter()
        targets = [Target(order.sample, self._noise(order), order.negative) for order in orders]
        denoise = denoise_together if self.spread is None else self.spread.denoise
        found = denoise(self.model, targets, orders[0].sampling, on_step)
        seconds = (time.perf_counter() - start) / len(orders)
        for order, latents in zip(orders, found, strict=True):
            yield latents if isinstance(latents, Cancelled) else self._finish(order, latents, seconds)

    def _noise(self, order: GenerateOrder) -> Tensor:
        grid = order.sample[-1].grid
        assert grid is not None
        generator = torch.Generator().manual_seed(order.seed)
        return torch.randn(*grid, self.config.vae.channels, generator=generator)

    def _finish(self, order: GenerateOrder, latents: Tensor, denoised: float) -> Generated:
        """Pixels of latents. denoised: seconds so far."""
        start = time.perf_counter()
        frames = self._decode(latents)
        seconds = {"denoise": denoised, "decode": time.perf_counter() - start}
        return Generated(
            frames, order.fps, dict(order.record), seconds, self._remember(order, frames, latents)
        )

    @torch.inference_mode()
    def _decode(self, latents: Tensor) -> Frames:
        """uint8 [T, H, W, 3] of latents [T', H', W', channels]."""
        assert self.vae is not None
        pieces = self.vae.stream(latents[None].to(self.vae.device, self.vae.dtype))
        return np.concatenate([from_vae_pixels(pixels[0]) for pixels in pieces])

    def _remember(self, order: GenerateOrder, frames: Frames, latents: Tensor) -> tuple[Message, ...]:
        """The turns so far, the result as the model will see it included; of edits only."""
        if not order.turns:
            return ()
        resolutions = Resolutions.of(self.config.sizes, video=order.task.video)
        seen = view(Video(frames, 1.0), resolutions, self.config, None)
        shown = replace(seen, latents=latents.cpu()).segments(Role.SOURCE)
        return (*order.turns, Message("assistant", tuple(shown), past=True))


def _renumbered(on_step: OnStep | None, group: list[int]) -> OnStep | None:
    """The callback for orders of a group, told their index among all."""
    return None if on_step is None else lambda step: on_step(replace(step, order=group[step.order]))


def _renumbered_text(on_text: OnText | None, group: list[int]) -> OnText | None:
    return None if on_text is None else lambda order, piece: on_text(group[order], piece)
