"""The questions of nano-bench: what is asked of the model in the world of shapes, and what is right.

Each part gives cases: words and pictures of scenes, one order, and the judge's marks for what comes back.
Scenes are drawn from a seed that training never uses; what a seed draws never changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from openlance.config import Sizes
from openlance.data.media import Video
from openlance.errors import InputError
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
from openlance.world.tags import ONE, TAGS, TWO, say_tag

if TYPE_CHECKING:
    from openlance.infer.orders import Order
    from openlance.infer.pipeline import LancePipeline

ATTRIBUTES = ("color", "shape", "size", "place", "count", "relation", "ground", "motion")
QUESTIONS = ("color", "shape", "size", "place", "count", "relation", "exists", "ground")
EDITS = ("recolor", "reshape", "move", "add", "remove", "ground")
WORD_EDITS = ("write", "rewrite", "erase")
WRITTEN = WorldConfig(max_things=1, words=WORDS, text_share=1.0)
MOVING = WorldConfig(max_things=1, motions=("left", "right", "up", "down", "grow", "shrink"))
CLIP_FRAMES = 9  # of clips that are asked about

Rng = np.random.Generator
Marks = Mapping[str, bool | None]
"""Right or wrong by name; None was not asked."""
Settings = Mapping[str, Any]
MakeOrder = Callable[["LancePipeline", int, Settings], "Order"]
"""(model, seed, sampling settings) → the order."""
Judge = Callable[[Any], Marks]
"""The marks of what came back: a picture uint8 [H, W, 3], a clip [T, H, W, 3], or the text of an answer."""


@dataclass(frozen=True)
class Case:
    """One thing asked. file: its name below the part's folder; its suffix says what comes back."""

    file: str
    words: str
    order: MakeOrder
    judge: Judge
    seed: int = 0


def cases(part: str, count: int, clips: int, seed: int, sizes: Sizes) -> Iterator[Case]:
    """Of a part, for a model of these sizes. count: pictures, edits and (twice as many) questions; clips: of
    the motion part."""
    makers: dict[str, Callable[[Rng, int, Sizes], Iterator[Case]]] = {
        "one": lambda rng, index, sizes: _draw(rng, index, ONE, held_out=False),
        "two": lambda rng, index, sizes: _draw(rng, index, TWO, held_out=False),
        "held_out": lambda rng, index, sizes: _draw(rng, index, ONE, held_out=True),
        "questions": _ask,
        "edits": _edit,
        "motion": _film,
        "tags": _tag,
        "boxes": _locate,
        "words": _write,
        "several": _compare,
        "turns": _talk,
    }
    wanted = {"questions": 2 * count, "motion": clips}.get(part, count)
    for index in range(wanted):
        for case in makers[part](np.random.default_rng((987_654, seed, index)), index, sizes):
            yield replace(case, file=f"{index:04d}{case.file}", seed=seed + index)


def _image(words: str) -> MakeOrder:
    return lambda lance, seed, settings: lance.order.generate_image(words, seed=seed, **settings)


def _edited(scene: Scene, words: str, side: int) -> MakeOrder:
    before = render(scene, side)
    return lambda lance, seed, settings: lance.order.edit(before, words, seed=seed, **settings)


def _answer(words: str, shown: Any, max_tokens: int = 12) -> MakeOrder:
    return lambda lance, seed, settings: lance.order.ask(words, shown, max_tokens=max_tokens, seed=seed)


def _exactly(name: str, wanted: str) -> Judge:
    return lambda said: {name: said.strip() == wanted}


def _draw(rng: Rng, index: int, config: WorldConfig, *, held_out: bool) -> Iterator[Case]:
    """A picture of a caption: each attribute that the caption states."""
    words, claims = describe(draw_scene(rng, config, held_out=held_out), rng)

    def judge(picture: Any) -> Marks:
        verdict = check(claims, picture)
        return {"all": verdict.all} | {name: getattr(verdict, name) for name in ATTRIBUTES}

    yield Case(".png", words, _image(words), judge)


def _ask(rng: Rng, index: int, sizes: Sizes) -> Iterator[Case]:
    """A question about a rendered picture, each kind equally often; the answer must be exactly right."""
    scene = draw_scene(rng, WorldConfig(), held_out=False)
    kinds = QUESTIONS if len(scene.things) > 1 else tuple(k for k in QUESTIONS if k != "relation")
    asked = question(scene, rng, kinds=kinds)

    def judge(said: Any) -> Marks:
        right = said.strip() == asked.answer
        return {"all": right, asked.kind: right}

    yield Case(".json", asked.question, _answer(asked.question, render(scene, sizes.image)), judge)


def _edit(rng: Rng, index: int, sizes: Sizes) -> Iterator[Case]:
    """An edit of a rendered picture: the change made, and the rest kept."""
    scene = draw_scene(rng, WorldConfig(), held_out=False)
    change = edit(scene, rng, kinds=(EDITS[index % len(EDITS)],))

    def judge(picture: Any) -> Marks:
        verdict = kept(scene, change.after, picture)
        return {"all": verdict.all, change.kind: verdict.all, "made": verdict.made, "kept": verdict.kept}

    yield Case(".png", change.instruction, _edited(scene, change.instruction, sizes.image), judge)


def _film(rng: Rng, index: int, sizes: Sizes) -> Iterator[Case]:
    """A clip from a caption, a clip from a first frame, and a question about motion."""
    scene = draw_scene(rng, MOVING, held_out=False)
    words, claims = describe(scene, rng)
    first = render(scene, sizes.video)

    def film(lance: LancePipeline, seed: int, settings: Settings) -> Order:
        return lance.order.generate_video(words, seed=seed, **settings)

    def animate(lance: LancePipeline, seed: int, settings: Settings) -> Order:
        return lance.order.animate(first, words, seed=seed, **settings)

    def moves(name: str) -> Judge:
        return lambda clip: {name: check(claims, clip).motion}

    yield Case("-text.npz", words, film, moves("text to video"))
    yield Case("-image.npz", words, animate, moves("image to video"))
    if scene.things[0].motion != "still":
        asked = question(scene, rng, kinds=("motion",))
        clip = Video(render_clip(scene, CLIP_FRAMES, sizes.video), sizes.fps)
        yield Case(".json", asked.question, _answer(asked.question, clip), _exactly("question", asked.answer))


def _tag(rng: Rng, index: int, sizes: Sizes) -> Iterator[Case]:
    """GenEval's six kinds of prompt, said of shapes; everything that is said must be true."""
    tag = TAGS[index % len(TAGS)]
    words, claims = say_tag(tag, rng)
    yield Case(".png", words, _image(words), lambda picture: {tag: check(claims, picture).all})


def _locate(rng: Rng, index: int, sizes: Sizes) -> Iterator[Case]:
    """Boxes, in pixels of what the ViT sees: whether they overlap the right ones by more than half."""
    scene = draw_scene(rng, WorldConfig(), held_out=False)
    asked = locate(scene, rng, sizes.vit_image)
    order = _answer(asked.question, render(scene, sizes.vit_image), max_tokens=64)
    yield Case(".json", asked.question, order, lambda said: {"all": well_placed(said, asked.boxes) > 0.5})


def _write(rng: Rng, index: int, sizes: Sizes) -> Iterator[Case]:
    """Words drawn, read and edited."""
    scene = draw_scene(rng, WRITTEN, held_out=False)
    words, claims = describe(scene, rng)
    asked = question(scene, rng, kinds=("text",))
    kind = WORD_EDITS[index % len(WORD_EDITS)]
    blank = edit(scene, rng, kinds=("erase",)).after
    start = blank if kind == "write" else scene
    change = edit(start, rng, kinds=(kind,))
    yield Case("-draw.png", words, _image(words), lambda picture: {"drawn": check(claims, picture).text})
    order = _answer(asked.question, render(scene, sizes.image))
    yield Case("-read.json", asked.question, order, _exactly("read", asked.answer))
    edited = _edited(start, change.instruction, sizes.image)
    yield Case(
        "-edit.png",
        change.instruction,
        edited,
        lambda picture: {kind: kept(start, change.after, picture).all},
    )


def _compare(rng: Rng, index: int, sizes: Sizes) -> Iterator[Case]:
    """A question about two or three pictures, each kind equally often; the answer must be exactly right."""
    kind = SEVERAL_KINDS[index % len(SEVERAL_KINDS)]
    while True:
        scenes = sample_several(rng, WorldConfig(), 2 + index // len(SEVERAL_KINDS) % 2)
        with suppress(InputError):  # these allow no question of the kind
            asked = question_of_several(scenes, rng, kinds=(kind,))
            break
    pictures = [render(scene, sizes.image) for scene in scenes]

    def judge(said: Any) -> Marks:
        right = said.strip() == asked.answer
        return {"all": right, kind: right}

    yield Case(".json", asked.question, _answer(asked.question, pictures), judge)


def _talk(rng: Rng, index: int, sizes: Sizes) -> Iterator[Case]:
    """The last of three turns: a question after a picture and its edit, and a second edit after the first.

    The question follows turns that were right; the second edit follows what the model made of the first.
    """
    scenes, words = chain(rng, WorldConfig())
    *past, last = converse(scenes, words, rng, ("draw", "edit", "ask"))
    messages = [message for turn in past for message in _messages(turn, sizes.image)]
    messages.append({"role": "user", "content": last.words})

    def talk(lance: LancePipeline, seed: int, settings: Settings) -> Order:
        return lance.order.chat(messages, max_tokens=12, seed=seed)

    def edit_again(lance: LancePipeline, seed: int, settings: Settings) -> Order:
        made = lance.edit(render(scenes[0], sizes.image), words[0], seed=seed, **settings)
        return lance.order.edit(made, words[1], keep_history=True, seed=seed, **settings)

    claims = claims_of(scenes[2])
    yield Case(".json", last.words, talk, _exactly("question", str(last.reply)))
    yield Case(".png", words[1], edit_again, lambda picture: {"second edit": check(claims, picture).all})


def _messages(turn: Turn, side: int) -> list[dict[str, object]]:
    """A turn that went right, its pictures rendered, as `LancePipeline.chat` takes it."""
    reply: object = turn.reply
    if isinstance(turn.reply, Scene):
        reply = [{"type": "image", "image": render(turn.reply, side)}]
    return [{"role": "user", "content": turn.words}, {"role": "assistant", "content": reply}]
