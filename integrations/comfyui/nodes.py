"""The nodes: load, generate, film, edit, animate, subject, ask.

ComfyUI's IMAGE is a tensor [pictures, height, width, 3] float32 in [0, 1]; a clip is an IMAGE of its frames.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from openlance import LancePipeline
from openlance.data.media import Video
from openlance.infer.generate import Step
from openlance.infer.result import Generated

CATEGORY = "openlance"
PROMPT = ("STRING", {"multiline": True})
SEED = ("INT", {"default": 0, "min": 0, "max": 2**31 - 1})
SIDE = ("INT", {"default": 0, "min": 0, "max": 2048, "step": 16, "tooltip": "0: the model's own"})
FRAMES = ("INT", {"default": 0, "min": 0, "max": 241, "tooltip": "0: the model's own"})
SAMPLING = {
    "steps": ("INT", {"default": 0, "min": 0, "max": 200, "tooltip": "0: the model's own"}),
    "guidance": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 20.0, "step": 0.1, "tooltip": "0: its own"}),
    "shift": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 20.0, "step": 0.1, "tooltip": "0: its own"}),
    "negative_prompt": ("STRING", {"default": "", "multiline": True}),
}
Inputs = dict[str, dict[str, Any]]


class OpenlanceLoad:
    """A checkpoint: "nano" (bundled), a folder in the released layout, or a Hugging Face id."""

    TITLE = "Load Lance"
    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES: ClassVar = ("LANCE",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        dtypes = ["default", "bfloat16", "float16", "float32"]
        return {
            "required": {"model": ("STRING", {"default": "nano"})},
            "optional": {
                "variant": ("STRING", {"default": "", "tooltip": "Lance_3B or Lance_3B_Video"}),
                "dtype": (dtypes,),
                "adapter": ("STRING", {"default": "", "tooltip": "folder of a LoRA adapter"}),
            },
        }

    def load(self, model: str, variant: str = "", dtype: str = "default", adapter: str = "") -> tuple:
        return (_loaded(model.strip(), variant.strip(), dtype, adapter.strip()),)


class OpenlanceGenerate:
    """Text to image."""

    TITLE = "Lance: generate"
    CATEGORY, FUNCTION = CATEGORY, "generate"
    RETURN_TYPES: ClassVar = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        sides = {"width": SIDE, "height": SIDE}
        return {
            "required": {"lance": ("LANCE",), "prompt": PROMPT, "seed": SEED},
            "optional": sides | SAMPLING,
        }

    def generate(
        self, lance: LancePipeline, prompt: str, seed: int, width: int = 0, height: int = 0, **sampling: Any
    ) -> tuple:
        made = lance.generate_image(prompt, size=_size(width, height), seed=seed, **_chosen(sampling))
        return (_to_comfy(made),)


class OpenlanceVideo:
    """Text to video."""

    TITLE = "Lance: generate video"
    CATEGORY, FUNCTION = CATEGORY, "film"
    RETURN_TYPES: ClassVar = ("IMAGE", "FLOAT")
    RETURN_NAMES: ClassVar = ("frames", "fps")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        own = {"width": SIDE, "height": SIDE, "frames": FRAMES}
        return {"required": {"lance": ("LANCE",), "prompt": PROMPT, "seed": SEED}, "optional": own | SAMPLING}

    def film(
        self,
        lance: LancePipeline,
        prompt: str,
        seed: int,
        width: int = 0,
        height: int = 0,
        frames: int = 0,
        **sampling: Any,
    ) -> tuple:
        size = _size(width, height)
        made = lance.generate_video(prompt, size=size, frames=frames or None, seed=seed, **_chosen(sampling))
        return _to_comfy(made), made.fps


class OpenlanceEdit:
    """Change a picture, or a clip where fps is given, as the words say."""

    TITLE = "Lance: edit"
    CATEGORY, FUNCTION = CATEGORY, "edit"
    RETURN_TYPES: ClassVar = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        required = {"lance": ("LANCE",), "image": ("IMAGE",), "prompt": PROMPT, "seed": SEED}
        clip = {"fps": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 120.0, "tooltip": "above 0: a clip"})}
        return {"required": required, "optional": clip | SAMPLING}

    def edit(
        self, lance: LancePipeline, image: Tensor, prompt: str, seed: int, fps: float = 0.0, **sampling: Any
    ) -> tuple:
        chosen = _chosen(sampling)
        if fps:
            return (_to_comfy(lance.edit(Video(_frames(image), fps), prompt, seed=seed, **chosen)),)
        orders = [
            lance.order.edit(one, prompt, seed=seed, **_without_step(chosen)) for one in _pictures(image)
        ]
        return (torch.cat([_to_comfy(made) for made in lance.run(orders, on_step=chosen["on_step"])]),)


class OpenlanceAnimate:
    """Image to video: the first frame, and the last where it is given."""

    TITLE = "Lance: animate"
    CATEGORY, FUNCTION = CATEGORY, "animate"
    RETURN_TYPES: ClassVar = ("IMAGE", "FLOAT")
    RETURN_NAMES: ClassVar = ("frames", "fps")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        required = {"lance": ("LANCE",), "image": ("IMAGE",), "prompt": PROMPT, "seed": SEED}
        return {"required": required, "optional": {"last": ("IMAGE",), "frames": FRAMES} | SAMPLING}

    def animate(
        self,
        lance: LancePipeline,
        image: Tensor,
        prompt: str,
        seed: int,
        last: Tensor | None = None,
        frames: int = 0,
        **sampling: Any,
    ) -> tuple:
        ending = None if last is None else _pictures(last)[0]
        made = lance.animate(
            _pictures(image)[0], prompt, last=ending, frames=frames or None, seed=seed, **_chosen(sampling)
        )
        return _to_comfy(made), made.fps


class OpenlanceSubject:
    """Draw the subjects of one or several pictures as the words say."""

    TITLE = "Lance: subject"
    CATEGORY, FUNCTION = CATEGORY, "draw"
    RETURN_TYPES: ClassVar = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        required = {"lance": ("LANCE",), "references": ("IMAGE",), "prompt": PROMPT, "seed": SEED}
        more = {"reference_2": ("IMAGE",), "reference_3": ("IMAGE",), "width": SIDE, "height": SIDE}
        return {"required": required, "optional": more | SAMPLING}

    def draw(
        self,
        lance: LancePipeline,
        references: Tensor,
        prompt: str,
        seed: int,
        reference_2: Tensor | None = None,
        reference_3: Tensor | None = None,
        width: int = 0,
        height: int = 0,
        **sampling: Any,
    ) -> tuple:
        given = [each for each in (references, reference_2, reference_3) if each is not None]
        pictures = [picture for each in given for picture in _pictures(each)]
        made = lance.subject(pictures, prompt, size=_size(width, height), seed=seed, **_chosen(sampling))
        return (_to_comfy(made),)


class OpenlanceAsk:
    """A question about pictures, or about a clip where fps is given; none asks for a description."""

    TITLE = "Lance: ask"
    CATEGORY, FUNCTION = CATEGORY, "ask"
    RETURN_TYPES: ClassVar = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        optional = {
            "image": ("IMAGE",),
            "fps": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 120.0, "tooltip": "above 0: a clip"}),
            "max_tokens": ("INT", {"default": 256, "min": 1, "max": 8192}),
            "temperature": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 2.0, "step": 0.05}),
        }
        return {"required": {"lance": ("LANCE",), "question": PROMPT, "seed": SEED}, "optional": optional}

    def ask(
        self,
        lance: LancePipeline,
        question: str,
        seed: int,
        image: Tensor | None = None,
        fps: float = 0.0,
        **options: Any,
    ) -> tuple:
        shown: list[Any] = [] if image is None else _pictures(image)
        if image is not None and fps:
            shown = [Video(_frames(image), fps)]
        return (lance.ask(question, shown, seed=seed, **options).text,)


NODES = (
    OpenlanceLoad,
    OpenlanceGenerate,
    OpenlanceVideo,
    OpenlanceEdit,
    OpenlanceAnimate,
    OpenlanceSubject,
    OpenlanceAsk,
)


@functools.lru_cache(maxsize=1)
def _loaded(model: str, variant: str, dtype: str, adapter: str) -> LancePipeline:
    """The last one is kept: ComfyUI runs a workflow again and again."""
    chosen = None if dtype == "default" else getattr(torch, dtype)
    lance = LancePipeline.from_pretrained(model, variant=variant or None, dtype=chosen)
    if adapter:
        lance.load_adapter(adapter)
    return lance


def _size(width: int, height: int) -> tuple[int, int] | int | None:
    """(height, width) in pixels; one side alone makes a square, none the model's own size."""
    return (height, width) if width and height else (width or height or None)


def _chosen(sampling: dict[str, Any]) -> dict[str, Any]:
    """What was set, and the progress bar; the rest stays the checkpoint's own."""
    return {name: value for name, value in sampling.items() if value} | {"on_step": _progress()}


def _without_step(chosen: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in chosen.items() if name != "on_step"}


def _progress() -> Callable[[Step], None]:
    """Moves ComfyUI's bar, and stops where its user pressed Cancel; nothing of both outside ComfyUI."""
    try:
        from comfy.model_management import throw_exception_if_processing_interrupted
        from comfy.utils import ProgressBar
    except ImportError:
        return lambda step: None
    bars: dict[int, Any] = {}

    def report(step: Step) -> None:
        throw_exception_if_processing_interrupted()
        bars.setdefault(0, ProgressBar(step.total)).update_absolute(step.number, step.total)

    return report


def _frames(image: Tensor) -> Any:
    """IMAGE → uint8 [T, H, W, 3]."""
    return (image[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def _pictures(image: Tensor) -> list[Any]:
    """IMAGE → pictures uint8 [H, W, 3]."""
    return list(_frames(image))


def _to_comfy(made: Generated) -> Tensor:
    return torch.from_numpy(made.frames).float() / 255
