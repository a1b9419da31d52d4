"""Nano's VAE: a short run writes what it promises, goes on where it stopped, and treats clips well."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from openlance.config import VAEConfig
from openlance.model.vae import VAE
from openlance.train.muon import Muon, orthogonal, split_parameters
from openlance.train.nano_vae import (
    SIDE,
    batch,
    start_from_pictures,
    train_clips,
    train_decoder,
    train_vae,
)
from openlance.train.timed import TimedRun

TINY = VAEConfig(base=2, decoder_base=2, residual_blocks=1, mean=(0.0,) * 48, std=(1.0,) * 48)


@pytest.mark.slow
def test_pictures_then_clips(tmp_path: Path):
    """Each writes weights and measurements; clips leave the latents of pictures as they were, the decoder
    all."""
    result = train_vae(tmp_path, 0.02, config=TINY)
    pictures = torch.rand(2, 3, 1, 32, 32) * 2 - 1
    before = read(tmp_path, result)
    assert result["steps"] and len(set(before.config.std)) == 1 and before.config.std[0] > 0
    assert {"one", "two", "textured", "words", "clip"} <= set(result["psnr"])

    result = train_clips(tmp_path, 0.02)
    after = read(tmp_path, result)
    assert result["steps"] and after.config == before.config
    assert torch.equal(after.encode(pictures), before.encode(pictures))
    clip = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    assert not torch.equal(after.encode(clip), before.encode(clip))

    result = train_decoder(tmp_path, 0.02)
    sharp = read(tmp_path, result)
    for shown in (pictures, clip):
        latents = after.encode(shown)
        assert torch.equal(sharp.encode(shown), latents)
        assert not torch.equal(sharp.decode(latents), after.decode(latents))


def read(run_dir: Path, result: dict) -> VAE:
    assert result == json.loads((run_dir / "vae.json").read_text())
    config = VAEConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in result["config"].items()})
    vae = VAE(config)
    vae.load_state_dict(load_file(run_dir / "vae.safetensors"))
    return vae


def test_a_run_goes_on_where_it_stopped(tmp_path: Path):
    weight = torch.nn.Linear(3, 3)
    parts = {"layer": weight, "muon": Muon(weight.parameters())}
    first = TimedRun(tmp_path / "run.pt", 1e-9, parts, np.random.default_rng(1))
    for _ in first.progress():
        first.rng.random(5)
    expected, torch_draw = first.rng.random(), torch.rand(1)
    again = TimedRun(tmp_path / "run.pt", 1e-9, parts, np.random.default_rng(2))
    assert again.step == first.step == 1 and again.seconds == first.seconds
    assert again.rng.random() == expected and torch.equal(torch.rand(1), torch_draw)
    assert list(again.progress()) == []


def test_a_fresh_network_treats_frames_alike():
    vae = VAE(TINY)
    start_from_pictures(vae)
    still = (torch.rand(1, 3, 1, 32, 32) * 2 - 1).expand(-1, -1, 9, -1, -1)
    decoded = vae.reconstruct(vae.posterior(still)[0])
    torch.testing.assert_close(
        decoded[:, :, 1:], decoded[:, :, 1:2].expand(-1, -1, 8, -1, -1), atol=1e-4, rtol=0
    )


def test_batches_weigh_the_shapes():
    rng = np.random.default_rng(0)
    for frames, count, side in ((1, 4, 48), (5, 2, 48), (9, 1, SIDE)):
        pixels, weight = batch(rng, frames, count, side)
        assert pixels.shape == (count, 3, frames, side, side) and weight.shape == (
            count,
            1,
            *pixels.shape[2:],
        )
        assert pixels.abs().max() <= 1 and set(weight.unique().tolist()) == {1.0, 5.0}


def test_muon_makes_matrices_orthogonal():
    for shape in ((8, 20), (20, 8)):
        values = torch.linalg.svdvals(
            orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        )
        assert values.min() > 0.5 and values.max() < 1.4  # the quintic's fixed band
    module = torch.nn.Conv3d(4, 6, 3)
    matrices, rest = split_parameters(module)
    assert [p.shape for p in matrices] == [module.weight.shape] and [p.shape for p in rest] == [(6,)]
    before = module.weight.detach().clone()
    module.weight.grad = torch.zeros_like(module.weight)
    module.weight.grad[:, :, -1] = torch.randn(6, 4, 3, 3)
    Muon(matrices).step()
    assert torch.equal(module.weight[:, :, :-1], before[:, :, :-1])
    assert not torch.equal(module.weight[:, :, -1], before[:, :, -1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_like_adamw_moves_each_weight_by_a_fifth_of_the_rate(dtype):
    """In the mean square, whatever the shape and the size of the gradient."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((64, 64), (32, 96), (96, 32))]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator) * 1e-3
    Muon(weights, lr=0.1, like_adamw=True, dtype=dtype).step()
    assert all(weight.dtype == torch.float32 for weight in weights)
    for weight in weights:
        assert weight.detach().square().mean().sqrt() == pytest.approx(0.02, rel=0.25)  # the quintic's band
