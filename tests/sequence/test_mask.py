"""Who sees whom, stated segment by segment."""

from __future__ import annotations

import pytest
import torch
from tiny import clean, compose_task, config, samples, seen, target

from openlance.sequence.mask import dense_mask, visible
from openlance.sequence.pack import pack
from openlance.sequence.segment import Kind, Sample
from openlance.sequence.template import Task


def mask_of(*given: Sample) -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
    """The mask in the order of the sequence, and each segment's (sample, start, end)."""
    batch = pack(list(given), config())
    mask = torch.empty(batch.tokens, batch.tokens, dtype=torch.bool)
    mask[batch.place[:, None], batch.place[None]] = dense_mask(batch.visibility)
    spans, start = [], 0
    for number, sample in enumerate(given):
        for segment in sample:
            spans.append((number, start, start + len(segment)))
            start += len(segment)
    return mask, spans


@pytest.mark.parametrize("name", list(samples()))
def test_segments_see_what_the_rule_says(name: str) -> None:
    """Text is causal, a visual segment sees itself whole, and a noisy one is seen by nobody else."""
    other = samples()["t2i"]
    given = [other, samples()[name]]
    mask, spans = mask_of(*given)
    segments = [segment for sample in given for segment in sample]
    for query, (sample, start, end) in zip(segments, spans, strict=True):
        for key, (its_sample, its_start, its_end) in zip(segments, spans, strict=True):
            block = mask[start:end, its_start:its_end]
            if sample != its_sample or its_start > start:
                assert not block.any()
            elif query is key and query.visual:
                assert block.all()
            elif query is key:
                assert torch.equal(block, torch.ones_like(block).tril())
            else:
                assert block.all() if key.kind is not Kind.NOISY else not block.any()


def test_markers_belong_to_their_segment() -> None:
    sample = compose_task(Task.IMAGE_EDIT, [seen((1, 2, 2)), clean((1, 1, 2)), "x"], target((1, 1, 2)))
    mask, spans = mask_of(sample)
    _, start, end = spans[1]
    assert mask[start, end - 1] and mask[end - 1, start]  # the opening marker sees the closing one
    _, start, end = spans[-2]
    assert not mask[end:, start:end].any()  # of a noisy segment, the markers too are hidden


def test_the_predicate_broadcasts() -> None:
    batch = pack([samples()["image_edit"]], config())
    q, k = torch.tensor([0, 5, batch.tokens - 1]), torch.tensor([3, 4, 0])
    assert torch.equal(visible(q, k, batch.visibility), dense_mask(batch.visibility)[q, k])
