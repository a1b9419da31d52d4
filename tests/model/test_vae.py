"""The VAE: names, shapes, errors; numbers against another implementation where golden data is at hand."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from openlance.config import VAEConfig, nano
from openlance.errors import InputError
from openlance.model.vae import VAE, CausalConv, released_names

ATOL = 1e-4  # float32, other order of operations
GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
TINY = VAEConfig(base=2, decoder_base=4)


@pytest.fixture(scope="module")
def tiny() -> VAE:
    torch.manual_seed(0)
    return VAE(TINY).eval()


@pytest.mark.parametrize("config", [TINY, VAEConfig(), nano().vae], ids=["tiny", "real", "nano"])
def test_names_are_one_to_one(config: VAEConfig):
    table = released_names(config)
    with torch.device("meta"):
        names = set(VAE(config).state_dict())
    assert set(table.values()) == names and len(table) == len(names)


def test_normalisation_is_undone(tiny: VAE):
    latents = torch.randn(1, 2, 2, 1, 48, generator=torch.Generator().manual_seed(0))
    raw = latents * torch.tensor(TINY.std) + torch.tensor(TINY.mean)
    torch.testing.assert_close(
        tiny.decode(latents, clamp=False), tiny.reconstruct(raw.permute(0, 4, 1, 2, 3)), atol=0, rtol=0
    )
    plain = VAE(dataclasses.replace(TINY, mean=(0.0,) * 48, std=(1.0,) * 48))
    plain.load_state_dict(tiny.state_dict())
    pixels = torch.rand(1, 3, 5, 32, 16) * 2 - 1
    expected = (plain.encode(pixels) - torch.tensor(TINY.mean)) / torch.tensor(TINY.std)
    torch.testing.assert_close(tiny.encode(pixels), expected, atol=0, rtol=0)


def test_shapes_samples_and_the_range(tiny: VAE):
    pixels = torch.rand(2, 3, 9, 32, 48) * 2 - 1
    mean = tiny.encode(pixels)
    assert mean.shape == (2, 3, 2, 3, 48)
    draws = [tiny.encode(pixels, sample=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], mean)
    decoded = tiny.decode(mean * 100)
    assert decoded.shape == pixels.shape and decoded.abs().max() <= 1


def test_the_first_frame_depends_on_itself_only(tiny: VAE):
    pixels = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    torch.testing.assert_close(tiny.encode(pixels)[:, :1], tiny.encode(pixels[:, :, :1]), atol=1e-5, rtol=0)


def test_one_frame_takes_the_last_time_slice():
    conv = CausalConv(3, 5, 3, padding=1)
    x = torch.randn(2, 3, 1, 6, 7)
    whole = F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), conv.weight, conv.bias)
    torch.testing.assert_close(conv(x), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "shape, message",
    [((1, 3, 4, 32, 32), "4 frames"), ((1, 3, 5, 32, 30), "32x30"), ((3, 5, 32, 32), "shape")],
)
def test_wrong_sizes_are_named(tiny: VAE, shape: tuple[int, ...], message: str):
    with pytest.raises(InputError, match=message):
        tiny.encode(torch.zeros(shape))


@pytest.mark.skipif(not GOLDEN.exists(), reason="golden data not present")
@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_parity(frames: int):
    sizes = json.loads((GOLDEN / "checkpoint/Wan2.2_VAE.config.json").read_text())
    blocks = sizes["num_res_blocks"]
    config = VAEConfig(base=sizes["dim"], decoder_base=sizes["dec_dim"], residual_blocks=blocks)
    with torch.device("meta"):
        vae = VAE(config)
    released = load_file(GOLDEN / "checkpoint/Wan2.2_VAE.safetensors")
    vae.load_state_dict({ours: released[name] for name, ours in released_names(config).items()}, assign=True)
    assert set(released) == set(released_names(config))

    golden = load_file(GOLDEN / "modules/modules.safetensors")
    torch.testing.assert_close(torch.tensor(config.mean), golden["vae_scale_mean"], atol=1e-6, rtol=0)
    torch.testing.assert_close(1 / torch.tensor(config.std), golden["vae_scale_inv_std"], atol=1e-5, rtol=0)
    pixels = (golden[f"vae_{frames}_in_u8"].float() / 255 - 0.5)[None] / 0.5
    expected = golden[f"vae_{frames}_mu_czthw"].permute(1, 2, 3, 0)[None]
    with torch.no_grad():
        torch.testing.assert_close(vae.encode(pixels), expected, atol=ATOL, rtol=0)
        logvar = vae.posterior(pixels)[1][0]
        torch.testing.assert_close(logvar, golden[f"vae_{frames}_logvar_czthw"], atol=ATOL, rtol=0)
        decoded = vae.decode(expected, clamp=False)[0][:, golden[f"vae_{frames}_decoded_frames"]]
    torch.testing.assert_close(decoded, golden[f"vae_{frames}_decoded_unclamped"], atol=ATOL, rtol=0)
