"""Commands that make pictures and clips."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional

from openlance.cli.options import (
    MakeOptions,
    OutputOptions,
    SamplingOptions,
    Settings,
    check_media,
    check_prompt,
    option,
    parse_size,
    progress,
)
from openlance.errors import InputError

if TYPE_CHECKING:
    from openlance.infer.generate import Step
    from openlance.infer.orders import GenerateOrder, Orders

Prompt = Annotated[Positional[str | None], option("What you want, in words; --like can bring it.")]
Size = Annotated[
    str | None,
    option("Height x width in pixels, or one number. Default: the checkpoint's.", "HxW|N"),
]
Frames = Annotated[int | None, option("Length of the clip, 4 k + 1. Default: the checkpoint's.")]


def generate(
    prompt: Prompt = None,
    *,
    size: Size = None,
    output: OutputOptions,
    sampling: SamplingOptions,
    load: MakeOptions,
) -> None:
    """Draw a picture from words.

    For example:
      openlance generate "a large red circle on white"
      openlance generate "a star at the top left" --seed 7 --count 4 --out stars.png
      openlance generate --like openlance-0001.png --guidance 6
    """
    request = Request(("t2i",), prompt, output, sampling, load)
    request.run(lambda order: order.generate_image, clip=False, size=parse_size(size))


def video(
    prompt: Prompt = None,
    *,
    size: Size = None,
    frames: Frames = None,
    output: OutputOptions,
    sampling: SamplingOptions,
    load: MakeOptions,
) -> None:
    """Film a clip from words.

    For example:
      openlance video "a small blue square at the left moving right on black"
      openlance video "a car on a coast road" --model ./Lance --size 480x832 --frames 49 --out car.mp4
    """
    request = Request(("t2v",), prompt, output, sampling, load)
    request.run(lambda order: order.generate_video, clip=True, size=parse_size(size), frames=frames)


def animate(
    image: Annotated[Positional[Path], option("The first frame.")],
    prompt: Prompt = None,
    *,
    last: Annotated[Path | None, option("The last frame, of the same shape.")] = None,
    frames: Frames = None,
    output: OutputOptions,
    sampling: SamplingOptions,
    load: MakeOptions,
) -> None:
    """Make a clip that starts with a picture (and ends with another, where one is given).

    For example:
      openlance animate circle.png "a red circle moving right"
      openlance animate first.png "the circle grows" --last last.png --out grow.gif
    """
    request = Request(("i2v",), prompt, output, sampling, load)
    ends = [image] if last is None else [image, last]
    check_media(*ends)
    request.run(lambda order: order.animate, clip=True, image=image, last=last, frames=frames)


def edit(
    media: Annotated[Positional[Path], option("The picture or clip to change.")],
    prompt: Prompt = None,
    *,
    output: OutputOptions,
    sampling: SamplingOptions,
    load: MakeOptions,
) -> None:
    """Change a picture or clip as words say.

    For example:
      openlance edit circle.png "make the circle blue"
      openlance edit clip.mp4 "change the background to black" --seed 3
    """
    request = Request(("image_edit", "video_edit"), prompt, output, sampling, load)
    clip = hasattr(check_media(media)[0], "fps")
    request.run(lambda order: order.edit, clip=clip, source=media)


def subject(
    media: Annotated[Positional[tuple[Path, ...]], option("One or several pictures of it.")],
    *,
    prompt: Annotated[str | None, option("What you want, in words; --like can bring it.")] = None,
    video: Annotated[bool, option("Film a clip instead of drawing a picture.")] = False,
    size: Size = None,
    frames: Frames = None,
    output: OutputOptions,
    sampling: SamplingOptions,
    load: MakeOptions,
) -> None:
    """Draw what some pictures show again, as words say.

    For example:
      openlance subject ring.png --prompt "the ring at the top left on black"
      openlance subject cat.jpg hat.jpg --prompt "the cat wears the hat" --model ./Lance --video
    """
    task = "subject_video" if video else "subject_image"
    request = Request((task,), prompt, output, sampling, load)
    if not media:
        raise InputError("subject needs at least one reference picture")
    check_media(*media)
    own = {"references": list(media), "video": video, "size": parse_size(size)}
    if video:
        own["frames"] = frames
    request.run(lambda order: order.subject, clip=video, **own)


class Request:
    """One of these commands: its options, with those of `--like` under them."""

    def __init__(
        self,
        tasks: tuple[str, ...],
        prompt: str | None,
        output: OutputOptions,
        sampling: SamplingOptions,
        load: MakeOptions,
    ):
        self.tasks, self.output, self.load = tasks, output, load
        self.like = _read_like(output.like, tasks)
        self.prompt = check_prompt(self.like.get("prompt") if prompt is None else prompt)
        self.settings = sampling.settings(self.like)
        _check_processes(load.spread, self.settings.get("reuse", 0.0))

    def run(
        self, method: Callable[[Orders], Callable[..., GenerateOrder]], *, clip: bool, **own: Any
    ) -> None:
        """Order what a method makes once for each seed, together; save and report each as it is done.

        own: the method's own arguments; size and frames that are None come from `--like`.
        """
        from openlance.infer.result import Generated
        from openlance.sequence.template import Task

        paths, seeds = self.output.paths(clip=clip), self.output.seeds(self.like)
        negative = self.output.negative
        own["negative_prompt"] = self.like.get("negative_prompt") if negative is None else negative
        if own.get("size", ...) is None and "size" in self.like:
            own["size"] = tuple(self.like["size"])
        if own.get("frames", ...) is None:
            own["frames"] = self.like.get("frames")
        largest = {name: own.get(name) for name in ("size", "frames")} | self.settings
        largest["source"] = own.get("source", own.get("image"))
        tasks = [task for task in self.tasks if Task(task).video == clip]
        pipeline = self.load.pipeline(tasks, self.like, largest, self.load.spread)
        if pipeline.spread is not None:
            seeds = pipeline.spread.same(seeds)
            # One that waits for the others would not hear a KeyboardInterrupt.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        order = method(pipeline.order)
        orders = [order(prompt=self.prompt, seed=seed, **own, **self.settings) for seed in seeds]
        with progress(self.load.quiet or not pipeline.main) as advance:

            def on_step(step: Step) -> None:
                advance(replace(step, total=step.total * len(orders)))

            for index, made in pipeline.run_each(orders, on_step=on_step):
                assert isinstance(made, Generated), "the bar cancels nothing"
                if pipeline.main:
                    made.save(paths[index])
                    seconds = sum(made.seconds.values())
                    print(f"{paths[index]}  seed {seeds[index]}  {seconds:.1f} s", flush=True)
        if pipeline.spread is not None:
            pipeline.spread.leave()


def _check_processes(spread: str | None, reuse: float) -> None:
    """What processes there are must fit what is to be spread over them. Raises InputError."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if spread is None:
        if count > 1:
            raise InputError(
                f"{count} processes would all make the same file: add --spread guidance or --spread tokens, "
                "or start without torchrun"
            )
        return
    from openlance.infer.parallel import check_spread

    check_spread(spread, reuse)
    if os.environ.get("RANK", "0") != "0":
        logging.getLogger("openlance").setLevel(logging.ERROR)  # the first process says it for all


def _read_like(path: Path | None, tasks: tuple[str, ...]) -> Settings:
    """The settings of an earlier output; it must be of one of these tasks."""
    from openlance.cli.about import settings_in

    if path is None:
        return {}
    found = settings_in(path)
    if found.get("task") not in tasks:
        raise InputError(f"{path}: this was made by the task {found.get('task')}, not {' or '.join(tasks)}")
    return found
