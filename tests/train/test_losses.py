"""The two losses, against the formulas written out and against each sample alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import CHANNELS, build_network, config, network, noise, samples

from openlance.model.lance import Lance
from openlance.sequence.pack import PackedBatch, pack
from openlance.sequence.segment import Sample
from openlance.train.losses import Losses, losses
from openlance.train.settings import TrainConfig

ATOL = 1e-5  # float32, other order of operations; measured worst case 1e-6
RUN = TrainConfig(steps=1, ce_weight=0.25, mse_weight=2.0)
GIVEN = {"t2i": 0.9, "question": 0.5, "i2v": 0.3, "image_edit": 0.6, "chat": 0.1, "subject": 0.8}


def batch_of(*names: str) -> PackedBatch:
    given: list[Sample] = [samples()[name] for name in names]
    return pack(given, config(), times=[GIVEN[name] for name in names])


def noise_of(batch: PackedBatch) -> torch.Tensor:
    return noise(*batch.latents.shape, seed=7)


def find(*names: str, model: Lance | None = None, vocabulary: int | None = None) -> Losses:
    batch = batch_of(*names)
    return losses(model or network(), batch, RUN, noise_of(batch), vocabulary=vocabulary)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=0)


def test_formulas() -> None:
    batch = batch_of(*GIVEN)
    drawn = noise_of(batch)
    found = losses(network(), batch, RUN, drawn, vocabulary=320)
    mixed = torch.stack(
        [(1 - t) * clean + t * n for t, clean, n in zip(batch.times, batch.latents, drawn, strict=True)]
    )
    out = network()(batch, latents=mixed)
    errors = [
        sum((float(a) - float(b)) ** 2 for a, b in zip(velocity, n - clean, strict=True)) / CHANNELS
        for velocity, n, clean, counts in zip(out.velocity, drawn, batch.latents, batch.denoised, strict=True)
        if counts
    ]
    assert_near(found.mse, torch.tensor(errors))
    logits = network().head(out.hidden)[:, :320]
    words = [
        float(-logits[at].log_softmax(-1)[label])
        for at, label in zip(batch.answer_index, batch.answer_labels, strict=True)
    ]
    assert_near(found.ce, torch.tensor(words))
    expected = 0.25 * sum(words) / len(words) + 2.0 * sum(errors) / len(errors)
    assert float(found.total) == pytest.approx(expected, abs=ATOL)


def test_each_token_counts_alike_whatever_it_is_packed_with() -> None:
    """A token's loss is what it is alone; the means are over all tokens of the batch, not over samples."""
    together = find(*GIVEN)
    batch = batch_of(*GIVEN)
    drawn, start, ce, mse = noise_of(batch), 0, [], []
    for name in GIVEN:
        alone = batch_of(name)
        count = len(alone.latents)
        found = losses(network(), alone, RUN, drawn[start : start + count])
        start += count
        ce.append(found.ce)
        mse.append(found.mse)
    assert_near(together.ce, torch.cat(ce))
    assert_near(together.mse, torch.cat(mse))


def test_what_is_given_carries_no_loss() -> None:
    assert len(find("image_edit").mse) == samples()["image_edit"][-2].inner
    moving = samples()["i2v"][-2]
    assert len(find("i2v").mse) == moving.inner - moving.inner // moving.grid[0]
    assert len(find("t2i").ce) == 0 and len(find("chat").mse) == 0


@pytest.mark.parametrize("names", [("t2i",), ("chat",)])
def test_one_kind_of_loss_alone(names: tuple[str, ...]) -> None:
    found = find(*names)
    expected = 2.0 * found.mse.mean() if names == ("t2i",) else 0.25 * found.ce.mean()
    assert torch.equal(found.total, expected) and bool(found.total.isfinite())


def test_noise_on_what_is_given_does_nothing() -> None:
    """At time 0 noise leaves a token as it is: conditions and fixed frames stay clean."""
    batch = batch_of("i2v", "image_edit")
    drawn = noise_of(batch)
    changed = torch.where(batch.denoised[:, None], drawn, drawn + 100)
    found, other = (losses(network(), batch, RUN, n) for n in (drawn, changed))
    assert_near(found.mse, other.mse)


def test_padding_of_the_vocabulary_is_not_in_the_softmax() -> None:
    model = build_network(0).requires_grad_(False)
    model.head.weight[320:] += 10
    assert_near(find("chat", model=model, vocabulary=320).ce, find("chat", vocabulary=320).ce)
    assert float((find("chat", model=model).ce - find("chat").ce).abs().max()) > 0.1


def test_gradients_reach_both_experts_and_not_the_padding() -> None:
    model = build_network(0)
    model.vision.requires_grad_(False)
    find("question", "t2i", model=model, vocabulary=320).total.backward()
    for name, parameter in model.named_parameters():
        if not name.startswith("vision."):
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
            assert float(parameter.grad.abs().max()) > 0, name
    assert not model.head.weight.grad[320:].any()


def test_weights_of_the_losses() -> None:
    batch = batch_of("t2i", "chat")
    none = replace(RUN, ce_weight=0.0, mse_weight=0.0)
    assert float(losses(network(), batch, none, noise_of(batch)).total) == 0
