"""Counted operations, against PyTorch's own counter on real passes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny import build_network, config, noise, samples, vae
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from openlance.config import lance_3b
from openlance.model.flops import Work, forward_flops, vae_encode_flops, vision_flops, work_of
from openlance.model.lance import Lance
from openlance.model.vision import Vision
from openlance.sequence.mask import dense_mask
from openlance.sequence.pack import pack
from openlance.sequence.segment import Sample
from openlance.train.flops import backward_flops, device_peak_flops, flops_per_step
from openlance.train.losses import losses
from openlance.train.settings import TrainConfig


def dense(sample: Sample) -> Work:
    """The work of a sample where every score is computed, as the dense attention of the CPU does."""
    work = work_of([sample])
    return Work(work.und, work.gen, work.tokens**2, work.answers)


def counted(model: Lance, sample: Sample) -> tuple[int, int]:
    """What forward and backward of a sample's losses take."""
    batch = pack([sample], config(), times=[0.5])
    run = TrainConfig(steps=1)
    with FlopCounterMode(display=False) as forward:
        found = losses(model, batch, run, noise(*batch.latents.shape))
    with FlopCounterMode(display=False) as backward:
        found.total.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("name", list(samples()))
def test_work_is_what_the_mask_lets_through(name: str) -> None:
    sample = samples()[name]
    batch = pack([sample], config())
    work = work_of([sample])
    assert (work.und, work.gen) == (batch.und, batch.tokens - batch.und)
    assert work.pairs == int(dense_mask(batch.visibility).sum())
    assert work.answers == len(batch.answer_index)
    assert work_of([sample, sample]) == work + work


@pytest.mark.parametrize("name", ["t2i", "i2v", "image_edit", "question", "chat"])
def test_a_forward_pass_is_counted_to_the_operation(name: str) -> None:
    forward, _ = counted(build_network(0), samples()[name])
    assert forward_flops(config(), dense(samples()[name])) == forward


def test_a_backward_pass_is_counted_to_the_operation() -> None:
    forward, backward = counted(build_network(0), samples()["t2i"])
    work, body = dense(samples()["t2i"]), config().backbone
    # Words carry no loss here, so what the und expert makes of them after the last attention has no gradient.
    # The formula counts it all the same: a pack has answers too.
    dead = 2 * 2 * work.und * (body.hidden**2 + 3 * body.hidden * body.mlp)
    assert backward_flops(config(), work) == backward + dead
    assert flops_per_step(config(), work) == forward + backward + dead


def test_words_alone_are_counted_to_the_operation_both_ways() -> None:
    forward, backward = counted(build_network(0), samples()["chat"])
    assert flops_per_step(config(), dense(samples()["chat"])) == forward + backward


def test_a_frozen_expert_has_no_products_for_its_weights() -> None:
    model = build_network(0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".und." not in name)
    whole, half = (backward_flops(config(), dense(samples()["chat"]), trains) for trains in (("und",), ()))
    head = 2 * config().backbone.hidden * config().backbone.vocab * work_of([samples()["chat"]]).answers
    _, backward = counted(model, samples()["chat"])
    # The head still learns here, and embedding's gradient passes through every frozen layer.
    assert backward == half + head
    assert half < backward < whole


def test_recomputation_runs_the_layers_once_more() -> None:
    model = build_network(0)
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    with set_checkpoint_early_stop(False):
        forward, backward = counted(model, samples()["chat"])
    assert flops_per_step(config(), dense(samples()["chat"]), recompute=True) == forward + backward


@pytest.mark.parametrize("frames", [1, 2])
def test_the_vae_encoder_is_counted_to_the_operation(frames: int) -> None:
    shape = (1, 3, 4 * (frames - 1) + 1, 32, 48)
    with torch.no_grad(), FlopCounterMode(display=False) as found, sdpa_kernel(SDPBackend.MATH):
        vae().encode(torch.zeros(shape))
    assert vae_encode_flops(config().vae, frames, 2, 3) == found.get_total_flops()


def test_the_released_vae_encoder_as_counted_on_meta() -> None:
    # FlopCounterMode over VAE(lance_3b().vae).encode of 1, 5 and 9 frames of 480x480, on the meta device.
    counted = [375_928_012_800, 3_595_102_617_600, 6_814_277_222_400]
    assert [vae_encode_flops(lance_3b().vae, frames, 30, 30) for frames in (1, 2, 3)] == counted


@pytest.mark.parametrize("grid", [(1, 4, 4), (2, 6, 10)])
def test_the_vision_tower_is_counted_to_the_operation(grid: tuple[int, int, int]) -> None:
    shape = config().vision
    patches = torch.zeros(grid[0] * grid[1] * grid[2], 3 * shape.temporal_patch * shape.patch**2)
    tower = Vision(shape).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as found, sdpa_kernel(SDPBackend.MATH):
        tower(patches, torch.tensor([grid]))
    assert vision_flops(shape, *grid) == found.get_total_flops()


def test_the_released_backbone_takes_six_operations_a_weight_and_token() -> None:
    shape = lance_3b()
    found = flops_per_step(shape, Work(gen=1000))
    assert found / 1000 == pytest.approx(6 * 2_774_782_976, rel=0.003)  # the gen expert's parameters


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("h100", 989.4),
    ],
)
def test_peaks_are_found_by_name(name: str, tera: float) -> None:
    assert device_peak_flops(name) == device_peak_flops(name, "float16") == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    "name",
    ["", "cpu", "NVIDIA L40", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "A10"],
)
def test_an_unknown_gpu_has_no_peak(name: str) -> None:
    assert device_peak_flops(name) is None


def test_other_dtypes_have_no_peak() -> None:
    assert device_peak_flops("NVIDIA H100 80GB HBM3", "float32") is None
