"""The demo: every task once, on pictures and clips drawn here, judged by the world's own judge."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from openlance.data.frames import Video
from openlance.data.save import check_folder, contact_sheet, save_image, save_json, save_video
from openlance.infer.pipeline import LancePipeline
from openlance.infer.result import Generated
from openlance.world import Claims, Scene, Thing, check, describe, kept, render, render_clip

CIRCLE = Thing("circle", "red", "large", "top left")
STAR = Thing("star", "blue", "small", "bottom right")
DRAWN = (
    Scene("white", "plain", (CIRCLE,)),
    Scene("navy", "plain", (Thing("star", "yellow", "large", "center"),)),
    Scene(
        "beige", "plain", (Thing("square", "green", "large", "left"), Thing("ring", "red", "large", "right"))
    ),
    Scene("gray", "plain", (Thing("circle", "purple", "large", "bottom"),)),  # a pair never seen in training
)
FILMED = Scene("white", "plain", (Thing("square", "blue", "large", "left", motion="right"),))
ANIMATED = Scene("black", "plain", (Thing("circle", "yellow", "small", "center", motion="grow"),))
SHOWN = Scene("white", "plain", (CIRCLE, STAR))
QUESTIONS = (  # about SHOWN
    ("what color is the circle?", "red"),
    ("what shape is blue?", "star"),
    ("where is the circle?", "top left"),
    ("how many shapes are there?", "two"),
    ("what color is the background?", "white"),
)
LIMITS = """nano has {millions:.0f} million parameters and knows flat shapes on plain grounds, in the words
of its own small world. It cannot draw or read photographs, people, letters or long prompts.
"no": the judge did not find what was asked. One demo is no measurement: see `openlance eval nano-bench`."""


@dataclass(frozen=True)
class Row:
    """One request: what was asked of which task, what came, whether it is right, and how long it took."""

    task: str
    asked: str
    result: Image.Image | Video | str
    right: bool | None
    seconds: float
    file: str = ""


class Demo:
    """Runs requests one by one, writes what they give to a folder, and remembers it for table and sheet."""

    def __init__(self, pipeline: LancePipeline, out: Path, seed: int, settings: dict[str, Any]):
        self.pipeline, self.out, self.seed, self.settings = pipeline, out, seed, settings
        self.sizes = pipeline.config.sizes
        self.rows: list[Row] = []
        self.sheet: list[tuple[str, Image.Image | Video | str]] = []

    def picture(self, scene: Scene, name: str, caption: str) -> Image.Image:
        """An input: a scene drawn by the world itself."""
        image = Image.fromarray(render(scene, self.sizes.image))
        save_image(image, self.out / f"{name}.png")
        self.sheet.append((f"input: {caption}", image))
        return image

    def clip(self, scene: Scene, name: str, caption: str) -> Video:
        """An input of `frames` frames."""
        frames = (self.sizes.frames - 1) // 4 * 4 + 1
        video = Video(render_clip(scene, frames, self.sizes.video), self.sizes.fps)
        save_video(video.frames, self.out / f"{name}.mp4", video.fps)
        self.sheet.append((f"input: {caption}", video))
        return video

    def make(
        self,
        task: str,
        name: str,
        asked: str,
        judge: Callable[[Generated], bool],
        call: Callable[..., Generated],
    ) -> Generated:
        """One picture (png) or clip (mp4 and gif)."""
        start = time.perf_counter()
        made = call(seed=self.seed, **self.settings)
        seconds = time.perf_counter() - start
        suffixes = (".png",) if made.fps is None else (".mp4", ".gif")
        for suffix in suffixes:
            made.save(self.out / f"{name}{suffix}")
        self._add(Row(task, asked, made.media, judge(made), seconds, name + suffixes[0]))
        return made

    def ask(self, task: str, question: str, wanted: str | None, media: Image.Image | Video) -> None:
        """One answer; without a question a description. wanted: the right answer, where there is one."""
        start = time.perf_counter()
        answer = self.pipeline.ask(question, media, max_tokens=32).text.strip()
        seconds = time.perf_counter() - start
        right = None if wanted is None else answer == wanted
        self._add(Row(task, question or "(describe)", answer, right, seconds, "answers.txt"))

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        verdict = {True: " (right)", False: " (wrong)", None: ""}[row.right]
        self.sheet.append((f"{row.task}: {row.asked}{verdict}", row.result))
        print(_line(row), flush=True)


def run(pipeline: LancePipeline, out: Path, *, seed: int = 1, **settings: Any) -> list[Row]:
    """Run every task, print a table, and write pictures, clips, answers and `sheet.png` to a folder.

    settings: of SamplingConfig, by name. Raises InputError where the folder cannot be written to.
    """
    start = time.perf_counter()
    check_folder(out / "sheet.png")
    demo = Demo(pipeline, out, seed, settings)
    print(f"{'task':12}{'right':6}{'seconds':>7}  asked")
    _draw(demo)
    _edit(demo)
    _ask(demo)
    _film(demo)
    _write_answers(demo)
    kinds = (Image.Image, str, Video)  # clips take rows of their own, so they come last
    sheet = sorted(
        demo.sheet, key=lambda item: next(i for i, k in enumerate(kinds) if isinstance(item[1], k))
    )
    save_image(contact_sheet(sheet), out / "sheet.png")
    judged = [row.right for row in demo.rows if row.right is not None]
    seconds = time.perf_counter() - start
    print(
        f"\n{sum(judged)} of {len(judged)} right, {seconds:.1f} s in all. Look at {out / 'sheet.png'} first."
    )
    if pipeline.config.name == "nano":
        parts = [pipeline.model, *([] if pipeline.vae is None else [pipeline.vae])]
        count = sum(parameter.numel() for part in parts for parameter in part.parameters())
        print("\n" + LIMITS.format(millions=count / 1e6))
    return demo.rows


def _draw(demo: Demo) -> None:
    """Text to image; a subject drawn again."""
    for number, scene in enumerate(DRAWN, start=1):
        words, claims = describe(scene)
        demo.make(
            "generate", f"generate-{number}", words, _shows(claims),
            lambda words=words, **options: demo.pipeline.generate_image(words, **options),
        )  # fmt: skip
    thing = Thing("star", "red", "large", "center")
    reference = demo.picture(Scene("white", "plain", (thing,)), "input-subject", "a subject")
    moved = Scene("black", "plain", (replace(thing, place="top right"),))
    words = "the shape at the top right on black"
    demo.make(
        "subject", "subject", words, _shows(describe(moved)[1]),
        lambda **options: demo.pipeline.subject(reference, words, **options),
    )  # fmt: skip


def _edit(demo: Demo) -> None:
    """A picture, then the result again, its history kept."""
    before = demo.picture(SHOWN, "input-edit", "a picture to edit and to ask about")
    recolored = replace(SHOWN, things=(replace(CIRCLE, color="green"), STAR))
    words = "make the circle green"
    edited = demo.make(
        "edit", "edit", words, lambda made: kept(SHOWN, recolored, made.frames[0]).all,
        lambda **options: demo.pipeline.edit(before, words, **options),
    )  # fmt: skip
    again = "change the background to beige"
    changed = replace(recolored, ground="beige")
    demo.make(
        "edit again", "edit-again", again, lambda made: kept(recolored, changed, made.frames[0]).all,
        lambda **options: demo.pipeline.edit(edited, again, keep_history=True, **options),
    )  # fmt: skip


def _ask(demo: Demo) -> None:
    """Questions about a picture, and its description."""
    picture = Image.fromarray(render(SHOWN, demo.sizes.image))
    for question, answer in QUESTIONS:
        demo.ask("ask", question, answer, picture)
    demo.ask("caption", "", None, picture)


def _film(demo: Demo) -> None:
    """Text to video, image to video, a clip edited, and asked about."""
    words, claims = describe(FILMED)
    demo.make(
        "video", "video", words, _shows(claims, clip=True),
        lambda **options: demo.pipeline.generate_video(words, **options),
    )  # fmt: skip
    first = demo.picture(ANIMATED, "input-animate", "a first frame")
    motion, moved = describe(ANIMATED)
    demo.make(
        "animate", "animate", motion, _shows(moved, clip=True),
        lambda **options: demo.pipeline.animate(first, motion, **options),
    )  # fmt: skip
    clip = demo.clip(FILMED, "input-video", "a clip to edit and to ask about")
    instruction = "make the square red"
    red = replace(FILMED, things=(replace(FILMED.things[0], color="red"),))
    demo.make(
        "edit video", "edit-video", instruction, lambda made: kept(FILMED, red, made.frames).all,
        lambda **options: demo.pipeline.edit(clip, instruction, **options),
    )  # fmt: skip
    demo.ask("ask video", "what does the square do?", "moves right", clip)
    demo.ask("ask video", "what color is the square?", "blue", clip)


def _shows(claims: Claims, *, clip: bool = False) -> Callable[[Generated], bool]:
    """A judge of what was made: everything that the words claim is there."""
    return lambda made: bool(check(claims, made.frames if clip else made.frames[0]).all)


def _write_answers(demo: Demo) -> None:
    answers = [row for row in demo.rows if isinstance(row.result, str)]
    lines = [_line(row).rstrip() for row in answers]
    (demo.out / "answers.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    records: Sequence[dict[str, Any]] = [
        {"task": row.task, "question": row.asked, "answer": row.result, "right": row.right,
         "seconds": round(row.seconds, 2)} for row in answers
    ]  # fmt: skip
    save_json(records, demo.out / "answers.json")


def _line(row: Row) -> str:
    said = f"{row.asked} → {row.result}" if isinstance(row.result, str) else row.asked
    right = {True: "yes", False: "no", None: ""}[row.right]
    return f"{row.task:12}{right:6}{row.seconds:7.1f}  {said}"
