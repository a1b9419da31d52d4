"""The network: packed = alone, every backend alike, and nobody sees what they must not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import build_network, clean, config, network, samples
from torch import Tensor

from openlance.model.attention import flex_pattern
from openlance.model.lance import Lance, Output
from openlance.sequence.pack import PackedBatch, pack
from openlance.sequence.segment import Kind, Role, Sample, Segment

ATOL = 1e-5  # float32, other order of operations; measured worst case 2e-6
NAMES = list(samples())
TIMES = [0.1 + 0.07 * i for i in range(len(NAMES))]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def run(given: list[Sample], times: list[float], model: Lance | None = None) -> tuple[PackedBatch, Output]:
    batch = pack(given, config(), times=times)
    return batch, (model or network())(batch)


def split(batch: PackedBatch, out: Output) -> list[tuple[Tensor, Tensor]]:
    """Each sample's (hidden of und tokens, velocity of gen tokens)."""
    und, gen = batch.visibility.sample[: batch.und], batch.visibility.sample[batch.und :]
    count = int(batch.visibility.sample.max()) + 1
    return [(out.hidden[und == i], out.velocity[gen == i]) for i in range(count)]


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=0)


def test_packed_is_alone() -> None:
    """Whatever it is packed with and wherever it stands, a sample gives the same."""
    together = split(*run(list(samples().values()), TIMES))
    for name, time, (hidden, velocity) in zip(NAMES, TIMES, together, strict=True):
        ((hidden_alone, velocity_alone),) = split(*run([samples()[name]], [time]))
        assert_near(hidden, hidden_alone)
        assert_near(velocity, velocity_alone)
    turned = split(*run(list(samples().values())[::-1], TIMES[::-1]))
    for (hidden, velocity), (hidden_turned, velocity_turned) in zip(together, turned[::-1], strict=True):
        assert_near(hidden, hidden_turned)
        assert_near(velocity, velocity_turned)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_backends_agree() -> None:
    batch, dense = run(list(samples().values()), TIMES)
    with torch.enable_grad():  # on CPU, another branch of the dense attention
        trained = network()(batch)
    flex = network()(batch, pattern=flex_pattern(batch.visibility))
    for other in (trained, flex):
        assert_near(other.hidden, dense.hidden)
        assert_near(other.velocity, dense.velocity)


@pytest.mark.parametrize("name", ["t2v", "video_edit", "subject", "two_clips"])
def test_a_change_reaches_what_sees_it(name: str) -> None:
    """Change one segment: what stands before it stays, what stands after moves, unless it was noisy."""
    sample = samples()[name]
    _, before = run([sample], [0.5])
    for i, segment in enumerate(sample):
        changed = [*sample[:i], _altered(segment), *sample[i + 1 :]]
        batch, after = run([changed], [0.5])
        moved = torch.cat(
            [(out - old).abs().amax(-1) for out, old in
             ((after.hidden, before.hidden), (after.velocity, before.velocity))]
        )  # fmt: skip
        order = batch.place
        start = sum(map(len, sample[:i]))
        end = start + len(segment)
        assert _largest(moved[order < start]) < ATOL
        later = moved[order >= end]
        if segment.kind is Kind.NOISY:
            assert _largest(later) < ATOL
        else:
            assert len(later) == 0 or float(later.min()) > 10 * ATOL
        assert _largest(moved[(order >= start) & (order < end)]) > 10 * ATOL


def _altered(segment: Segment) -> Segment:
    if segment.kind is Kind.TEXT:
        return replace(segment, ids=(segment.ids + 1) % 256)
    if segment.kind is Kind.VIT:
        return replace(segment, features=segment.features + 1)
    return replace(segment, latents=segment.latents + 1)


def _largest(values: Tensor) -> float:
    return float(values.max()) if len(values) else 0.0


def test_experts_serve_their_own_tokens() -> None:
    """Text alone never meets the gen expert; a picture does."""
    other = build_network(0).requires_grad_(False)
    for name, parameter in other.named_parameters():
        if ".gen." in name:
            parameter.add_(0.5)
    text, picture = [samples()["chat"]], [samples()["t2i"]]
    assert torch.equal(run(text, [1.0])[1].hidden, run(text, [1.0], other)[1].hidden)
    here, there = run(picture, [0.5])[1], run(picture, [0.5], other)[1]
    assert float((here.velocity - there.velocity).abs().min()) > 0


def test_time_reaches_the_target_only() -> None:
    sample = samples()["image_edit"]
    _, early = run([sample], [0.9])
    batch, late = run([sample], [0.2])
    moved = (early.velocity - late.velocity).abs().amax(-1)
    assert bool((moved[batch.denoised] > 10 * ATOL).all())
    assert _largest(moved[~batch.denoised]) < ATOL
    markers = batch.visibility.noisy[: batch.und]  # they belong to the target
    assert_near(early.hidden[~markers], late.hidden[~markers])


def test_the_place_of_a_latent_matters() -> None:
    """Equal latents at one rotary position differ by the table of places alone."""
    same = clean((2, 2, 2))
    same = replace(same, latents=torch.ones_like(same.latents))
    batch = pack([[same]], config(), positions=[[torch.zeros(3, len(same), dtype=torch.long)]])
    assert float(torch.pdist(network()(batch).velocity).min()) > 10 * ATOL


def test_latents_and_times_of_a_step_replace_the_batch() -> None:
    batch = pack([samples()["i2v"]], config(), times=[0.3])
    other = pack([samples()["i2v"]], config(), times=[0.8])
    latents = batch.latents + 1
    prepared = network().prepare(batch)
    stepped = network()(batch, prepared=prepared, latents=latents, times=other.times)
    expected = network()(replace(other, latents=latents))
    assert torch.equal(stepped.velocity, expected.velocity)


def test_parts_alone_are_enough_for_their_tasks() -> None:
    whole = build_network(1)
    und = Lance(config(), {"und"})
    und.load_state_dict(whole.state_dict(), strict=False)
    batch = pack([samples()["question"], samples()["chat"]], config())
    assert torch.equal(und(batch).hidden, whole(batch).hidden)
    assert not any(".gen." in name or name.startswith("vision") for name, _ in und.named_parameters())


def test_patches_go_through_the_tower() -> None:
    features = torch.randn(4 * 4, 3 * 2 * 14 * 14)
    patched = Segment(Kind.VIT, Role.SOURCE, grid=(1, 2, 2), patches=features)
    words = samples()["chat"]
    batch = pack([[patched, *words]], config())
    seen = network().see(batch)
    assert seen.shape == (4, config().backbone.hidden)
    given = replace(patched, patches=None, features=seen)
    assert_near(network()(batch).hidden, run([[given, *words]], [1.0])[1].hidden)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_hidden_casts(dtype: torch.dtype) -> None:
    """Everything runs in the caller's dtype, and stays near what float32 gives."""
    model = build_network(0).to(dtype)
    batch = pack([samples()["image_edit"]], config(), times=[0.5])
    out = model(batch.to("cpu", dtype))
    assert out.hidden.dtype == out.velocity.dtype == dtype
    exact = network()(batch)
    # A relative step of bfloat16 is 2^-8; two layers of sums of random signs stay within ten of them.
    near = 10 * 2**-8 * float(exact.velocity.std())
    assert float((out.velocity.float() - exact.velocity).abs().mean()) < near
