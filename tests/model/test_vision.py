"""The vision tower: names, rotary frequencies after moves, errors. Its numbers: see tests/parity."""

import pytest
import torch

from openlance.config import VisionConfig, nano
from openlance.errors import InputError
from openlance.model.vision import Vision, released_names

TINY = VisionConfig(depth=2, hidden=32, heads=2, mlp=48, out_hidden=16, window=56, full_attention_layers=(1,))


def patches_of(count: int) -> torch.Tensor:
    i, j = torch.arange(count)[:, None], torch.arange(1176)[None]
    return ((37 * i + 11 * j + (i * j) % 17) % 61 - 30) / 10


@pytest.mark.parametrize("config", [TINY, nano().vision], ids=["tiny", "nano"])
def test_names_are_one_to_one(config: VisionConfig):
    with torch.device("meta"):
        names = set(Vision(config).state_dict())
    assert set(released_names(config).values()) == names


def test_rotary_survives_every_way_of_getting_weights():
    built = Vision(TINY)
    frequencies = built.tower.rotary_pos_emb.inv_freq
    with torch.device("meta"):
        assigned, emptied = Vision(TINY), Vision(TINY)
    assigned.load_state_dict(built.state_dict(), assign=True)
    emptied.to_empty(device="cpu").load_state_dict(built.state_dict())
    grid = torch.tensor([[1, 4, 6]])
    expected = built(patches_of(24), grid)
    for module in (assigned, emptied):
        assert torch.equal(module.tower.rotary_pos_emb.inv_freq, frequencies)
        torch.testing.assert_close(module(patches_of(24), grid), expected, atol=0, rtol=0)
    assert torch.equal(built.to(torch.bfloat16).tower.rotary_pos_emb.inv_freq, frequencies)


def test_pictures_do_not_see_each_other():
    vision = Vision(TINY).eval()
    grids = torch.tensor([[1, 4, 6], [2, 4, 4]])
    x = patches_of(56)
    alone = torch.cat([vision(x[:24], grids[:1]), vision(x[24:], grids[1:])])
    torch.testing.assert_close(vision(x, grids), alone, atol=1e-5, rtol=0)


def test_wrong_grid_is_named():
    with pytest.raises(InputError, match=r"20 patches, but the grids .* hold 24"):
        Vision(TINY)(patches_of(20), torch.tensor([[1, 4, 6]]))
