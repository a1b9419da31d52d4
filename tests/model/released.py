"""A tiny release to test with, and what spoils or compares one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from openlance.config import (
    BackboneConfig,
    MaPEConfig,
    ModelConfig,
    SamplingConfig,
    Sizes,
    VAEConfig,
    VisionConfig,
)
from openlance.model.checkpoint import find_release, load_model, read_config, save_pretrained
from openlance.model.lance import Lance
from openlance.model.vae import VAE
from openlance.tokenizer import Tokenizer

TINY = ModelConfig(
    name="tiny",
    backbone=BackboneConfig(
        hidden=32, layers=2, heads=2, kv_heads=1, mlp=48, vocab=300, norm_eps=1e-5, rope_base=1e4,
        rope_sections=(2, 3, 3),
    ),
    vision=VisionConfig(
        depth=2, hidden=32, heads=2, mlp=48, out_hidden=32, window=56, full_attention_layers=(1,)
    ),
    vae=VAEConfig(
        channels=4, base=2, decoder_base=4, residual_blocks=1,
        mean=(0.0, 0.5, 1.0, -1.0), std=(1.0, 2.0, 3.0, 4.0),
    ),
    mape=MaPEConfig(vit=100, reference=200, shift_understanding=True),
    sampling=SamplingConfig(steps=7, guidance_interval=(0.25, 0.75), visual_guidance=1.5),
    sizes=Sizes(image=112, fps=8.0),
    system_prompts={"image": "Draw «it»."},
    max_latent_side=16,
    max_frames=33,
)  # fmt: skip
MODEL = "Lance_3B/model.safetensors"
VIT = "Qwen2.5-VL-ViT/vit.safetensors"
NORM = "language_model.model.layers.1.input_layernorm_moe_gen.weight"


@dataclasses.dataclass(frozen=True, eq=False)
class Tiny:
    config: ModelConfig
    model: Lance
    vae: VAE
    tokenizer: Tokenizer

    def save(self, folder: Path, **changes) -> None:
        parts = {"model": self.model, "vae": self.vae, "tokenizer": self.tokenizer, "config": self.config}
        save_pretrained(folder, **(parts | changes))


def load(folder: Path, **options) -> Lance:
    release = find_release(folder)
    return load_model(release, read_config(release), **options)


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def change_json(path: Path, edit: Callable[[dict], object]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    edit(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def assert_same(first: torch.nn.Module, second: torch.nn.Module) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
