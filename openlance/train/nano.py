"""What the bundled model is trained on: its frozen parts, the encoded world, and a mixture for each stage.

The frozen parts (tokenizer, ViT, VAE) and the encoded world are made once, each saved as it goes and left
alone when it is there; the stages themselves are presets of `openlance.train.presets`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openlance.config import ModelConfig, nano
from openlance.data.mixture import Schedule
from openlance.errors import InputError
from openlance.model.checkpoint import Release, load_model, load_vae, read_config
from openlance.model.lance import Lance
from openlance.model.vae import VAE
from openlance.model.vision import Vision
from openlance.sequence.template import Task
from openlance.tokenizer import Tokenizer, train_tokenizer
from openlance.train.nano_data import (
    KINDS,
    EncodedWorld,
    Shares,
    WorldFeed,
    WorldPack,
    encode_features,
    encode_latents,
)
from openlance.train.nano_vae import (
    read_vae_config,
    train_clips,
    train_decoder,
    train_vae,
    write_vae_config,
)
from openlance.train.nano_vision import train_vision
from openlance.train.parallel import Ranks
from openlance.train.settings import TrainConfig
from openlance.world import vocabulary_texts

M = TypeVar("M", bound=nn.Module)
VISION, VAE_WEIGHTS = "vision.safetensors", "vae.safetensors"

# Short, since every token costs time where two CPU cores are all there is.
SYSTEM_PROMPTS: dict[str, str] = {
    Task.T2I: "draw",
    Task.T2V: "film",
    Task.I2V: "animate",
    Task.IMAGE_EDIT: "edit",
    Task.VIDEO_EDIT: "edit film",
    Task.SUBJECT_IMAGE: "draw it",
    Task.SUBJECT_VIDEO: "film it",
    Task.X2T_IMAGE: "answer",
    Task.X2T_VIDEO: "answer film",
    Task.CHAT: "chat",
    "caption_image": "describe",
    "caption_video": "describe film",
}

# Shares of samples. Outlines come last and need most pictures, so drawing has most of the first stage.
PRE_TRAINING: Shares = {
    Task.T2I: 0.58,
    "brief": 0.10,
    Task.IMAGE_EDIT: 0.16,
    Task.SUBJECT_IMAGE: 0.01,
    Task.X2T_IMAGE: 0.11,
    Task.X2T_VIDEO: 0.01,
    Task.T2V: 0.01,
    Task.I2V: 0.01,
    Task.VIDEO_EDIT: 0.01,
}
# Everything that the world holds.
CONTINUAL: Shares = {
    Task.T2I: 0.24,
    "brief": 0.10,
    Task.IMAGE_EDIT: 0.26,
    Task.SUBJECT_IMAGE: 0.02,
    Task.X2T_IMAGE: 0.16,
    Task.X2T_VIDEO: 0.02,
    Task.T2V: 0.03,
    Task.I2V: 0.04,
    Task.VIDEO_EDIT: 0.01,
    "boxes": 0.03,
    "written": 0.02,
    "several": 0.02,
    "turns": 0.04,
    "story": 0.01,
}
# More of what takes longest to learn: to tell two things apart.
LATER: Shares = {
    Task.T2I: 0.19,
    "brief": 0.08,
    Task.IMAGE_EDIT: 0.24,
    Task.SUBJECT_IMAGE: 0.01,
    Task.X2T_IMAGE: 0.12,
    "pairs": 0.16,
    Task.X2T_VIDEO: 0.03,
    Task.T2V: 0.02,
    Task.I2V: 0.03,
    Task.VIDEO_EDIT: 0.01,
    "boxes": 0.03,
    "written": 0.01,
    "several": 0.03,
    "turns": 0.03,
    "story": 0.01,
}
MIXTURES: dict[str, Schedule[Shares]] = {
    "pre-training": Schedule.constant(PRE_TRAINING),
    "continual training": Schedule(((0, CONTINUAL), (500, LATER))),
    "fine-tuning": Schedule.constant(LATER),
}
HELD_OUT_TASKS = (Task.T2I, Task.IMAGE_EDIT, Task.X2T_IMAGE)
HELD_OUT_PACKS = 2


@dataclass(frozen=True)
class NanoRecipe:
    """How long the frozen parts take, in minutes: the VAE on pictures, on clips, and its decoder alone, and
    the ViT; encoded items of each of `KINDS`."""

    vae_minutes: float = 18.0
    clip_minutes: float = 35.0
    decoder_minutes: float = 45.0
    vision_minutes: float = 9.0
    items: tuple[int, ...] = (40_000, 20_000, 1_000, 2_000, 2_000, 3_000, 3_000, 400, 12_000)


@dataclass(frozen=True, eq=False)
class NanoParts:
    """What does not change while the backbone trains. folder: with the encoded world."""

    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer
    vision: Vision
    vae: VAE

    def new_model(self, seed: int) -> Lance:
        """A backbone that has learnt nothing, with the trained ViT."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = Lance(self.config)
        model.vision.load_state_dict(self.vision.state_dict())
        return model

    def feed(self, config: TrainConfig, ranks: Ranks) -> WorldFeed:
        """The packs of a stage, by its own mixture."""
        return self._feed(EncodedWorld(self.folder), config, ranks)

    def held_out(self, config: TrainConfig) -> dict[str, list[WorldPack]]:
        """Packs of items that training never sees, by task."""
        feed = self._feed(EncodedWorld(self.folder, held_out=True), config, Ranks())
        return {
            str(task): [feed.pack(n, {task: 1.0}, 1, n) for n in range(HELD_OUT_PACKS)]
            for task in HELD_OUT_TASKS
        }

    def _feed(self, world: EncodedWorld, config: TrainConfig, ranks: Ranks) -> WorldFeed:
        mixture, encode = MIXTURES[config.stage], self.tokenizer.encode_with_offsets
        return WorldFeed(world, mixture, encode, self.config, config.lanes, config.tokens, ranks, config.seed)


def make_parts(
    folder: Path,
    recipe: NanoRecipe | None = None,
    *,
    threads: int = 1,
    release: Release | None = None,
) -> NanoParts:
    """Train and encode what is not there yet, or go on with it; then load it all.

    release: a model that goes on learning, whose tokenizer, ViT and VAE are taken instead of new ones.
    Raises InputError where those in the folder are others.
    """
    recipe = NanoRecipe() if recipe is None else recipe
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    if release is not None:
        _take_parts(release, folder)
    tokenizer = nano_tokenizer(folder / "tokenizer")
    config = replace(nano(), tokens=tokenizer.special, system_prompts=SYSTEM_PROMPTS)
    if not (folder / VISION).exists():
        train_vision(folder, recipe.vision_minutes, threads=threads)
    vision = _frozen(Vision(config.vision), folder / VISION)
    if not (folder / VAE_WEIGHTS).exists():
        draft = folder / "vae"
        train_vae(draft, recipe.vae_minutes, threads=threads)
        train_clips(draft, recipe.clip_minutes, threads=threads)
        train_decoder(draft, recipe.decoder_minutes, threads=threads)
        for name in ("vae.json", VAE_WEIGHTS):  # the weights come last: they say that all is done
            os.replace(draft / name, folder / name)
    config = replace(config, vae=read_vae_config(folder))
    vae = _frozen(VAE(config.vae), folder / VAE_WEIGHTS)
    for kind, count in zip(KINDS, recipe.items, strict=True):
        encode_features(kind, count, vision, config, folder)
        encode_latents(kind, count, vae, config, folder)
    return NanoParts(folder, config, tokenizer, vision, vae)


def _take_parts(release: Release, folder: Path) -> None:
    """The frozen parts of a model, as `make_parts` would have left them."""
    tokenizer = Tokenizer.load(release.folder)
    config = read_config(release, tokenizer)
    model, vae = load_model(release, config, parts={"und", "vision"}), load_vae(release, config)
    if not (folder / VAE_WEIGHTS).exists():
        write_vae_config(config.vae, folder)
    for name, part in ((VISION, model.vision), (VAE_WEIGHTS, vae)):
        state = {key: value.contiguous() for key, value in part.state_dict().items()}
        if not (folder / name).exists():
            draft = (folder / name).with_suffix(".draft")
            save_file(state, draft)
            os.replace(draft, folder / name)
        elif not _same(state, load_file(folder / name)):
            raise InputError(
                f"{folder / name}: is not of {release.root}: give another folder, with --parts, or remove it"
            )
    (folder / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(folder / "tokenizer")


def _same(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether these are the same weights, up to the bfloat16 that models are saved in."""
    return some.keys() == others.keys() and all(
        torch.equal(value.bfloat16(), others[name].bfloat16()) for name, value in some.items()
    )


def _frozen(module: M, file: Path) -> M:
    module.load_state_dict(load_file(file))
    return module.eval().requires_grad_(False)


def nano_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the world's words and of the chat template, trained once."""
    if not (folder / "tokenizer.json").exists():
        turns = [f"{word}\n" for word in ("system", "user", "assistant", *SYSTEM_PROMPTS.values())]
        texts = vocabulary_texts()
        tokenizer = train_tokenizer([*texts, *turns * (1 + len(texts) // 20)], nano().backbone.vocab)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder)
    return Tokenizer.load(folder)
