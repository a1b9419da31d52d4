"""The world as training data: scenes encoded once by the frozen VAE and ViT, and rows drawn from them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from openlance.config import ModelConfig
from openlance.data.buckets import VIT_DIVISOR, resize_to_bucket, to_vae_pixels, to_vit_patches
from openlance.data.frames import Frames
from openlance.data.mixture import Schedule
from openlance.data.tasks import Past, Row, View, to_sample
from openlance.model.vae import VAE
from openlance.model.vision import Vision
from openlance.sequence.segment import Sample
from openlance.sequence.template import Encode, Task
from openlance.train.parallel import Ranks
from openlance.world import (
    PLANS,
    TEXTURES,
    WIDE_EDIT_KINDS,
    WORDS,
    Scene,
    Turn,
    WorldConfig,
    caption,
    chain,
    converse,
    locate,
    question,
    question_of_several,
    render_clip,
    sample_scene,
    sample_several,
)
from openlance.world.language import at_place
from openlance.world.scene import pick
from openlance.world.tags import TAGS, show_tag

SEED = 7
HELD_OUT = 50
IMAGES = WorldConfig(max_things=2)
VARIED = WorldConfig(max_things=3, textures=TEXTURES)
WRITTEN = WorldConfig(max_things=2, textures=TEXTURES, words=WORDS, text_share=0.75)
CLIPS = WorldConfig(max_things=2, motions=("left", "right", "up", "down", "grow", "shrink"))
STORIES = replace(CLIPS, count_weights=(0.0, 1.0), times=("early", "late"))
CLIP_KINDS = ("motion", "color", "shape", "count", "ground")
# Those that take longest to learn come twice.
IMAGE_KINDS = (
    "color", "shape", "size", "place", "count", "relation", "relation", "exists", "exists", "ground"
)  # fmt: skip
PAIR_KINDS = ("relation", "relation", "exists", "exists", "color", "shape", "place", "size")
WRITTEN_KINDS = ("text", "text", "lettering", "count", "row")

Shares = Mapping[str, float]
"""Shares of samples: of tasks, and of the wide rows of `EncodedWorld`."""
Drawn = tuple[tuple[Scene, ...], tuple[str, ...]]
"""Scenes, and the words that lead from each to the next where they follow one another, or to the one that is
drawn of words alone."""


@dataclass(frozen=True)
class Kind:
    """One kind of encoded item: how many scenes an item has, frames of each, and how to draw them."""

    name: str
    frames: int
    scenes_each: int
    scenes: Callable[[np.random.Generator], Drawn]


def _image(rng: np.random.Generator) -> Drawn:
    return (sample_scene(rng, VARIED if rng.random() < 0.12 else IMAGES),), ()


def _edit(rng: np.random.Generator) -> Drawn:
    return chain(rng, IMAGES, edits=1)


def _subject(rng: np.random.Generator) -> Drawn:
    """The one thing of a picture, drawn again elsewhere on another ground."""
    one = WorldConfig(max_things=1)
    before, other = sample_scene(rng, one), sample_scene(rng, one)
    thing = replace(before.things[0], place=other.things[0].place, offset=other.things[0].offset)
    noun = pick(rng, ("it", "the shape", f"the {thing.shape}", "the same shape"))
    ground = pick(rng, (other.ground, f"a {other.ground} ground"))
    return (before, replace(other, things=(thing,))), (f"{noun} {at_place(thing.place, rng)} on {ground}",)


def _clip(rng: np.random.Generator) -> Drawn:
    return chain(rng, CLIPS, edits=1, kinds=("recolor", "reshape", "ground"))


def _written(rng: np.random.Generator) -> Drawn:
    return chain(rng, WRITTEN, edits=1, kinds=WIDE_EDIT_KINDS)


def _several(rng: np.random.Generator) -> Drawn:
    return sample_several(rng, IMAGES, 3), ()


def _talk(rng: np.random.Generator) -> Drawn:
    return chain(rng, IMAGES)


def _story(rng: np.random.Generator) -> Drawn:
    """Two things that move one after the other."""
    while True:
        scenes, words = chain(rng, STORIES, edits=1, kinds=("replace", "add", "remove", "texture"))
        if len({thing.when for thing in scenes[0].things}) == 2:
            return scenes, words


def _brief(rng: np.random.Generator) -> Drawn:
    """What a short prompt may show; now and then the prompt says the ground too."""
    words, scene = show_tag(pick(rng, TAGS), rng)
    return (scene,), (f"{words} on {scene.ground}" if rng.random() < 0.3 else words,)


CLIP = Kind("clip", 9, 2, _clip)
KINDS = (
    Kind("image", 1, 1, _image),
    Kind("edit", 1, 2, _edit),
    Kind("subject", 1, 2, _subject),
    CLIP,
    Kind("written", 1, 2, _written),
    Kind("several", 1, 3, _several),
    Kind("talk", 1, 3, _talk),
    Kind("story", 9, 2, _story),
    Kind("brief", 1, 1, _brief),
)


def encode_features(kind: Kind, count: int, vision: Vision, config: ModelConfig, folder: Path) -> None:
    """ViT features [items · scenes, tokens, hidden] float16 of `count` items, to a file in the folder."""

    def see(clips: list[Frames]) -> Tensor:
        views = [resize_to_bucket(clip, config.sizes.vit_image, VIT_DIVISOR) for clip in clips]
        seen = [to_vit_patches(view) for view in views]
        found = vision(torch.cat([p for p, _ in seen]), torch.tensor([grid for _, grid in seen]))
        return found.view(len(clips), -1, found.shape[-1])

    _encode(kind, count, see, config.sizes.vit_image, stored(folder, kind, "features"))


def encode_latents(kind: Kind, count: int, vae: VAE, config: ModelConfig, folder: Path) -> None:
    """Latents [items · scenes, frames, rows, columns, channels] float16 of `count` items, likewise."""

    def squeeze(clips: list[Frames]) -> Tensor:
        return vae.encode(torch.stack([to_vae_pixels(clip) for clip in clips]))

    _encode(kind, count, squeeze, config.sizes.image, stored(folder, kind, "latents"))


def stored(folder: Path, kind: Kind, what: str) -> Path:
    return folder / f"{kind.name}.{what}.safetensors"


@torch.inference_mode()
def _encode(kind: Kind, count: int, encode: Callable[[list[Frames]], Tensor], side: int, file: Path) -> None:
    """Draw the items, encode their scenes and write the file; one that is there is left alone."""
    if file.exists():
        return
    found = []
    items = tqdm(range(count), desc=file.name.removesuffix(".safetensors"))
    for chunk in _chunks(items, 32 if kind.frames == 1 else 2):
        scenes = [scene for i in chunk for scene in draw(kind, i)[0]]
        found.append(encode([render_clip(scene, kind.frames, side) for scene in scenes]).half())
    draft = file.with_suffix(".draft")
    save_file({"values": torch.cat(found)}, draft)
    os.replace(draft, file)


def _chunks(items: tqdm, size: int) -> Iterator[list[int]]:
    chunk: list[int] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def draw(kind: Kind, index: int) -> Drawn:
    """The scenes and words of an item: always the same for the same index."""
    return kind.scenes(np.random.default_rng((SEED, KINDS.index(kind), index)))


class EncodedWorld:
    """Rows drawn from encoded items.

    Beside the tasks there are wide rows: "brief" (pictures of short prompts), "pairs" (questions about one of
    two things), "boxes" (where things are), "written" (words in pictures: drawn, edited, read), "several"
    (questions about two or three pictures), "turns" (conversations), "story" (clips of what comes first).
    held_out: only from the items that are kept from training, one in `HELD_OUT`, the last of each kind; else
    from the others.
    """

    def __init__(self, folder: Path, *, held_out: bool = False):
        self.held_out = held_out
        self.wide: dict[str, Callable[[np.random.Generator, str], Row]] = {
            "pairs": self._pairs,
            "boxes": self._boxes,
            "written": self._written,
            "several": self._several,
            "turns": self._turns,
            "story": self._story,
            "brief": self._brief,
        }
        self.stored: dict[tuple[str, str], Tensor] = {}
        for kind in KINDS:
            for what in ("features", "latents"):
                if (file := stored(folder, kind, what)).exists():
                    self.stored[kind.name, what] = load_file(file)["values"]

    def rows(self, shares: Shares, *seed: int) -> Iterator[Row]:
        """Rows without end, mixed by their shares; the same for the same seed."""
        tasks, weights = list(shares), np.array(list(shares.values()))
        chances = weights / weights.sum()
        rng = np.random.default_rng(seed)
        name = "-".join(map(str, seed))
        for number in itertools.count():
            task = tasks[int(rng.choice(len(tasks), p=chances))]
            make = self.wide.get(task)
            row_id = f"{name}-{number}"
            yield make(rng, row_id) if make else self._row(Task(task), rng, row_id)

    def _item(self, name: str, rng: np.random.Generator) -> tuple[Sequence[Scene], list[View], Sequence[str]]:
        kind = next(k for k in KINDS if k.name == name)
        features, latents = (self.stored.get((name, what)) for what in ("features", "latents"))
        assert features is not None, f"no item of the kind {name} has been encoded"
        count = len(features) // kind.scenes_each
        kept = max(1, count // HELD_OUT)
        index = int(rng.integers(count - kept, count) if self.held_out else rng.integers(count - kept))
        scenes, words = draw(kind, index)
        frames = (kind.frames + 1) // 2  # the ViT merges two
        side = int((features.shape[1] // frames) ** 0.5)
        views = []
        for row in range(index * kind.scenes_each, (index + 1) * kind.scenes_each):
            known = None if latents is None else latents[row].float()
            views.append(View((frames, side, side), features=features[row].float(), latents=known))
        return scenes, views, words

    def _row(self, task: Task, rng: np.random.Generator, name: str) -> Row:
        if task in (Task.IMAGE_EDIT, Task.SUBJECT_IMAGE, Task.VIDEO_EDIT):
            stored = {Task.IMAGE_EDIT: "edit", Task.SUBJECT_IMAGE: "subject", Task.VIDEO_EDIT: "clip"}[task]
            _, (before, after), (words,) = self._item(stored, rng)
            return Row(name, task, words, sources=(before,), target=after)
        scenes, views, _ = self._item("clip" if task.video else "image", rng)
        scene, view = scenes[0], views[0]
        if task.generates:
            fixed = (0,) if task is Task.I2V else ()
            return Row(name, task, caption(scene, rng), target=view, fixed_frames=fixed)
        if rng.random() < 0.2:
            return Row(name, task, "", answer=caption(scene, rng), sources=(view,))
        asked = question(scene, rng, CLIP_KINDS if task.video else IMAGE_KINDS)
        return Row(name, task, asked.question, answer=asked.answer, sources=(view,))

    def _pairs(self, rng: np.random.Generator, name: str) -> Row:
        """A question about a picture of two things or more."""
        while True:
            (scene,), (view,), _ = self._item("image", rng)
            if len(scene.things) > 1:
                asked = question(scene, rng, PAIR_KINDS)
                return Row(name, Task.X2T_IMAGE, asked.question, answer=asked.answer, sources=(view,))

    def _boxes(self, rng: np.random.Generator, name: str) -> Row:
        """Boxes in pixels of what the ViT sees, as the bundled model's questions have them."""
        (scene,), (view,), _ = self._item("image", rng)
        assert view.grid is not None
        asked = locate(scene, rng, view.grid[1] * VIT_DIVISOR)
        return Row(name, Task.X2T_IMAGE, asked.question, answer=asked.answer, sources=(view,))

    def _written(self, rng: np.random.Generator, name: str) -> Row:
        (scene, _), (before, after), (words,) = self._item("written", rng)
        task = pick(rng, (Task.T2I, Task.T2I, Task.IMAGE_EDIT, Task.X2T_IMAGE))
        if task is Task.T2I:
            return Row(name, task, caption(scene, rng), target=before)
        if task is Task.IMAGE_EDIT:
            return Row(name, task, words, sources=(before,), target=after)
        asked = question(scene, rng, WRITTEN_KINDS)
        return Row(name, task, asked.question, answer=asked.answer, sources=(before,))

    def _several(self, rng: np.random.Generator, name: str) -> Row:
        scenes, views, _ = self._item("several", rng)
        count = pick(rng, (2, 3))
        asked = question_of_several(scenes[:count], rng)
        return Row(name, Task.X2T_IMAGE, asked.question, answer=asked.answer, sources=tuple(views[:count]))

    def _turns(self, rng: np.random.Generator, name: str) -> Row:
        """A conversation, of which the last turn is learnt."""
        scenes, views, words = self._item("talk", rng)
        view_of = dict(zip(scenes, views, strict=True))
        *past, last = converse(scenes, words, rng, pick(rng, PLANS))

        def shown(turn: Turn) -> tuple[View, ...]:
            return () if turn.shown is None else (view_of[turn.shown],)

        def reply(turn: Turn) -> str | View:
            return turn.reply if isinstance(turn.reply, str) else view_of[turn.reply]

        history = tuple(Past(turn.words, reply(turn), shown(turn)) for turn in past)
        if isinstance(last.reply, str):
            return Row(
                name, Task.X2T_IMAGE, last.words, answer=last.reply, sources=shown(last), history=history
            )
        target = view_of[last.reply]
        return Row(name, Task.IMAGE_EDIT, last.words, sources=shown(last), target=target, history=history)

    def _brief(self, rng: np.random.Generator, name: str) -> Row:
        _, (view,), (words,) = self._item("brief", rng)
        return Row(name, Task.T2I, words, target=view)

    def _story(self, rng: np.random.Generator, name: str) -> Row:
        (scene, _), (before, after), (words,) = self._item("story", rng)
        task = pick(rng, (Task.T2V, Task.VIDEO_EDIT, Task.X2T_VIDEO))
        if task is Task.T2V:
            return Row(name, task, caption(scene, rng), target=before)
        if task is Task.VIDEO_EDIT:
            return Row(name, task, words, sources=(before,), target=after)
        asked = question(scene, rng, ("order",))
        return Row(name, task, asked.question, answer=asked.answer, sources=(before,))


@dataclass(frozen=True, eq=False)
class WorldPack:
    """Samples that go through the network together."""

    lane: int
    samples: list[Sample]
    ids: list[str]


@dataclass(frozen=True, eq=False)
class WorldFeed:
    """The encoded world for the training loop: what a lane gives at a step depends on the seed alone.

    tokens: of a pack, at most.
    """

    world: EncodedWorld
    mixture: Schedule[Shares]
    encode: Encode
    config: ModelConfig
    lanes: int
    tokens: int
    ranks: Ranks = field(default_factory=Ranks)
    seed: int = 0

    def packs(self, step: int) -> Iterator[WorldPack]:
        """The packs of this process."""
        for lane in range(self.ranks.data_rank, self.lanes, self.ranks.data_size):
            yield self.pack(lane, self.mixture.at(step), self.seed, step, lane)

    def pack(self, lane: int, shares: Shares, *seed: int) -> WorldPack:
        """One pack, by the shares and the seed of its rows."""
        pack, room = WorldPack(lane, [], []), self.tokens
        for row in self.world.rows(shares, *seed):
            sample = to_sample(row, self.encode, self.config)
            room -= sum(map(len, sample))
            if room < 0 and pack.samples:
                return pack
            pack.samples.append(sample)
            pack.ids.append(row.id)
        raise AssertionError("rows have no end")

    def state(self) -> dict[str, Any]:
        """Nothing: the step says it all."""
        return {}

    def restore(self, states: Mapping[str, Any]) -> None:
        """Nothing to go back to."""
