"""Multimodal positions and MaPE's offsets, on sequences small enough to count by hand."""

from __future__ import annotations

from dataclasses import replace

import torch
from tiny import clean, samples, seen, target

from openlance.config import MaPEConfig
from openlance.sequence.positions import mape_positions, rope_positions
from openlance.sequence.segment import Kind, Role, Sample, Segment, without

MAPE = MaPEConfig(vit=100, reference=200)


def text(length: int, role: Role = Role.TEMPLATE) -> Segment:
    return Segment(Kind.TEXT, role, torch.zeros(length, dtype=torch.long))


def joined(placed: list[torch.Tensor]) -> list[list[int]]:
    return torch.cat(placed, dim=1).tolist()


def test_text_then_picture_then_text() -> None:
    sample = [text(2), seen((1, 1, 2)), text(1)]
    assert joined(rope_positions(sample)) == [
        [0, 1, 2, 3, 3, 5, 6],
        [0, 1, 2, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 5, 6],
    ]


def test_frames_are_two_apart() -> None:
    placed = rope_positions([seen((3, 1, 1)), text(1)])
    assert joined(placed)[0] == [0, 1, 3, 5, 6, 7]
    assert joined(placed)[1] == [0, 1, 1, 1, 6, 7]


def test_words_after_vision_go_on_from_the_largest_axis() -> None:
    placed = rope_positions([seen((1, 7, 2)), text(1)])
    assert int(placed[0].max()) == 8 and placed[1].tolist() == [[9]] * 3


def test_only_the_temporal_axis_of_a_group_moves_and_distances_stay() -> None:
    sample = samples()["subject"]
    before, after = rope_positions(sample), mape_positions(sample, MAPE)
    starts: dict[Kind, int] = {}
    for segment, old, new in zip(sample, before, after, strict=True):
        assert torch.equal(old[1:], new[1:])
        origin = {Kind.VIT: 100, Kind.CLEAN: 200}.get(segment.kind)
        if origin is None:
            assert torch.equal(old, new)
            continue
        first = starts.setdefault(segment.kind, int(old[0, 0]))
        assert torch.equal(new[0], old[0] - first + origin)
    assert starts.keys() == {Kind.VIT, Kind.CLEAN}


def test_an_edit_stands_where_its_source_stands() -> None:
    sample = samples()["video_edit"]
    after = mape_positions(sample, MAPE)
    (source,) = (i for i, s in enumerate(sample) if s.kind is Kind.CLEAN)
    (edited,) = (i for i, s in enumerate(sample) if s.kind is Kind.NOISY)
    assert torch.equal(after[edited], after[source])
    assert torch.equal(after[source], rope_positions(sample)[source])  # a source is not moved


def test_an_edit_of_an_edit_stands_where_the_last_one_stands() -> None:
    sample = samples()["edit_again"]
    after = mape_positions(sample, MAPE)
    sources = [i for i, s in enumerate(sample) if s.kind is Kind.CLEAN]
    assert len(sources) == 2
    assert torch.equal(after[-2], after[sources[-1]])
    assert not torch.equal(after[-2], after[sources[0]])


def test_a_target_of_another_size_stays() -> None:
    sample = [text(1), clean((1, 2, 2)), target((1, 2, 3))]
    assert joined(mape_positions(sample, MAPE)) == joined(rope_positions(sample))


def test_whether_understanding_moves_belongs_to_the_checkpoint() -> None:
    sample = samples()["question"]
    (vit,) = (i for i, s in enumerate(sample) if s.kind is Kind.VIT)
    assert joined(mape_positions(sample, MAPE)) == joined(rope_positions(sample))
    moved = mape_positions(sample, replace(MAPE, shift_understanding=True))
    assert int(moved[vit][0, 0]) == 100
    assert torch.equal(moved[vit + 1], rope_positions(sample)[vit + 1])


def test_guidance_has_positions_of_its_own() -> None:
    """Without the user's words, what follows moves up; the released cached sampler leaves a gap."""
    sample: Sample = samples()["t2i"]
    short = without(sample, Role.USER)
    placed = mape_positions(short, MAPE)
    assert joined(placed)[0] == joined(rope_positions(short))[0]
    words = sum(len(s) for s in sample if s.role is Role.USER)
    assert int(mape_positions(sample, MAPE)[-2][0, 0]) - int(placed[-2][0, 0]) == words > 0
