"""Sequences of every generation case, built from the source media: all of it equal to the released."""

from __future__ import annotations

import torch
from golden_case import Case, groups, in_order, mask_in_order, unpack_bits

from openlance.sequence.mask import dense_mask
from openlance.sequence.pack import pack, token_ids
from openlance.sequence.positions import mape_positions, rope_positions
from openlance.sequence.segment import Role, without


def test_tokens(generation: Case) -> None:
    expected = generation.sequence
    ids = token_ids(generation.sample, generation.pipeline.config)
    assert torch.equal(ids, expected["packed_text_ids"])
    assert torch.equal(groups(generation.sample), expected["sample_modality"])


def test_size_of_the_target(generation: Case) -> None:
    frames, rows, columns = generation.sample[-2].grid
    asked = generation.asked
    size = (asked["effective_num_frames"], asked["effective_H"], asked["effective_W"])
    assert ((frames - 1) * 4 + 1, rows * 16, columns * 16) == size


def test_experts_and_places(generation: Case) -> None:
    expected, batch = generation.sequence, generation.batch
    und, gen = batch.place[: batch.und], batch.place[batch.und :]
    assert torch.equal(und.sort().values, expected["und_token_indexes"].sort().values)
    assert torch.equal(gen, expected["packed_vae_token_indexes"])
    assert torch.equal(und[batch.text_index], expected["packed_text_indexes"])
    if len(batch.vit_index) or "packed_vit_token_indexes" in expected:
        assert torch.equal(und[batch.vit_index], expected["packed_vit_token_indexes"])
    assert torch.equal(gen[batch.denoised], expected["mse_loss_indexes"])
    assert torch.equal(torch.nonzero(batch.denoised).flatten(), expected["mse_in_vae"])
    side = generation.pipeline.config.max_latent_side
    flat = batch.latent_grid.T @ torch.tensor([side * side, side, 1])
    assert torch.equal(flat, expected["packed_latent_position_ids"])


def test_positions(generation: Case) -> None:
    expected, sample = generation.sequence, generation.sample
    assert torch.equal(torch.cat(rope_positions(sample), dim=1), expected["position_ids_before_shift"])
    moved = mape_positions(sample, generation.pipeline.config.mape)
    assert torch.equal(torch.cat(moved, dim=1), expected["position_ids"])
    assert torch.equal(in_order(generation.batch, generation.batch.positions), expected["position_ids"])


def test_mask(generation: Case) -> None:
    batch = generation.batch
    expected = unpack_bits(generation.sequence["mask_cond_packbits"], batch.tokens)
    assert torch.equal(mask_in_order(batch, dense_mask(batch.visibility)), expected)
    ((rows,), (mask,)) = batch.rows, batch.masks
    assert torch.equal(batch.place[rows[0]], torch.arange(batch.tokens))
    assert torch.equal(mask[0], expected)


def test_guidance_sequence(generation: Case) -> None:
    """The sequence without the user's words, its positions computed afresh."""
    expected, config = generation.sequence, generation.pipeline.config
    sample = without(generation.sample, Role.USER)
    kept = torch.cat([torch.full((len(s),), s.role is not Role.USER) for s in generation.sample])
    assert torch.equal(kept, expected["uncond_select_mask"].bool())
    assert torch.equal(token_ids(sample, config), expected["uncond_text_ids"])
    before = torch.cat(rope_positions(sample), dim=1)
    assert torch.equal(before, expected["uncond_position_ids_before_shift"])
    batch = pack([sample], config)
    assert torch.equal(in_order(batch, batch.positions), expected["uncond_position_ids"])
    mask = mask_in_order(batch, dense_mask(batch.visibility))
    assert torch.equal(mask, unpack_bits(expected["mask_uncond_packbits"], batch.tokens))
    und, gen = batch.place[: batch.und], batch.place[batch.und :]
    assert torch.equal(und.sort().values, expected["uncond_und_token_indexes"].sort().values)
    assert torch.equal(gen, expected["uncond_gen_token_indexes"])
