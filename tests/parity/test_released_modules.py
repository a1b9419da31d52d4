"""The small parts one by one: masks, positions, embeddings, text alone, prompts and the template."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
import torch
from golden_case import NOISY, REFERENCE, SOURCE, TASKS, VIT, WORDS, assert_near

from openlance.config import MaPEConfig
from openlance.infer.pipeline import LancePipeline
from openlance.model.embed import place_features, time_features
from openlance.sequence.mask import Visibility, dense_mask
from openlance.sequence.pack import pack, token_ids
from openlance.sequence.positions import mape_positions, rope_positions
from openlance.sequence.segment import Kind, Role, Sample, Segment
from openlance.sequence.template import SYSTEM_PROMPTS, Message, Task, build, compose, system_prompt

pytestmark = pytest.mark.usefixtures("no_gradients")

# Cases of masks.json and rope_shift.json that our builder cannot make.
UNREACHABLE = {
    "full_noise_raw_string": "a mode that callers of the released mask builder rename before they call it",
    "image_then_video": "pictures and clips with different placeholders; every sequence has one placeholder",
    "video_secs_0p5": "half a second a latent frame; every sequence has one second",
}


def reachable(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [case for case in cases if case["name"] not in UNREACHABLE]


def test_masks(golden_json: Any) -> None:
    for case in reachable(golden_json("modules/masks.json")):
        lengths = torch.tensor(case["split_lens"])
        modes = torch.tensor([("causal", "full", "noise").index(mode) for mode in case["attn_modes"]])
        mode = modes.repeat_interleave(lengths)
        visibility = Visibility(
            sample=torch.arange(len(case["document_lens"])).repeat_interleave(
                torch.tensor(case["document_lens"])
            ),
            segment=torch.arange(len(lengths)).repeat_interleave(lengths),
            order=torch.arange(len(mode)),
            visual=mode > 0,
            noisy=mode == 2,
        )
        expected = torch.tensor([[bit == "1" for bit in row] for row in case["mask_rows"]])
        assert torch.equal(dense_mask(visibility), expected), case["name"]


def segments_of(case: dict[str, Any]) -> Sample:
    """The segments that a case of rope_shift.json stands for."""
    grids = iter(case["grid_thw"])
    modality, sample, start = case["sample_modality"], [], 0
    for length in case["split_lens"]:
        group = modality[start]
        start += length
        if group in (VIT, SOURCE, REFERENCE, NOISY):
            t, h, w = next(grids)
            kind = {VIT: Kind.VIT, NOISY: Kind.NOISY}.get(group, Kind.CLEAN)
            role = {REFERENCE: Role.REFERENCE, NOISY: Role.TARGET}.get(group, Role.SOURCE)
            sample.append(Segment(kind, role, grid=(t, h // 2, w // 2)))
            assert len(sample[-1]) == length
        else:
            role = Role.USER if group == WORDS else Role.TEMPLATE
            sample.append(Segment(Kind.TEXT, role, torch.zeros(length, dtype=torch.long)))
    return sample


def test_positions_before_and_after_the_shift(golden_json: Any) -> None:
    for case in reachable(golden_json("modules/rope_shift.json")):
        sample = segments_of(case)
        before = torch.cat(rope_positions(sample), dim=1)
        assert torch.equal(before, torch.tensor(case["position_ids"])), case["name"]
        after = torch.cat(mape_positions(sample, MaPEConfig(shift_understanding=True)), dim=1)
        assert torch.equal(after, torch.tensor(case["position_ids_shifted"])), case["name"]


def test_times_and_places(golden_tensors: Any, pipeline: LancePipeline) -> None:
    numbers, config = golden_tensors("modules/modules.safetensors"), pipeline.config
    assert_near(time_features(numbers["timestep_in"]), numbers["timestep_freq"])
    assert_near(pipeline.model.time_embed(numbers["timestep_in"]), numbers["timestep_out"])
    side, ids = config.max_latent_side, numbers["posembed_ids"]
    grid = torch.stack([ids // side**2, ids // side % side, ids % side])
    assert_near(place_features(grid, config.backbone.hidden), numbers["posembed_rows"])
    target = Segment(Kind.NOISY, Role.TARGET, grid=(3, 2, 4))
    flat = pack([[target]], config).latent_grid.T @ torch.tensor([side * side, side, 1])
    assert torch.equal(flat, numbers["flat_ids_3_2_4"])


def test_text_alone(golden_tensors: Any, pipeline: LancePipeline) -> None:
    numbers, model = golden_tensors("modules/modules.safetensors"), pipeline.model
    text = Segment(Kind.TEXT, Role.USER, numbers["text_ids"])
    hidden = model(pack([[text]], model.config)).hidden
    assert_near(hidden, numbers["text_hidden"])
    assert_near(model.head(hidden), numbers["text_logits"])


def test_system_prompts(golden_json: Any) -> None:
    variants = {
        (entry["system_prompt_type"], entry["vision_type"]): entry["variants"]
        for entry in golden_json("modules/prompts.json")["system_prompts"]
    }
    released = {task: name for name, task in TASKS.items()}
    for task in Task:
        if task.generates:
            kind = released.get(task, str(task))
            # The released sampler words a filmed subject's prompt as for a picture: see the rendered ones.
            about = "video" if task.video and task is not Task.SUBJECT_VIDEO else "image"
            assert variants[kind, about] == [SYSTEM_PROMPTS[task]]
    for kind in ("image", "video"):
        assert variants["caption", kind][0] == SYSTEM_PROMPTS[f"caption_{kind}"]


def test_rendered_templates(golden_json: Any, pipeline: LancePipeline) -> None:
    """Of every task that generates, and of a plain caption and a question with its own system prompt."""
    encode, shown = pipeline.tokenizer.encode_with_offsets, set()
    for entry in golden_json("modules/prompts.json")["rendered"]:
        name, _, form = entry["task"].partition(" ")
        task = TASKS.get(name) or Task(name)
        shown.add(task)
        views = [Segment(kind, Role.SOURCE, grid=(1, 1, 1)) for kind in (Kind.VIT, Kind.CLEAN)]
        system = system_prompt(task, {}, caption="caption" in form)
        if task.generates:
            looks = task not in (Task.T2I, Task.T2V, Task.I2V)
            parts: list[str | Segment] = [*(views if looks else []), "PROMPT"]
            ending: str | Segment = Segment(Kind.NOISY, Role.TARGET, grid=(1, 1, 1))
        elif "caption" in form:
            parts, ending = views[:1], "ANSWER"
        else:
            parts, ending, system = [views[0], "QUESTION"], "ANSWER", "SYSTEM"
        sample = compose(parts, encode, system=system, ending=ending)
        ids = token_ids(sample, pipeline.config).tolist()
        assert pipeline.tokenizer.decode(ids) == entry["rendered"][0], entry["task"]
    assert shown == set(Task) - {Task.CHAT}


def test_expanded_templates(golden_json: Any, pipeline: LancePipeline) -> None:
    """Ids of whole templates, and where their vision, target and user's words stand."""
    for case in golden_json("modules/template_expand.json"):
        counts = iter(case["tokens"])

        def part(given: dict[str, str], role: Role, counts=counts) -> str | Segment:
            if given["type"] == "text":
                return given["text"]
            kind = Kind.NOISY if role is Role.TARGET else Kind.CLEAN
            return Segment(kind, role, grid=(1, 1, next(counts)))

        sample = build(
            [
                Message("system", (case["system"],)),
                Message("user", tuple(part(p, Role.SOURCE) for p in case["user"])),
                Message("assistant", tuple(part(p, Role.TARGET) for p in case["assistant"])),
            ],
            pipeline.tokenizer.encode_with_offsets,
        )
        ids = token_ids(sample, pipeline.config)
        assert ids.tolist() == case["all_ids"]
        pads = (ids == pipeline.config.tokens.video_pad).tolist()
        runs = groupby(range(len(ids)), pads.__getitem__)
        assert [list(run) for is_pad, run in runs if is_pad] == case["spans"]
        roles = [role for segment in sample for role in [segment.role] * len(segment)]
        target = [i for i, role in enumerate(roles) if role in (Role.TARGET, Role.ANSWER)]
        end = [] if Role.ANSWER in roles else [target[-1] + 1]  # the turn's end belongs to it
        assert target + end == case["target_index"]
        if case["search_text"]:
            assert [i for i, role in enumerate(roles) if role is Role.USER] == case["search_index"]
