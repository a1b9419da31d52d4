"""A tiny network with random weights, and samples of every task for it: what the core is tested with."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from openlance.config import BackboneConfig, ModelConfig, SamplingConfig, Sizes, VAEConfig, VisionConfig
from openlance.model.lance import PARTS, Lance
from openlance.model.vae import VAE
from openlance.sequence.segment import Kind, Role, Sample, Segment
from openlance.sequence.template import Message, Task, build, compose, system_prompt
from openlance.tokenizer import Tokenizer, train_tokenizer

HIDDEN, CHANNELS = 32, 48
TEXTS = ["A red circle left of a blue square.", "What colour is the square? It is blue.", "You are helpful."]


@lru_cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 320)


@lru_cache
def config() -> ModelConfig:
    return ModelConfig(
        name="tiny",
        backbone=BackboneConfig(
            hidden=HIDDEN, layers=2, heads=4, kv_heads=2, mlp=48, vocab=330, rope_sections=(1, 1, 2)
        ),
        vision=VisionConfig(
            depth=2, hidden=32, heads=2, mlp=48, out_hidden=HIDDEN, window=56, full_attention_layers=(1,)
        ),
        vae=VAEConfig(base=2, decoder_base=4, residual_blocks=1),
        tokens=tokenizer().special,
        sampling=SamplingConfig(steps=2),
        sizes=Sizes(image=64, video=48, vit_image=56, vit_video=56, frames=5, fps=4.0, max_seconds=2.0),
        max_latent_side=8,
        max_frames=17,
    )


def build_network(seed: int, parts: frozenset[str] = PARTS) -> Lance:
    """Random weights that differ everywhere: norms and biases too, so that no part can be left out.

    Small embeddings and large attention outputs, so that what comes out depends on the whole context.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Lance(config(), parts).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
            model.embed.weight.mul_(0.1)
            for name, parameter in model.named_parameters():
                if name.endswith(".o.weight"):
                    parameter.mul_(4)
    return model


@lru_cache
def network() -> Lance:
    """Shared by tests that only read it."""
    return build_network(0).requires_grad_(False)


@lru_cache
def vae() -> VAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VAE(config().vae).eval().requires_grad_(False)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(grid: tuple[int, int, int], role: Role = Role.SOURCE, seed: int = 1) -> Segment:
    """A ViT segment with features of its own, so that no tower has to run."""
    count = grid[0] * grid[1] * grid[2]
    return Segment(Kind.VIT, role, grid=grid, features=noise(count, HIDDEN, seed=seed))


def clean(grid: tuple[int, int, int], role: Role = Role.SOURCE, seed: int = 2) -> Segment:
    return Segment(Kind.CLEAN, role, grid=grid, latents=noise(*grid, CHANNELS, seed=seed))


def target(grid: tuple[int, int, int], fixed: tuple[int, ...] = (), seed: int = 3) -> Segment:
    latents = noise(*grid, CHANNELS, seed=seed)
    return Segment(Kind.NOISY, Role.TARGET, grid=grid, latents=latents, fixed_frames=fixed)


def compose_task(
    task: Task, parts: list[Any], ending: Any = None, history: tuple[Message, ...] = ()
) -> Sample:
    encode, system = tokenizer().encode_with_offsets, system_prompt(task, {})
    return compose(parts, encode, system=system[:24], ending=ending, history=history)


@lru_cache
def samples() -> dict[str, Sample]:
    """A sample of every shape that a task can have, each with its ending."""
    image, clip = (1, 2, 3), (2, 2, 2)
    past = (
        Message("user", (seen(image, seed=4), clean(image, seed=5), "Make it red."), past=True),
        Message("assistant", (seen(image, seed=6), clean(image, seed=7)), past=True),
    )
    two = [
        seen((1, 2, 2), Role.REFERENCE), clean(image, Role.REFERENCE),
        seen((1, 1, 2), Role.REFERENCE, seed=8), clean((1, 3, 2), Role.REFERENCE, seed=9),
    ]  # fmt: skip
    found = {
        "t2i": compose_task(Task.T2I, ["A red circle."], target(image)),
        "t2v": compose_task(Task.T2V, ["A blue square."], target(clip)),
        "i2v": compose_task(Task.I2V, ["It moves."], target((3, 2, 2), fixed=(0,))),
        "first_and_last": compose_task(Task.I2V, ["It moves."], target((3, 2, 2), fixed=(0, 2))),
        "image_edit": compose_task(
            Task.IMAGE_EDIT, [seen(image), clean(image), "Make it red."], target(image)
        ),
        "video_edit": compose_task(Task.VIDEO_EDIT, [seen(clip), clean(clip), "Make it red."], target(clip)),
        "edit_again": compose_task(Task.IMAGE_EDIT, ["Make it blue."], target(image), history=past),
        "subject": compose_task(Task.SUBJECT_IMAGE, [*two, "Both of them."], target((1, 3, 3))),
        "question": compose_task(Task.X2T_IMAGE, [seen(image), "What colour?"], "It is red."),
        "two_clips": compose_task(
            Task.X2T_VIDEO, ["First", seen(clip), "then", seen((3, 1, 1), seed=4), "?"], "A circle."
        ),
        "chat": compose_task(Task.CHAT, ["Hello."], "You are helpful."),
    }
    return found


GENERATING = ("t2i", "t2v", "i2v", "first_and_last", "image_edit", "video_edit", "edit_again", "subject")


def question(*messages: Message) -> Sample:
    """A conversation whose answer is to come."""
    return build(messages, tokenizer().encode_with_offsets, open_turn=True)
