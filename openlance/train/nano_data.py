"""The world as training data: scenes encoded once by the frozen VAE and ViT, and rows drawn from them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from openlance.config import ModelConfig
from openlance.data.buckets import resize_to_bucket, to_vae_pixels, to_vit_patches
from openlance.data.tasks import Row, View
from openlance.model.vae import VAE
from openlance.model.vision import Vision
from openlance.sequence.template import Task
from openlance.world import Scene, WorldConfig, caption, edit, question, render_clip, sample_scene
from openlance.world.language import at_place
from openlance.world.scene import pick

IMAGES = WorldConfig(max_things=2)
VARIED = WorldConfig(max_things=3, textures=("plain", "stripes", "checks", "dots"))
CLIPS = WorldConfig(max_things=2, motions=("left", "right", "up", "down", "grow", "shrink"))
CLIP_KINDS = ("motion", "color", "shape", "count", "ground")
IMAGE_KINDS = ("color", "color", "shape", "shape", "size", "place", "count", "relation", "exists", "ground")


@dataclass(frozen=True)
class Kind:
    """One kind of encoded item: how many scenes an item has, frames of each, and how to draw them."""

    name: str
    frames: int
    scenes: Callable[[np.random.Generator], tuple[list[Scene], str]]


def _image(rng: np.random.Generator) -> tuple[list[Scene], str]:
    return [sample_scene(rng, VARIED if rng.random() < 0.12 else IMAGES)], ""


def _edit(rng: np.random.Generator) -> tuple[list[Scene], str]:
    before = sample_scene(rng, IMAGES)
    change = edit(before, rng)
    return [before, change.after], change.instruction


def _subject(rng: np.random.Generator) -> tuple[list[Scene], str]:
    """The one thing of a picture, drawn again elsewhere on another ground."""
    one = WorldConfig(max_things=1)
    before, other = sample_scene(rng, one), sample_scene(rng, one)
    thing = replace(before.things[0], place=other.things[0].place, offset=other.things[0].offset)
    noun = pick(rng, ("it", "the shape", f"the {thing.shape}", "the same shape"))
    ground = pick(rng, (other.ground, f"a {other.ground} ground"))
    return [before, replace(other, things=(thing,))], f"{noun} {at_place(thing.place, rng)} on {ground}"


def _clip(rng: np.random.Generator) -> tuple[list[Scene], str]:
    before = sample_scene(rng, CLIPS)
    change = edit(before, rng, kinds=("recolor", "reshape", "ground"))
    return [before, change.after], change.instruction


KINDS = (
    Kind("image", 1, _image),
    Kind("edit", 1, _edit),
    Kind("subject", 1, _subject),
    Kind("clip", 9, _clip),
)


@torch.inference_mode()
def encode_world(
    kind: Kind, count: int, vae: VAE, vision: Vision, config: ModelConfig, file: Path, seed: int = 7
) -> None:
    """Draw `count` items and write latents and ViT features of all their scenes to a safetensors file.

    latents [items · scenes, frames, rows, columns, channels] and features [items · scenes, tokens, hidden],
    both float16. An existing file of that many items is left alone.
    """
    if file.exists() and len(load_file(file)["latents"]) >= count:
        return
    latents, features = [], []
    items = tqdm(range(count), desc=f"encode {kind.name}")
    for chunk in _chunks(items, 16 if kind.frames == 1 else 2):
        scenes = [scene for i in chunk for scene in draw(kind, i, seed)[0]]
        clips = [render_clip(scene, kind.frames, config.sizes.image) for scene in scenes]
        pixels = torch.stack([to_vae_pixels(clip) for clip in clips])
        latents.append(vae.encode(pixels).half())
        views = [resize_to_bucket(clip, config.sizes.vit_image, 28) for clip in clips]
        seen = [to_vit_patches(view) for view in views]
        grid = torch.tensor([g for _, g in seen])
        found = vision(torch.cat([patches for patches, _ in seen]), grid)
        features.append(found.view(len(clips), -1, found.shape[-1]).half())
    draft = file.with_suffix(".draft")
    save_file({"latents": torch.cat(latents), "features": torch.cat(features)}, draft)
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


def draw(kind: Kind, index: int, seed: int = 7) -> tuple[list[Scene], str]:
    """(scenes, instruction) of an item: always the same for the same index."""
    return kind.scenes(np.random.default_rng((seed, KINDS.index(kind), index)))


class EncodedWorld:
    """Rows drawn from encoded items. mixture: weight of each task."""

    def __init__(self, folder: Path, mixture: dict[Task, float], seed: int = 7):
        self.seed = seed
        self.tasks = list(mixture)
        self.weights = np.array([mixture[t] for t in self.tasks]) / sum(mixture.values())
        self.stored: dict[str, dict[str, Tensor]] = {
            kind.name: load_file(folder / f"{kind.name}.safetensors") for kind in KINDS
        }

    def rows(self, step: int, batch: int) -> list[Row]:
        """The rows of a step; the same for the same step."""
        rng = np.random.default_rng((self.seed, step, 1))
        chosen = rng.choice(len(self.tasks), batch, p=self.weights)
        return [self._row(self.tasks[i], rng, f"{step}-{n}") for n, i in enumerate(chosen)]

    def _item(self, name: str, rng: np.random.Generator) -> tuple[list[Scene], list[View], str]:
        kind = next(k for k in KINDS if k.name == name)
        stored = self.stored[name]
        per_item = 1 if name == "image" else 2
        index = int(rng.integers(len(stored["latents"]) // per_item))
        scenes, instruction = draw(kind, index)
        views = []
        for row in range(index * per_item, (index + 1) * per_item):
            features, latents = stored["features"][row].float(), stored["latents"][row].float()
            side = int((len(features) // ((kind.frames + 1) // 2)) ** 0.5)
            views.append(View(((kind.frames + 1) // 2, side, side), features=features, latents=latents))
        return scenes, views, instruction

    def _row(self, task: Task, rng: np.random.Generator, name: str) -> Row:
        if task in (Task.IMAGE_EDIT, Task.SUBJECT_IMAGE, Task.VIDEO_EDIT):
            stored = {Task.IMAGE_EDIT: "edit", Task.SUBJECT_IMAGE: "subject", Task.VIDEO_EDIT: "clip"}[task]
            _, (before, after), words = self._item(stored, rng)
            return Row(name, task, words, sources=(before,), target=after.latents)
        scenes, views, _ = self._item("clip" if task.video else "image", rng)
        scene, view = scenes[0], views[0]
        if task.generates:
            fixed = (0,) if task is Task.I2V else ()
            return Row(name, task, caption(scene, rng), target=view.latents, fixed_frames=fixed)
        if rng.random() < 0.2:
            return Row(name, task, "", answer=caption(scene, rng), sources=(view,))
        asked = question(scene, rng, CLIP_KINDS if task.video else IMAGE_KINDS)
        return Row(name, task, asked.question, answer=asked.answer, sources=(view,))
