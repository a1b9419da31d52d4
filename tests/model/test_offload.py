"""Weights that come and go: the same results, and no more on the device than was planned.

Host and device are both the CPU here: what goes to the device is a copy all the same, and is counted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from tiny import GENERATING, build_network, noise, question, samples, vae
from torch import Tensor, nn

from openlance.config import SamplingConfig, TextConfig
from openlance.infer.generate import denoise
from openlance.infer.memory import Peak
from openlance.infer.speak import speak
from openlance.model.lance import Lance
from openlance.model.offload import Layers, Placement, spread
from openlance.model.quantize import SCHEMES, quantize_weight
from openlance.model.vae import VAE
from openlance.sequence.segment import Sample
from openlance.sequence.template import Message

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network() -> Lance:
    return build_network(0).requires_grad_(False)


PLANS: dict[str, dict[str, Layers]] = {
    "all copied": {},
    "some stay": {"context": {"und": 1}, "denoise": {"gen": 1, "und": 1}, "answer": {"und": 2}},
    "by phase": {phase: {"und": 2, "gen": 2} for phase in ("context", "denoise", "answer")},
}


@contextmanager
def offloaded(plan: dict[str, Layers]) -> Iterator[tuple[Lance, VAE, Placement]]:
    """The tiny network and VAE of `tiny`, with their weights on the "host"."""
    model, pixels = build_network(0).requires_grad_(False), copy.deepcopy(vae())
    yield model, pixels, Placement(model, pixels, CPU, plan)


def size(*modules: nn.Module) -> int:
    return sum(tensor.nbytes for module in modules for tensor in module.parameters())


def drawn(model: Lance, name: str) -> Tensor:
    sample = samples()[name][:-1]
    return denoise(model, sample, SamplingConfig(steps=2), noise(*sample[-1].grid, 48))


def asked() -> Sample:
    return question(Message("user", ("What colour is the square?",)))


def said(model: Lance) -> list[int]:
    return list(speak(model, asked(), TextConfig(max_tokens=5), allowed=330, stop=()))


@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
@pytest.mark.parametrize("name", GENERATING)
def test_denoising_is_the_same_bit_for_bit(network: Lance, plan: dict[str, Layers], name: str) -> None:
    expected = drawn(network, name)
    with offloaded(plan) as (model, _, _):
        assert torch.equal(drawn(model, name), expected)
        assert torch.equal(drawn(model, name), expected)


@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
def test_words_are_the_same(network: Lance, plan: dict[str, Layers]) -> None:
    with offloaded(plan) as (model, _, _):
        assert said(model) == said(network)


def test_the_vae_is_the_same_and_half_of_it_is_there() -> None:
    latents, pixels = noise(1, 2, 2, 3, 48), noise(1, 3, 5, 32, 48).clamp(-1, 1)
    with offloaded({}) as (_, moved, placement):
        rest = placement.held
        assert torch.equal(moved.encode(pixels), vae().encode(pixels))
        assert placement.held - rest == size(moved.net.encoder, moved.net.quant_conv)
        assert torch.equal(moved.decode(latents), vae().decode(latents))
        assert placement.held - rest == size(moved.net.decoder, moved.net.post_quant_conv)


def test_no_more_is_on_the_device_than_was_planned(network: Lance) -> None:
    """Weights that are copied are counted as they are made, beside what the network itself needs."""
    with torch.inference_mode(), Peak(CPU) as alone:
        drawn(network, "t2i")
    layer = size(network.layers[0]["gen"])
    for plan in PLANS.values():
        with offloaded(plan) as (model, pixels, placement), Peak(CPU) as peak:
            drawn(model, "t2i")
            assert placement.phase == "denoise"
            assert 4 * layer <= peak.most <= 4 * layer + alone.most
            placement.enter("decode")
            assert peak.live < layer + size(pixels.net.decoder)


def test_a_layer_of_which_one_is_copied_needs_one_place() -> None:
    with offloaded({"denoise": {"und": 1, "gen": 1}}) as (model, _, placement):
        rest = placement.held
        drawn(model, "t2i")
        assert placement.held - rest == 2 * size(model.layers[0])


def test_leaving_gives_the_model_back(network: Lance) -> None:
    with offloaded(PLANS["some stay"]) as (model, pixels, placement):
        drawn(model, "t2i")
        placement.leave()
        assert placement.held == 0
        assert model.device == pixels.device == CPU
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        expected = network.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_quantised_layers_come_and_go(network: Lance) -> None:
    pytest.importorskip("torchao")
    scheme = SCHEMES["int8"]
    model = build_network(0).requires_grad_(False)
    for layer in model.layers:
        for linear in (layer["und"].gate, layer["und"].down):
            linear.weight = nn.Parameter(
                quantize_weight(linear.weight, scheme, torch.float32), requires_grad=False
            )
    expected = drawn(model, "t2i")
    assert not torch.equal(expected, drawn(network, "t2i"))
    Placement(model, None, CPU, {})
    assert torch.equal(drawn(model, "t2i"), expected)


@pytest.mark.parametrize("layers", [1, 6, 36])
def test_layers_that_stay_are_spread(layers: int) -> None:
    order = spread(layers)
    assert sorted(order) == list(range(layers))
    if layers == 36:
        gaps = [b - a for a, b in pairwise(sorted(order[:9]))]
        assert max(gaps) <= 8
