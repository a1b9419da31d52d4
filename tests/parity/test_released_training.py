"""One packed training batch: sequence, losses a token, gradients."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from golden_case import ATOL, assert_near, groups, in_order, mask_in_order, unpack_bits, whole_hidden
from torch import Tensor

from openlance.data.buckets import to_vit_patches
from openlance.data.tasks import View
from openlance.flow.path import interpolate, shift_time
from openlance.infer.pipeline import LancePipeline
from openlance.model.lance import Lance
from openlance.model.names import POSITION_TABLE, to_ours
from openlance.sequence.mask import dense_mask
from openlance.sequence.pack import PackedBatch, pack, token_ids
from openlance.sequence.segment import Kind, Role, Sample, Segment
from openlance.sequence.template import compose
from openlance.train.losses import Losses, losses
from openlance.train.settings import TrainConfig

GRADIENT_RTOL = 1e-3  # of norms; the tolerance that MEANING.md gives
VISION = r"<\|vision_start\|>.*?<\|vision_end\|>"
TEMPLATE = re.compile(
    rf"<\|im_start\|>system\n(?P<system>.*?)<\|im_end\|>\n<\|im_start\|>user\n(?P<shown>(?:{VISION})*)"
    r"(?P<words>.*?)<\|im_end\|>\n<\|im_start\|>assistant\n(?P<ending>.*?)<\|im_end\|>",
    re.DOTALL,
)


@dataclass(frozen=True, eq=False)
class Training:
    """The golden batch and what we make of it; the ViT moves in understanding samples, as in training."""

    model: Lance
    samples: list[Sample]
    batch: PackedBatch
    told: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    found: Losses
    embedded: Tensor  # [g, hidden] latent tokens as they enter, to which the table of places is added


def samples_of(told: dict, inputs: dict[str, Tensor], pipeline: LancePipeline) -> list[Sample]:
    """The batch's samples, from their texts, pixels and clean latents."""
    pictures = iter(sorted(name for name in inputs if name.startswith("vit_pixels_u8_")))
    latents = iter(range(len(told["patchified_vae_latent_shapes"])))
    raw, used, samples = inputs["packed_timesteps_raw"], 0, []

    def look() -> View:
        frames = inputs[next(pictures)].permute(1, 2, 3, 0).numpy()
        patches, (t, h, w) = to_vit_patches(frames)
        return View(grid=(t, h // 2, w // 2), patches=patches)

    for described in told["samples"]:
        text = TEMPLATE.fullmatch(described["rendered"])
        seen = look() if text["shown"] else View()
        generates = described["loss"] == "mse"
        if generates and text["shown"]:
            seen = replace(seen, latents=inputs[f"latent_{next(latents)}_thwc"])
            used += seen.latents.shape[:3].numel()
        ending: str | Segment = text["ending"]
        if generates:
            target = inputs[f"latent_{next(latents)}_thwc"]
            grid = tuple(target.shape[:3])
            still = raw[used : used + target.shape[:3].numel()].view(grid).isinf().all(-1).all(-1)
            used += still.numel() * grid[1] * grid[2]
            fixed = tuple(torch.nonzero(still).flatten().tolist())
            ending = Segment(Kind.NOISY, Role.TARGET, grid=grid, latents=target, fixed_frames=fixed)
        encode = pipeline.tokenizer.encode_with_offsets
        parts = [*seen.segments(Role.SOURCE), text["words"]]
        samples.append(compose(parts, encode, system=text["system"], ending=ending))
    return samples


def times_of(samples: list[Sample], raw: Tensor, shift: float) -> list[float]:
    """Each sample's time: the shifted sigmoid of what was drawn for its denoised tokens."""
    times, start = [], 0
    for sample in samples:
        count = sum(segment.inner for segment in sample if segment.generative)
        drawn = raw[start : start + count]
        drawn = drawn[drawn.isfinite()].unique()
        assert len(drawn) <= 1
        times.append(float(shift_time(torch.sigmoid(drawn), shift)) if len(drawn) else 1.0)
        start += count
    return times


@pytest.fixture(scope="module")
def training(pipeline: LancePipeline, golden_json: Any, golden_tensors: Any) -> Training:
    told, inputs = golden_json("train/train.json"), golden_tensors("train/inputs.safetensors")
    model = pipeline.model
    config = replace(model.config, mape=replace(model.config.mape, shift_understanding=True))
    samples = samples_of(told, inputs, pipeline)
    times = times_of(samples, inputs["packed_timesteps_raw"], told["timestep_shift"])
    batch = pack(samples, config, times=times)
    weights = TrainConfig(steps=1, ce_weight=told["ce_weight"], mse_weight=told["mse_weight"])
    vocabulary = told["vocab_size_efficient"]
    model.vision.requires_grad_(False)
    entering: list[Tensor] = []
    hook = model.latent_in.register_forward_hook(lambda module, given, out: entering.append(out))
    found = losses(model, batch, weights, inputs["noise"], vocabulary=vocabulary)
    hook.remove()
    entering[0].retain_grad()
    found.total.backward()
    outputs = golden_tensors("train/outputs.safetensors")
    return Training(model, samples, batch, told, inputs, outputs, found, entering[0])


def test_the_packed_sequence(training: Training) -> None:
    batch, inputs, config = training.batch, training.inputs, training.model.config
    ids = torch.cat([token_ids(sample, config) for sample in training.samples])
    assert torch.equal(ids, inputs["packed_text_ids"])
    lengths = [sum(map(len, sample)) for sample in training.samples]
    kinds = training.told["sample_type"]
    expected = zip(training.told["sample_lens"], kinds, strict=True)
    assert lengths == [length for length, kind in expected if kind != "pad"]
    assert torch.equal(in_order(batch, batch.positions), inputs["position_ids"])
    und, gen = batch.place[: batch.und], batch.place[batch.und :]
    assert torch.equal(und[batch.text_index], inputs["packed_text_indexes"])
    assert torch.equal(und[batch.vit_index], inputs["packed_vit_token_indexes"])
    assert torch.equal(gen, inputs["packed_vae_token_indexes"])
    generates = torch.cat([torch.full((n,), kind == "gen") for n, kind in zip(lengths, kinds, strict=False)])
    group = torch.cat([groups(sample) for sample in training.samples])
    assert torch.equal(group[generates], inputs["sample_modality"][generates])


def test_the_mask(training: Training, golden_file: Any) -> None:
    import numpy as np

    batch = training.batch
    expected = unpack_bits(np.load(golden_file("train/mask_packbits.npy")), batch.tokens)
    mask = mask_in_order(batch, dense_mask(batch.visibility))
    assert torch.equal(mask, expected)
    grouped = torch.zeros(batch.tokens + 1, batch.tokens + 1, dtype=torch.bool)
    for rows, masks in zip(batch.rows, batch.masks, strict=True):
        for row, seen in zip(rows, masks, strict=True):
            grouped[row[:, None], row[None]] = seen
    assert torch.equal(mask_in_order(batch, grouped[:-1, :-1]), expected)


def test_what_carries_which_loss(training: Training) -> None:
    batch, inputs = training.batch, training.inputs
    assert torch.equal(batch.place[batch.answer_index], inputs["ce_loss_indexes"])
    assert torch.equal(batch.answer_labels, inputs["packed_label_ids"])
    assert torch.equal(batch.place[batch.und :][batch.denoised], inputs["mse_loss_indexes"])
    assert int(batch.denoised.sum()) == training.told["total_mse_tokens"]
    assert_near(batch.times, inputs["packed_timesteps_shifted"])


def test_hidden_states(training: Training) -> None:
    batch = training.batch
    with torch.no_grad():
        noisy, _ = interpolate(batch.latents, training.inputs["noise"], batch.times)
        assert_near(training.model.see(batch), training.outputs["vit_embed"])
        assert_near(whole_hidden(training.model, batch, latents=noisy), training.outputs["last_hidden"])


def test_losses(training: Training) -> None:
    found, told = training.found, training.told
    assert_near(found.ce, training.outputs["ce"])
    assert_near(found.mse, training.outputs["mse"].mean(-1))
    assert found.ce.mean().item() == pytest.approx(told["loss_ce"], abs=ATOL)
    assert found.mse.mean().item() == pytest.approx(told["loss_mse"], abs=ATOL)
    assert found.total.item() == pytest.approx(told["loss"], abs=ATOL)


def test_gradients(training: Training, golden_json: Any, golden_tensors: Any) -> None:
    parameters = dict(training.model.named_parameters())
    norms = golden_json("train/grad_norms.json")
    table = norms.pop(POSITION_TABLE, None)
    assert {to_ours(name) for name in norms} == set(parameters)
    for name, expected in norms.items():
        gradient = parameters[to_ours(name)].grad
        if expected is None:
            assert gradient is None, name
        else:
            assert gradient.norm().item() == pytest.approx(expected, rel=GRADIENT_RTOL, abs=1e-7), name
    for name, expected in golden_tensors("train/grads.safetensors").items():
        assert_near(parameters[to_ours(name)].grad, expected)
    if table is not None:  # we compute the table; what it would get is the sum over the tokens of a place
        _, place = training.batch.latent_grid.unique(dim=1, return_inverse=True)
        entering = training.embedded.grad
        summed = torch.zeros(int(place.max()) + 1, entering.shape[1]).index_add(0, place, entering)
        assert summed.norm().item() == pytest.approx(table, rel=GRADIENT_RTOL)
