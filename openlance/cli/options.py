"""The options that commands share, and what they resolve to."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from openlance.config import ReuseOrder, SamplingConfig, SolverName, TextConfig
from openlance.errors import InputError

if TYPE_CHECKING:
    from openlance.data.media import Media
    from openlance.infer.generate import OnStep
    from openlance.infer.pipeline import LancePipeline

Settings = Mapping[str, Any]
T = TypeVar("T")


def hint(default: str) -> str:
    """What the help adds to an option's text; where None is the default, the text says what that means."""
    return "" if default in ("None", "") else f"(default: {default})"


Maybe = Annotated[T | None, tyro.conf.arg(help_behavior_hint=hint)]
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class LoadOptions:
    """Model."""

    model: str = "nano"
    """"nano" (bundled), a folder in the released layout, or a Hugging Face id such as owner/name."""
    variant: Maybe[str] = None
    """Lance_3B or Lance_3B_Video, where a folder holds both."""
    adapter: Maybe[Path] = None
    """Folder of a LoRA adapter for the model, as `openlance train` writes it; or nano-fast (bundled: nano in
    five steps without guidance)."""
    device: Maybe[str] = None
    """cpu, cuda, cuda:1 or mps. Default: the best there is."""
    dtype: Maybe[Literal["float32", "bfloat16", "float16"]] = None
    """Of weights and computation. Default: bfloat16, on CPU float32."""
    quantize: Maybe[str] = None
    """Weights in fewer bits, once loaded: int8, fp8 or int4 for both experts, or by part, as
    und=int8,gen=fp8 (the vision tower, vision, only where named). Default: as they are stored."""
    max_memory: Maybe[str] = None
    """Of a GPU, as 8GB or 7.5GiB: what does not fit waits on the host. Reckoned for --size and --frames where
    they are given, and for what is edited or animated; else for the checkpoint's sizes or --resolution.
    Default: what is free."""
    resolution: Maybe[int] = None
    """Side of the square, in pixels, whose area pictures and clips are brought to before they are encoded,
    and that is generated where no size is given. Default: the checkpoint's."""
    vit_resolution: Maybe[int] = None
    """The same for what the vision tower looks at."""
    quiet: bool = False
    """No progress bar, and nothing on stderr but errors."""

    def pipeline(
        self,
        tasks: Iterable[str],
        like: Settings | None = None,
        largest: Settings | None = None,
        spread: str | None = None,
    ) -> LancePipeline:
        """The model with what these tasks need; `like`: settings of an output, where no option says other;
        `largest`: size, frames, source and sampling of what is asked for, for the memory plan."""
        import torch

        from openlance.infer.pipeline import LancePipeline
        from openlance.sequence.template import Task

        like = like or {}
        dtype = self.dtype or like.get("dtype")
        sizes = dict(like.get("sizes", {}))
        if self.resolution is not None:
            sizes |= {"image": self.resolution, "video": self.resolution}
        if self.vit_resolution is not None:
            sizes |= {"vit_image": self.vit_resolution, "vit_video": self.vit_resolution}
        pipeline = LancePipeline.from_pretrained(
            self.model,
            variant=self.variant,
            device=self.device,
            dtype=None if dtype is None else getattr(torch, dtype),
            tasks=[Task(task) for task in tasks],
            sizes=sizes,
            quantize=self.quantize,
            max_memory=self.max_memory,
            largest=largest,
            spread=spread,
        )
        if self.adapter is not None:
            pipeline.load_adapter(self.adapter)
        return pipeline


@dataclass(frozen=True)
class MakeOptions(LoadOptions):
    """Model."""

    spread: Maybe[Literal["guidance", "tokens"]] = None
    """Do each request on several devices, in processes that torchrun starts: by branches of guidance (two
    processes, three with --visual-guidance) or by tokens (any number, for clips). The VAE goes by tiles."""


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling. Defaults are the checkpoint's."""

    steps: Maybe[int] = None
    """Denoising steps."""
    solver: Maybe[SolverName] = None
    """Of the steps; all but Euler's are of second order, for fewer of them."""
    shift: Maybe[float] = None
    """Time shift: higher spends more steps near noise."""
    guidance: Maybe[float] = None
    """How strongly the words are followed; 1 is off."""
    guidance_interval: Maybe[tuple[float, float]] = None
    """Guidance acts while LOW < t <= HIGH (1 is noise, 0 the result)."""
    renorm: Maybe[Literal["global", "channel", "none"]] = None
    """How guided steps are brought back to the length of unguided ones."""
    renorm_min: Maybe[float] = None
    """The smallest factor of that, 0 to 1."""
    visual_guidance: Maybe[float] = None
    """A second scale, for the picture or clip that is shown (edit, subject)."""
    reuse: Maybe[float] = None
    """Skip layers of a step where the first one's work changed by less than this share; 0 is off."""
    reuse_order: Maybe[ReuseOrder] = None
    """What is skipped is taken as it was (0), or led on in time (1)."""

    def settings(self, like: Settings) -> dict[str, Any]:
        """Arguments for the pipeline: those of `like`, and over them what was given. Raises InputError."""
        settings = {**like.get("sampling", {}), **given(self)}
        if "guidance_interval" in settings:
            settings["guidance_interval"] = tuple(settings["guidance_interval"])
        SamplingConfig(**settings)  # what cannot be is refused before weights are loaded
        return settings


@dataclass(frozen=True)
class OutputOptions:
    """Output."""

    out: Maybe[Path] = None
    """File to write; the suffix is the format (png, jpg, webp; mp4, webm, mov, gif, webp). A folder gets
    numbered files. Default: openlance-0001 and so on, never over another file."""
    seed: Maybe[int] = None
    """The same command with the same seed gives the same output. Default: one is drawn, and said."""
    count: int = 1
    """How many, with seeds that count up."""
    like: Maybe[Path] = None
    """An output of this command: its prompt, seed, size and settings, where no option says otherwise."""
    negative: Maybe[str] = None
    """What to steer away from, in words."""

    def seeds(self, like: Settings) -> list[int]:
        """One seed for each output."""
        from openlance.infer.orders import new_seed

        if self.count < 1:
            raise InputError(f"--count must be at least 1, not {self.count}")
        first = check_seed(self.seed if self.seed is not None else like.get("seed"))
        first = new_seed() if first is None else first
        return [first + index for index in range(self.count)]

    def paths(self, *, clip: bool) -> list[Path]:
        """A file for each output, after a look whether it could be written. Raises InputError if not."""
        from openlance.data.save import check_writable

        if self.out is None or self.out.is_dir():
            paths = numbered(self.out or Path(), ".mp4" if clip else ".png", self.count)
        elif self.count == 1:
            paths = [self.out]
        else:
            names = (f"{self.out.stem}-{n}{self.out.suffix}" for n in range(1, self.count + 1))
            paths = [self.out.with_name(name) for name in names]
        for path in paths:
            check_writable(path, clip=clip)
        return paths


@dataclass(frozen=True)
class TextOptions:
    """Text."""

    max_tokens: Maybe[int] = None
    """The answer's limit. Default: 256."""
    temperature: Maybe[float] = None
    """0 (the default) always takes the likeliest word."""
    top_p: Maybe[float] = None
    """Draw from the likeliest words that together have this probability."""
    top_k: Maybe[int] = None
    """Draw from this many words; 0 is off."""
    repetition_penalty: Maybe[float] = None
    """Above 1, words that were used become less likely."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End before this text; can be given several times."""
    lookup: Maybe[int] = None
    """Guess so many words ahead from what was said before, and check them at once: the same words, faster
    where an answer repeats things. 0 (the default) is off."""
    seed: Maybe[int] = None
    """The same seed draws the same words. Default: one is drawn, and said."""

    def settings(self) -> dict[str, Any]:
        """Arguments for the pipeline, a seed always among them. Raises InputError."""
        self.config()
        seed = check_seed(self.seed)
        if seed is None:
            from openlance.infer.orders import new_seed

            seed = new_seed()
        return given(self) | {"seed": seed}

    def config(self) -> TextConfig:
        """What the options come to."""
        return TextConfig(**{name: value for name, value in given(self).items() if name != "seed"})


def option(help: str, metavar: str | None = None) -> Any:
    """What the help says of an argument."""
    return tyro.conf.arg(help=help, metavar=metavar, help_behavior_hint=hint)


def given(options: Any) -> dict[str, Any]:
    """The fields of an options object that the user gave."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: value for name, value in values.items() if value is not None and value != ()}


def check_seed(seed: int | None) -> int | None:
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise InputError(f"--seed must lie between 0 and {MAX_SEED}, not {seed}")
    return seed


def check_prompt(prompt: str | None) -> str:
    """The prompt, refused before anything is loaded where it is missing or empty."""
    if prompt is None or not prompt.strip():
        raise InputError("the prompt is empty: say what you want")
    return prompt


def check_media(*sources: str | Path) -> list[Media]:
    """Each picture, or a clip's first frame: what cannot be read is refused before weights are loaded."""
    from openlance.data.media import load_media

    return [load_media(source, select=lambda count, fps: [0]) for source in sources]


def parse_size(text: str | None) -> tuple[int, int] | None:
    """ "480x832" (height x width) or "512" as (height, width)."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:[xX×](\d+))?", text.strip())
    if not match:
        raise InputError(f"--size must be HEIGHTxWIDTH or one number, in pixels, not {text!r}")
    return int(match[1]), int(match[2] or match[1])


def numbered(folder: Path, suffix: str, count: int) -> list[Path]:
    """The next names of the row openlance-0001, whatever suffixes the others have."""
    taken = [re.match(r"openlance-(\d+)\.", name) for name in os.listdir(folder)]
    last = max((int(match[1]) for match in taken if match), default=0)
    return [folder / f"openlance-{number:04d}{suffix}" for number in range(last + 1, last + 1 + count)]


@contextmanager
def progress(quiet: bool) -> Iterator[OnStep]:
    """A bar over denoising steps, on stderr; none where that is no terminal."""
    from tqdm import tqdm

    hidden = quiet or not sys.stderr.isatty()
    with tqdm(desc="denoise", unit="step", disable=hidden, leave=False) as bar:

        def on_step(step: Any) -> None:
            bar.total = step.total
            bar.update()

        yield on_step
