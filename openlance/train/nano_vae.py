"""Train nano's VAE on pictures of the world, then on clips, on one CPU core, in minutes.

A loss weighted towards the shapes, hardly any KL, crops around the shapes, and Muon: together they learn in
minutes what a plain L1 loss does not learn at all.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from openlance.config import VAEConfig, nano
from openlance.model.vae import VAE
from openlance.train.muon import Muon, split_parameters
from openlance.train.timed import TimedRun, set_rate
from openlance.world import (
    MOTIONS,
    TEXTURES,
    WORDS,
    Scene,
    Text,
    Thing,
    WorldConfig,
    render,
    render_clip,
    sample_scene,
)
from openlance.world.render import placed
from openlance.world.scene import cell, pick

SIDE = nano().sizes.image  # pixels of a whole picture
CROP = 48  # pixels of a crop around a shape
FOREGROUND = 4.0  # how much more a pixel of a shape weighs than one of the ground
KL = 1e-5
LATER = 0.05  # keeps latents of later frames as small as those of the first, which is a picture's
RATE_MATRICES, RATE_REST = 0.02, 2e-3

Optimizers = tuple[Muon, torch.optim.AdamW]
Diet = tuple[tuple[float, WorldConfig], ...]
"""Kinds of pictures, with their shares."""

PLAIN = WorldConfig(max_things=3)
# What nano is to draw comes first; the rest has its share so that the VAE does not fail on it.
DIET = (
    (0.92, PLAIN),
    (0.06, dataclasses.replace(PLAIN, textures=TEXTURES[1:])),
    (0.02, dataclasses.replace(PLAIN, max_things=2, words=WORDS, text_share=1.0)),
)
# The decoder sees more textures; the latents do not move any more.
DECODED = tuple(zip((0.85, 0.10, 0.05), (world for _, world in DIET), strict=True))
DISTURBED = 0.25  # noise on the latents that the decoder learns from, at most, in their std
MOVING = dataclasses.replace(PLAIN, motions=MOTIONS)
SHOWN = {  # what the final table of PSNR is measured on
    "one": dataclasses.replace(PLAIN, max_things=1),
    "two": dataclasses.replace(PLAIN, count_weights=(0.0, 1.0, 0.0, 0.0)),
    "textured": DIET[1][1],
    "words": DIET[2][1],
}


def train_vae(
    run_dir: Path,
    minutes: float,
    seed: int = 0,
    threads: int = 1,
    config: VAEConfig | None = None,
) -> dict:
    """Train on pictures for `minutes` in all, going on from `run_dir/vae.pt` where it is.

    Writes `vae.safetensors` (names of `VAE.state_dict()`) and `vae.json` (configuration with the measured
    mean and std, PSNR in dB), and returns what `vae.json` holds.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    run_dir = Path(run_dir)
    vae = VAE(config or nano().vae)
    start_from_pictures(vae)
    optimizers = _optimizers(*split_parameters(vae))
    parts = {"vae": vae, "muon": optimizers[0], "adamw": optimizers[1]}
    run = TimedRun(run_dir / "vae.pt", minutes, parts, np.random.default_rng(seed))
    for progress in run.progress():
        whole = progress > 0.85 and run.step % 4 == 0
        pixels, weight = batch(run.rng, 1, 8 if whole else 16, SIDE if whole else CROP)
        learn(*losses(vae, pixels, weight), optimizers, run, progress)
    mean, std = statistics(vae)
    config = dataclasses.replace(vae.config, mean=mean, std=std)
    return finish(vae, config, run_dir, run)


def train_clips(run_dir: Path, minutes: float, seed: int = 0, threads: int = 1) -> dict:
    """Teach a VAE that knows pictures motion, for `minutes` in all, going on from `run_dir/clips.pt`.

    The decoder goes on learning, on pictures too; of the encoder learns only what pictures do not use, so
    that their latents stay bit for bit. `train_decoder` comes after it. Reads and rewrites
    `vae.safetensors` and `vae.json` in `run_dir`; the mean and std stay.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    vae = _trained(run_dir)
    hold_latents(vae)
    optimizers = _optimizers(*split_parameters(vae))
    parts = {"vae": vae, "muon": optimizers[0], "adamw": optimizers[1]}
    run = TimedRun(run_dir / "clips.pt", minutes, parts, np.random.default_rng(seed))
    for progress in run.progress():
        if run.step % 3 == 0:
            found = decoded(vae, run)
        else:
            found = losses(vae, *batch(run.rng, *((9, 2) if run.step % 3 == 1 else (5, 3)), CROP))
        learn(*found, optimizers, run, progress)
    return finish(vae, vae.config, run_dir, run)


def train_decoder(run_dir: Path, minutes: float, seed: int = 0, threads: int = 1) -> dict:
    """Teach the decoder alone to draw sharply, for `minutes` in all, going on from `run_dir/decoder.pt`.

    All latents stay bit for bit, so a model may train on them meanwhile. Reads and rewrites
    `vae.safetensors` and `vae.json` in `run_dir`.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    vae = _trained(run_dir)
    for half in (vae.net.encoder, vae.net.quant_conv):
        half.requires_grad_(False)
    optimizers = _optimizers(*split_parameters(vae))
    parts = {"vae": vae, "muon": optimizers[0], "adamw": optimizers[1]}
    run = TimedRun(run_dir / "decoder.pt", minutes, parts, np.random.default_rng(seed))
    for progress in run.progress():
        clip = run.step % 4 == 3
        learn(*decoded(vae, run, clip=clip), optimizers, run, progress)
    return finish(vae, vae.config, run_dir, run)


def decoded(vae: VAE, run: TimedRun, *, clip: bool = False) -> tuple[Tensor, float]:
    """As `losses`, of the decoder alone, on latents disturbed as those are that a model draws."""
    whole = run.step % 2 == 0
    frames, count = (9, 2) if clip else (1, 6 if whole else 16)
    pixels, weight = batch(run.rng, frames, count, SIDE if whole and not clip else CROP, DECODED)
    with torch.no_grad():
        latents = vae.posterior(pixels)[0]
        strength = DISTURBED * vae.config.std[0] * torch.rand(len(latents), 1, 1, 1, 1)
        latents = latents + strength * torch.randn_like(latents)
    return distance(vae.reconstruct(latents), pixels, weight)


def learn(loss: Tensor, error: float, optimizers: Optimizers, run: TimedRun, progress: float) -> None:
    """One step of both optimisers. error: mean squared, to be reported."""
    loss.backward()
    for optimizer, rate in zip(optimizers, (RATE_MATRICES, RATE_REST), strict=True):
        set_rate(optimizer, rate, progress)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    run.report(loss=loss.item(), psnr=_decibels(error))


def _optimizers(matrices: list[Tensor], rest: list[Tensor]) -> Optimizers:
    return Muon(matrices, lr=RATE_MATRICES), torch.optim.AdamW(rest, lr=RATE_REST, weight_decay=0.0)


def losses(vae: VAE, pixels: Tensor, weight: Tensor) -> tuple[Tensor, float]:
    """(loss, mean squared error) of pixels [B, 3, T, H, W] in [-1, 1] with weights [B, 1, T, H, W]."""
    batch, _, frames, height, width = pixels.shape
    noise = torch.randn(batch, 48, (frames - 1) // 4 + 1, height // 16, width // 16)
    mean, logvar = vae.posterior(pixels)
    apart, squared = distance(vae.reconstruct(mean + noise * torch.exp(0.5 * logvar)), pixels, weight)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    loss = apart + KL * kl
    if frames > 1:
        first, later = mean[:, :, :1].detach(), mean[:, :, 1:]
        loss = loss + LATER * later.square().mean() / first.square().mean()
    return loss, squared


def distance(decoded: Tensor, pixels: Tensor, weight: Tensor) -> tuple[Tensor, float]:
    """(weighted L1 and squared error, mean squared error), shapes as in `losses`."""
    difference = decoded - pixels
    squared = difference.square()
    return (weight * (difference.abs() + squared)).mean() / weight.mean(), squared.mean().item()


def batch(
    rng: np.random.Generator, frames: int, count: int, side: int, diet: Diet = DIET
) -> tuple[Tensor, Tensor]:
    """`count` pictures or clips of the world, and their weights, as in `losses`."""
    drawn = [draw(rng, frames, side, diet) for _ in range(count)]
    pixels = torch.stack([_pixels(picture) for picture, _ in drawn])
    shapes = torch.stack([torch.from_numpy(mask) for _, mask in drawn]).float()
    near = F.max_pool2d(shapes, 5, stride=1, padding=2)
    return pixels, 1 + FOREGROUND * near[:, None]


def draw(
    rng: np.random.Generator, frames: int, side: int, diet: Diet = DIET
) -> tuple[np.ndarray, np.ndarray]:
    """A picture or clip uint8 [T, side, side, 3], cropped around a shape, and where its shapes are."""
    config = MOVING if frames > 1 else diet[rng.choice(len(diet), p=[share for share, _ in diet])][1]
    scene = sample_scene(rng, config)
    clip = render_clip(scene, frames, SIDE)
    ground = render(Scene(scene.ground, scene.texture), SIDE).astype(np.int16)
    shapes = np.any(np.abs(clip - ground) > 8, axis=-1, keepdims=True)[..., 0]
    if side == SIDE:
        return clip, shapes
    middle = np.array(_middle(pick(rng, scene.parts), rng))
    top, left = np.clip(middle - side // 2 + rng.integers(-16, 17, size=2), 0, SIDE - side)
    area = (slice(None), slice(top, top + side), slice(left, left + side))
    return clip[area], shapes[area]


def _middle(part: Thing | Text, rng: np.random.Generator) -> tuple[int, int]:
    """Row and column of a thing at some time, or of some letter of a word, in pixels. So small things are
    seen as often as large ones, though they have fewer pixels."""
    if isinstance(part, Text):
        return int(SIDE * (cell(part.place)[1] + 0.5) / 3), int(rng.integers(SIDE))
    x, y, _ = placed(part, SIDE, SIDE, rng.random())
    return int(y), int(x)


def start_from_pictures(vae: VAE) -> None:
    """Begin with a network that treats a clip frame by frame.

    Pictures train the last time slice of each convolution only. The slices for earlier frames start at
    zero, and the convolutions that halve or double time start as copies, so that clips profit from pictures.
    """
    with torch.no_grad():
        for name, module in vae.named_modules():
            if isinstance(module, wan.WanCausalConv3d) and module.kernel_size[0] > 1:
                module.weight[:, :, :-1] = 0
                if name.endswith("time_conv"):
                    module.bias.zero_()
                    eye = torch.eye(module.in_channels).repeat(module.out_channels // module.in_channels, 1)
                    module.weight[:, :, -1] = eye[:, :, None, None]


def hold_latents(vae: VAE) -> None:
    """Freeze all of the encoder that one picture uses.

    What is left there: the earlier time slices of every causal convolution, and the convolutions that halve
    time.
    """
    for half in (vae.net.encoder, vae.net.quant_conv):
        half.requires_grad_(False)
    for name, module in vae.net.encoder.named_modules():
        if isinstance(module, wan.WanCausalConv3d) and module.kernel_size[0] > 1:
            module.weight.requires_grad_(True)
            if name.endswith("time_conv"):
                module.bias.requires_grad_(True)
            else:
                module.weight.register_hook(_without_last_slice)


def _without_last_slice(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[:, :, -1] = 0
    return gradient


@torch.no_grad()
def statistics(vae: VAE) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of the latents of pictures, one number each for all channels (better than many)."""
    rng = np.random.default_rng(10**6)
    latents = vae.posterior(batch(rng, 1, 64, SIDE)[0])[0]
    channels = vae.config.channels
    return (round(latents.mean().item(), 5),) * channels, (round(latents.std().item(), 5),) * channels


def _trained(run_dir: Path) -> VAE:
    vae = VAE(read_vae_config(run_dir))
    vae.load_state_dict(load_file(run_dir / "vae.safetensors"))
    return vae


def read_vae_config(run_dir: Path) -> VAEConfig:
    """The configuration that training wrote to `run_dir/vae.json`."""
    found: dict[str, Any] = json.loads((run_dir / "vae.json").read_text())["config"]
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
    return VAEConfig(**values)


def write_vae_config(config: VAEConfig, run_dir: Path, **measured: Any) -> None:
    """Write `run_dir/vae.json`: the configuration, and what was measured."""
    result = {"config": dataclasses.asdict(config), **measured}
    (run_dir / "vae.json").write_text(json.dumps(result, indent=1))


@torch.no_grad()
def finish(vae: VAE, config: VAEConfig, run_dir: Path, run: TimedRun) -> dict:
    """Measure reconstruction, and write weights, configuration and measurements."""
    psnr = {name: _psnr(vae, world, 1, 48) for name, world in SHOWN.items()}
    psnr["two, latents with noise of 0.1 std"] = _psnr(vae, SHOWN["two"], 1, 48, noise=0.1 * config.std[0])
    psnr["clip"] = _psnr(vae, MOVING, 9, 6)
    state = {name: value.contiguous() for name, value in vae.state_dict().items()}
    save_file(state, run_dir / "vae.safetensors")
    write_vae_config(
        config,
        run_dir,
        parameters=sum(p.numel() for p in vae.parameters()),
        psnr={name: round(value, 2) for name, value in psnr.items()},
        steps=run.step,
        minutes=round(run.seconds / 60, 1),
    )
    return json.loads((run_dir / "vae.json").read_text())


def _psnr(vae: VAE, world: WorldConfig, frames: int, count: int, noise: float = 0.0) -> float:
    """PSNR in dB of `count` reconstructions of scenes drawn afresh, with noise of that std on the latents."""
    rng, generator = np.random.default_rng(10**7), torch.Generator().manual_seed(0)
    errors = []
    for _ in range(count):
        pixels = _pixels(render_clip(sample_scene(rng, world), frames, SIDE))[None]
        latents = vae.posterior(pixels)[0]
        latents = latents + noise * torch.randn(latents.shape, generator=generator)
        decoded = vae.reconstruct(latents).clamp(-1, 1)
        errors.append((decoded - pixels).square().mean().item())
    return _decibels(sum(errors) / count)


def _decibels(squared_error: float) -> float:
    return -10 * math.log10(squared_error / 4)  # pixels span 2


def _pixels(clip: np.ndarray) -> Tensor:
    """uint8 [T, H, W, 3] -> float32 [3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(clip)).permute(3, 0, 1, 2).float() / 127.5 - 1
