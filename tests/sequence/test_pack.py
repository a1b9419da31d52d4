"""Samples into one batch: sorted by expert, nothing lost, no token in the wrong place."""

from __future__ import annotations

import pytest
import torch
from tiny import CHANNELS, GENERATING, compose_task, config, samples, seen, target

from openlance.sequence.mask import dense_mask
from openlance.sequence.pack import pack, token_ids
from openlance.sequence.segment import Kind, Role, Segment
from openlance.sequence.template import Task

ALL = list(samples().values())


def test_und_tokens_come_first_each_half_in_order() -> None:
    batch = pack(ALL, config())
    und, gen = batch.place[: batch.und], batch.place[batch.und :]
    assert bool((und.diff() > 0).all()) and bool((gen.diff() > 0).all())
    assert torch.equal(batch.place.sort().values, torch.arange(batch.tokens))
    served = [s.generative for sample in ALL for s in sample for _ in range(s.inner)]
    assert len(gen) == sum(served) == len(batch.latents) == len(batch.times) == len(batch.denoised)


def test_every_text_token_is_there_and_vision_has_markers() -> None:
    batch = pack(ALL, config())
    ids = torch.cat([token_ids(sample, config()) for sample in ALL])
    assert torch.equal(batch.text_ids, ids[batch.place[: batch.und]][batch.text_index])
    pads = (ids == config().tokens.video_pad).sum()
    assert len(batch.vit_index) + len(batch.latents) == pads
    assert len(batch.text_index) + len(batch.vit_index) == batch.und
    marks = (config().tokens.vision_start, config().tokens.vision_end)
    visual = sum(s.visual for sample in ALL for s in sample)
    assert all((batch.text_ids == mark).sum() == visual for mark in marks)


def test_times_fall_on_what_is_denoised_only() -> None:
    given = [samples()[name] for name in ("i2v", "first_and_last", "image_edit")]
    batch = pack(given, config(), times=[0.25, 0.5, 0.75])
    frame, image = 4, 6  # tokens of a frame of i2v, and of the picture
    expected = [0.0] * frame + [0.25] * 2 * frame
    expected += [0.0] * frame + [0.5] * frame + [0.0] * frame
    expected += [0.0] * image + [0.75] * image
    assert batch.times.tolist() == expected
    assert torch.equal(batch.denoised, batch.times > 0)


def test_latents_stand_as_given_and_absent_ones_are_zero() -> None:
    bare = Segment(Kind.NOISY, Role.TARGET, grid=(1, 2, 2))
    batch = pack([samples()["image_edit"], [bare]], config())
    given = [s.latents.flatten(0, 2) for s in samples()["image_edit"] if s.generative]
    assert torch.equal(batch.latents, torch.cat([*given, torch.zeros(4, CHANNELS)]))


def test_answers_are_predicted_from_the_token_before() -> None:
    given = [samples()["question"], samples()["t2i"], samples()["chat"]]
    batch = pack(given, config())
    ids = torch.cat([token_ids(sample, config()) for sample in given])
    before = batch.place[batch.answer_index]
    assert torch.equal(ids[before + 1], batch.answer_labels)
    answers = [s.ids for sample in given for s in sample if s.role is Role.ANSWER]
    assert torch.equal(batch.answer_labels, torch.cat(answers))
    assert batch.answer_labels[-1] == config().tokens.im_end  # the model learns to stop


def test_rows_hold_each_sample_once_with_its_own_mask() -> None:
    batch = pack(ALL, config())
    assert 1 < len(batch.rows) < len(ALL)  # samples of like length share a group
    whole = dense_mask(batch.visibility)
    found = torch.zeros_like(whole)
    for rows, masks in zip(batch.rows, batch.masks, strict=True):
        for row, mask in zip(rows, masks, strict=True):
            real = row < batch.tokens
            found[row[real][:, None], row[real][None]] = mask[real][:, real]
            assert not mask[real][:, ~real].any()  # nobody sees padding
            assert bool(mask.any(1).all())  # and no row is empty, which would give NaN
    assert torch.equal(found, whole)
    listed = torch.cat([row[row < batch.tokens] for rows in batch.rows for row in rows])
    assert torch.equal(listed.sort().values, torch.arange(batch.tokens))


@pytest.mark.parametrize("columns", [(3, 2), (2, 3)])
def test_padding_is_seen_by_nobody(columns: tuple[int, int]) -> None:
    """Whichever of a group is the shorter one: padding stands for no token, not for the batch's last."""
    batch = pack([compose_task(Task.T2I, ["It."], target((1, 2, n))) for n in columns], config())
    ((rows,), (masks,)) = batch.rows, batch.masks
    real = rows < batch.tokens
    assert not real.all()
    assert not (masks & real[:, :, None] & ~real[:, None, :]).any()


def test_no_mask_unless_it_is_asked_for() -> None:
    batch = pack(ALL, config(), dense=False)
    assert batch.rows == () and batch.masks == ()
    largest = max(t.numel() for t in vars(batch).values() if isinstance(t, torch.Tensor))
    assert largest <= batch.tokens * CHANNELS


def test_features_take_the_place_of_patches() -> None:
    batch = pack([samples()["two_clips"]], config())
    views = [s for s in samples()["two_clips"] if s.kind is Kind.VIT]
    assert batch.patches is None
    assert torch.equal(batch.features, torch.cat([view.features for view in views]))
    bare = Segment(Kind.VIT, Role.SOURCE, grid=(1, 1, 1))
    with pytest.raises(AssertionError, match="patches"):
        pack([[seen((1, 1, 1)), bare]], config())


def test_moving_keeps_times_exact() -> None:
    batch = pack([samples()["t2i"]], config(), times=[0.3]).to("cpu", torch.bfloat16)
    assert (batch.latents.dtype, batch.times.dtype) == (torch.bfloat16, torch.float32)
    assert batch.positions.dtype == batch.text_ids.dtype == torch.long


@pytest.mark.parametrize("name", GENERATING)
def test_pieces_with_given_positions_are_the_whole(name: str) -> None:
    """What inference does: segments packed one at a time, at the positions of the whole."""
    from openlance.sequence.positions import mape_positions

    sample = samples()[name]
    whole = pack([sample], config())
    placed = mape_positions(sample, config().mape)
    pieces = [
        pack([[s]], config(), positions=[[p]], dense=False) for s, p in zip(sample, placed, strict=True)
    ]
    und = torch.cat([piece.positions[:, : piece.und] for piece in pieces], dim=1)
    gen = torch.cat([piece.positions[:, piece.und :] for piece in pieces], dim=1)
    assert torch.equal(whole.positions, torch.cat([und, gen], dim=1))
    assert torch.equal(whole.latents, torch.cat([piece.latents for piece in pieces]))
    assert torch.equal(whole.latent_grid, torch.cat([piece.latent_grid for piece in pieces], dim=1))


def test_target_without_latents_is_still_packed() -> None:
    batch = pack([[Segment(Kind.NOISY, Role.TARGET, grid=target((2, 1, 1)).grid)]], config())
    assert batch.latent_grid.tolist() == [[0, 1], [0, 0], [0, 0]]
