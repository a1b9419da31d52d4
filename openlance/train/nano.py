"""The recipe of the bundled model, from nothing: tokenizer, VAE, ViT, encoded world, backbone.

Every stage leaves its result in the run folder and is skipped when that is there; VAE, ViT and backbone
also save as they go, so that a stopped run goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import nn

from openlance.config import ModelConfig, TrainConfig, nano
from openlance.data.tasks import to_sample
from openlance.model.checkpoint import save_pretrained
from openlance.model.lance import Lance
from openlance.model.vae import VAE
from openlance.model.vision import Vision
from openlance.sequence.template import Task
from openlance.tokenizer import Tokenizer, train_tokenizer
from openlance.train.loop import Samples, train
from openlance.train.nano_data import CLIP, KINDS, EncodedWorld, encode_features, encode_latents, stored
from openlance.train.nano_vae import read_vae_config, train_clips, train_vae
from openlance.train.nano_vision import train_vision
from openlance.world import vocabulary_texts

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

# Shares of samples. Drawing and answering come first; the rest shows that every task is learnt at all.
M = TypeVar("M", bound=nn.Module)

WORDS = {Task.X2T_IMAGE: 0.93, Task.X2T_VIDEO: 0.07}
MIXTURE = {
    Task.T2I: 0.60,
    Task.X2T_IMAGE: 0.17,
    Task.IMAGE_EDIT: 0.12,
    Task.SUBJECT_IMAGE: 0.02,
    Task.T2V: 0.02,
    Task.I2V: 0.03,
    Task.X2T_VIDEO: 0.03,
    Task.VIDEO_EDIT: 0.01,
}


@dataclass(frozen=True)
class NanoRecipe:
    """How long each part takes: minutes of the VAE and ViT, encoded items a kind, steps of the backbone."""

    vae_minutes: float = 18.0
    clip_minutes: float = 10.0
    vision_minutes: float = 9.0
    items: tuple[int, ...] = (20_000, 4_000, 1_000, 600)  # images, edits, subjects, clips
    words: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1_100, decay=0.0))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=2_000))


def train_nano(
    run_dir: Path,
    recipe: NanoRecipe,
    *,
    threads: int = 2,
    validate: Callable[[Lance, VAE, Tokenizer], dict[str, float]] | None = None,
) -> Path:
    """Run or resume the whole recipe; returns the folder of the finished model, in the released layout."""
    torch.set_num_threads(threads)
    run_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = nano_tokenizer(run_dir / "tokenizer")
    model = train_words(run_dir, recipe, tokenizer, threads)
    if not (run_dir / "vae.safetensors").exists():
        train_vae(run_dir, recipe.vae_minutes, threads=threads)
    if not stored(run_dir, CLIP, "latents").exists():
        train_clips(run_dir, recipe.clip_minutes, threads=threads)
    config = nano_config(run_dir, tokenizer)
    vae = _frozen(VAE(config.vae), run_dir / "vae.safetensors")
    for kind, count in zip(KINDS, recipe.items, strict=True):
        encode_latents(kind, count, vae, config, run_dir)
    model.config = config
    check = None if validate is None else lambda model, step: validate(model, vae, tokenizer)
    samples = _samples(EncodedWorld(run_dir, MIXTURE), recipe.train.batch, tokenizer, config)
    trained = train(model, samples, recipe.train, run_dir, vocabulary=tokenizer.size, validate=check)
    out = run_dir / "nano"
    save_pretrained(out, model=trained, vae=vae, tokenizer=tokenizer, config=config, dtype=torch.bfloat16)
    return out


def train_words(run_dir: Path, recipe: NanoRecipe, tokenizer: Tokenizer, threads: int) -> Lance:
    """The ViT, then the und expert on questions and captions: neither needs the VAE."""
    if not (run_dir / "vision.safetensors").exists():
        train_vision(run_dir, recipe.vision_minutes, threads=threads)
    config = replace(nano(), tokens=tokenizer.special, system_prompts=SYSTEM_PROMPTS)
    vision = _frozen(Vision(config.vision), run_dir / "vision.safetensors")
    for kind, count in zip(KINDS, recipe.items, strict=True):
        encode_features(kind, count, vision, config, run_dir)
    torch.manual_seed(recipe.words.seed)
    model = Lance(config)
    model.vision.load_state_dict(vision.state_dict())
    samples = _samples(EncodedWorld(run_dir, WORDS), recipe.words.batch, tokenizer, config)
    train(model, samples, recipe.words, run_dir, vocabulary=tokenizer.size, name="words")
    return model


def _samples(world: EncodedWorld, batch: int, tokenizer: Tokenizer, config: ModelConfig) -> Samples:
    encode = tokenizer.encode_with_offsets
    return lambda step: [to_sample(row, encode, config) for row in world.rows(step, batch)]


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


def nano_config(run_dir: Path, tokenizer: Tokenizer) -> ModelConfig:
    """The preset with what training found: the tokenizer's special ids and the latents' statistics."""
    return replace(
        nano(), vae=read_vae_config(run_dir), tokens=tokenizer.special, system_prompts=SYSTEM_PROMPTS
    )
