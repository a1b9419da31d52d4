"""nano-bench: what a model draws, answers and edits in the procedural world, by the judge's exact word.

Every score is the share of right ones among what was asked. Scenes are drawn from a seed that training never
uses; "held out" scenes show a shape in a color that training never paired.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from openlance.data.media import Video
from openlance.data.save import contact_sheet
from openlance.errors import InputError
from openlance.infer.pipeline import LancePipeline
from openlance.world import (
    SEVERAL_KINDS,
    WORDS,
    Scene,
    Turn,
    WorldConfig,
    chain,
    check,
    claims_of,
    converse,
    describe,
    edit,
    kept,
    locate,
    question,
    question_of_several,
    render,
    render_clip,
    sample_several,
    well_placed,
)
from openlance.world import sample_scene as draw_scene

ATTRIBUTES = ("color", "shape", "size", "place", "count", "relation", "ground", "motion")
QUESTIONS = ("color", "shape", "size", "place", "count", "relation", "exists", "ground")
EDITS = ("recolor", "reshape", "move", "add", "remove", "ground")
WORD_EDITS = ("write", "rewrite", "erase")
PARTS = ("one", "two", "held_out", "questions", "edits", "motion")
# Not among the parts by default: the bundled model has learnt none of them.
WIDE_PARTS = ("boxes", "words", "several", "turns")
ONE = WorldConfig(max_things=1)
TWO = WorldConfig(max_things=2, count_weights=(0.0, 1.0, 0.0, 0.0))
WRITTEN = WorldConfig(max_things=1, words=WORDS, text_share=1.0)
MOVING = WorldConfig(max_things=1, motions=("left", "right", "up", "down", "grow", "shrink"))

Scores = dict[str, float]
Shown = list[tuple[str, Image.Image | Video | str]]


class Tally:
    """Right and asked, by name."""

    def __init__(self) -> None:
        self._marks: dict[str, list[bool]] = defaultdict(list)

    def mark(self, name: str, right: bool | None) -> None:
        """Count one; None was not asked."""
        if right is not None:
            self._marks[name].append(bool(right))

    def scores(self) -> Scores:
        return {name: float(np.mean(marks)) for name, marks in self._marks.items()}


def run(
    pipeline: LancePipeline,
    *,
    count: int = 100,
    clips: int = 10,
    seed: int = 1,
    out: Path | None = None,
    parts: tuple[str, ...] = PARTS,
    **settings: object,
) -> dict[str, Scores]:
    """Scores by part and attribute; "all" means that everything said came out right.

    count: pictures, questions and edits a part; clips: of the motion part. parts: of PARTS and WIDE_PARTS.
    out: folder for `scores.json` and a contact sheet of the first of each part. settings: of SamplingConfig,
    by name.
    """
    jobs: dict[str, Callable[[Shown], Scores]] = {
        "one": lambda shown: _draw(pipeline, ONE, count, seed, False, shown, settings),
        "two": lambda shown: _draw(pipeline, TWO, count, seed, False, shown, settings),
        "held_out": lambda shown: _draw(pipeline, ONE, count, seed, True, shown, settings),
        "questions": lambda shown: _ask(pipeline, count * 2, seed, shown),
        "edits": lambda shown: _edit(pipeline, count, seed, shown, settings),
        "motion": lambda shown: _film(pipeline, clips, seed, shown, settings),
        "boxes": lambda shown: _locate(pipeline, count, seed, shown),
        "words": lambda shown: _write(pipeline, count, seed, shown, settings),
        "several": lambda shown: _compare(pipeline, count, seed, shown),
        "turns": lambda shown: _talk(pipeline, count, seed, shown, settings),
    }
    unknown = [name for name in parts if name not in jobs]
    if unknown:
        raise InputError(f"unknown parts {', '.join(unknown)}: choose from {', '.join(jobs)}")
    results: dict[str, Scores] = {}
    shown: Shown = []
    for name in parts:
        start = time.perf_counter()
        results[name] = jobs[name](shown)
        results[name]["seconds"] = time.perf_counter() - start
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        record = {"count": count, "clips": clips, "seed": seed, "settings": settings, "scores": results}
        (out / "scores.json").write_text(json.dumps(record, indent=1, default=str))
        contact_sheet(shown).save(out / "sheet.png")
    return results


def table(results: dict[str, Scores]) -> str:
    """The scores as a Markdown table."""
    lines = ["| part | scores |", "|---|---|"]
    for part, scores in results.items():
        cells = ", ".join(f"{name} {value:.2f}" for name, value in scores.items() if name != "seconds")
        lines.append(f"| {part.replace('_', ' ')} | {cells} |")
    return "\n".join(lines)


def _mark(right: bool) -> str:
    return "right" if right else "wrong"


def _scenes(
    config: WorldConfig, count: int, seed: int, held_out: bool | None, what: str
) -> Iterator[tuple[int, Scene, np.random.Generator]]:
    """(number, scene, source of randomness for what is said of it)."""
    for index in tqdm(range(count), desc=what, leave=False):
        rng = np.random.default_rng((987_654, seed, index))
        yield index, draw_scene(rng, config, held_out=held_out), rng


def _draw(
    pipeline: LancePipeline,
    config: WorldConfig,
    count: int,
    seed: int,
    held_out: bool,
    shown: Shown,
    settings: dict,
) -> Scores:
    """Pictures of captions: each attribute that the caption states."""
    tally = Tally()
    for index, scene, rng in _scenes(config, count, seed, held_out, "draw"):
        words, claims = describe(scene, rng)
        made = pipeline.generate_image(words, seed=seed + index, **settings)
        verdict = check(claims, made.frames[0])
        tally.mark("all", verdict.all)
        for name in ATTRIBUTES:
            tally.mark(name, getattr(verdict, name))
        if index < 8:
            shown.append((f"{_mark(verdict.all)}: {words}", made.image))
    return tally.scores()


def _ask(pipeline: LancePipeline, count: int, seed: int, shown: Shown) -> Scores:
    """Questions about rendered pictures, each kind equally often; the answer must be exactly right."""
    tally = Tally()
    side = pipeline.config.sizes.image
    for index, scene, rng in _scenes(WorldConfig(), count, seed, False, "ask"):
        kinds = QUESTIONS if len(scene.things) > 1 else tuple(k for k in QUESTIONS if k != "relation")
        asked = question(scene, rng, kinds=kinds)
        picture = render(scene, side)
        answer = pipeline.ask(asked.question, Image.fromarray(picture), max_tokens=12).text.strip()
        tally.mark("all", answer == asked.answer)
        tally.mark(asked.kind, answer == asked.answer)
        if index < 4:
            shown.append(
                (f"{_mark(answer == asked.answer)}: {asked.question} {answer}", Image.fromarray(picture))
            )
    return tally.scores()


def _edit(pipeline: LancePipeline, count: int, seed: int, shown: Shown, settings: dict) -> Scores:
    """Edits of rendered pictures: the change made, and the rest kept."""
    tally = Tally()
    side = pipeline.config.sizes.image
    for index, scene, rng in _scenes(WorldConfig(), count, seed, False, "edit"):
        change = edit(scene, rng, kinds=(EDITS[index % len(EDITS)],))
        before = Image.fromarray(render(scene, side))
        made = pipeline.edit(before, change.instruction, seed=seed + index, **settings)
        verdict = kept(scene, change.after, made.frames[0])
        tally.mark("all", verdict.all)
        tally.mark(change.kind, verdict.all)
        tally.mark("made", verdict.made)
        tally.mark("kept", verdict.kept)
        if index < 6:
            shown += [("before", before), (f"{_mark(verdict.all)}: {change.instruction}", made.image)]
    return tally.scores()


def _film(pipeline: LancePipeline, count: int, seed: int, shown: Shown, settings: dict) -> Scores:
    """Clips from captions, clips from a first frame, and questions about motion."""
    tally = Tally()
    for index, scene, rng in _scenes(MOVING, count, seed, False, "film"):
        words, claims = describe(scene, rng)
        made = pipeline.generate_video(words, seed=seed + index, **settings)
        tally.mark("text to video", check(claims, made.frames).motion)
        first = Image.fromarray(render(scene, pipeline.config.sizes.video))
        moved = pipeline.animate(first, words, seed=seed + index, **settings)
        tally.mark("image to video", check(claims, moved.frames).motion)
        clip = render_clip(scene, 9, pipeline.config.sizes.video)
        asked = question(scene, rng, kinds=("motion",)) if scene.things[0].motion != "still" else None
        if asked is not None:
            answer = pipeline.ask(asked.question, Video(clip, pipeline.config.sizes.fps), max_tokens=12).text
            tally.mark("question", answer.strip() == asked.answer)
        if index < 2:
            shown += [(f"film: {words}", made.media), (f"animate: {words}", moved.media)]
    return tally.scores()


def _locate(pipeline: LancePipeline, count: int, seed: int, shown: Shown) -> Scores:
    """Boxes, in pixels of what the ViT sees: whether they overlap the right ones by more than half."""
    tally = Tally()
    side = pipeline.config.sizes.vit_image
    for index, scene, rng in _scenes(WorldConfig(), count, seed, False, "locate"):
        asked = locate(scene, rng, side)
        picture = Image.fromarray(render(scene, side))
        answer = pipeline.ask(asked.question, picture, max_tokens=64).text
        right = well_placed(answer, asked.boxes) > 0.5
        tally.mark("all", right)
        if index < 4:
            shown.append((f"{_mark(right)}: {asked.question} {answer.strip()}", picture))
    return tally.scores()


def _write(pipeline: LancePipeline, count: int, seed: int, shown: Shown, settings: dict) -> Scores:
    """Words drawn, read and edited."""
    tally = Tally()
    side = pipeline.config.sizes.image
    for index, scene, rng in _scenes(WRITTEN, count, seed, False, "words"):
        words, claims = describe(scene, rng)
        made = pipeline.generate_image(words, seed=seed + index, **settings)
        tally.mark("drawn", check(claims, made.frames[0]).text)
        asked = question(scene, rng, kinds=("text",))
        before = Image.fromarray(render(scene, side))
        answer = pipeline.ask(asked.question, before, max_tokens=12).text.strip()
        tally.mark("read", answer == asked.answer)
        kind = WORD_EDITS[index % len(WORD_EDITS)]
        blank = edit(scene, rng, kinds=("erase",)).after
        start = blank if kind == "write" else scene
        change = edit(start, rng, kinds=(kind,))
        edited = pipeline.edit(
            Image.fromarray(render(start, side)), change.instruction, seed=seed + index, **settings
        )
        tally.mark(kind, kept(start, change.after, edited.frames[0]).all)
        if index < 4:
            shown += [(f"draw: {words}", made.image), (f"edit: {change.instruction}", edited.image)]
    return tally.scores()


def _compare(pipeline: LancePipeline, count: int, seed: int, shown: Shown) -> Scores:
    """Questions about two and three pictures, each kind equally often; the answer must be exactly right."""
    tally = Tally()
    side = pipeline.config.sizes.image
    for index in tqdm(range(count), desc="several", leave=False):
        rng = np.random.default_rng((987_654, seed, index))
        kind = SEVERAL_KINDS[index % len(SEVERAL_KINDS)]
        while True:
            scenes = sample_several(rng, WorldConfig(), 2 + index // len(SEVERAL_KINDS) % 2)
            with suppress(InputError):  # these allow no question of the kind
                asked = question_of_several(scenes, rng, kinds=(kind,))
                break
        pictures = [Image.fromarray(render(scene, side)) for scene in scenes]
        answer = pipeline.ask(asked.question, pictures, max_tokens=12).text.strip()
        tally.mark("all", answer == asked.answer)
        tally.mark(kind, answer == asked.answer)
        if index < 2:
            shown += [(f"{_mark(answer == asked.answer)}: {asked.question} {answer}", p) for p in pictures]
    return tally.scores()


def _talk(pipeline: LancePipeline, count: int, seed: int, shown: Shown, settings: dict) -> Scores:
    """The last of three turns: a question after a picture and its edit, and a second edit after the first.

    The question follows turns that were right; the second edit follows what the model made of the first.
    """
    tally = Tally()
    side = pipeline.config.sizes.image
    for index in tqdm(range(count), desc="turns", leave=False):
        rng = np.random.default_rng((987_654, seed, index))
        scenes, words = chain(rng, WorldConfig())
        *past, last = converse(scenes, words, rng, ("draw", "edit", "ask"))
        messages = [message for turn in past for message in _messages(turn, side)]
        answer = pipeline.chat([*messages, {"role": "user", "content": last.words}], max_tokens=12).text
        tally.mark("question", answer.strip() == last.reply)
        made = pipeline.edit(
            Image.fromarray(render(scenes[0], side)), words[0], seed=seed + index, **settings
        )
        again = pipeline.edit(made, words[1], keep_history=True, seed=seed + index, **settings)
        tally.mark("second edit", check(claims_of(scenes[2]), again.frames[0]).all)
        if index < 2:
            shown += [(words[0], made.image), (words[1], again.image)]
    return tally.scores()


def _messages(turn: Turn, side: int) -> list[dict[str, object]]:
    """A turn that went right, its pictures rendered, as `LancePipeline.chat` takes it."""
    reply: object = turn.reply
    if isinstance(turn.reply, Scene):
        reply = [{"type": "image", "image": Image.fromarray(render(turn.reply, side))}]
    return [{"role": "user", "content": turn.words}, {"role": "assistant", "content": reply}]
