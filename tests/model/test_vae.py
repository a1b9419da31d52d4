"""The VAE: names, shapes, errors. Its numbers are held to the released ones in tests/parity."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from openlance.config import VAEConfig, nano
from openlance.errors import InputError
from openlance.model.vae import VAE, CausalConv, released_names

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
