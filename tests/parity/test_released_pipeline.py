"""The public API on the golden checkpoint, from files to pixels and words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from golden_case import Case
from torch import Tensor

from openlance.data.media import from_vae_pixels
from openlance.infer.pipeline import LancePipeline
from openlance.sequence.template import Task


@pytest.fixture
def sized(pipeline: LancePipeline) -> Any:
    """A function from a case to the pipeline at the case's sizes."""
    before = pipeline.model.config

    def at(case: Case) -> LancePipeline:
        vae, vit = case.asked["resolution_vae"], case.asked["resolution_vit"]
        sizes = replace(before.sizes, image=vae, video=vae, vit_image=vit, vit_video=vit)
        pipeline.model.config = replace(before, sizes=sizes)
        return pipeline

    yield at
    pipeline.model.config = before


def expected_frames(numbers: dict[str, Tensor]) -> Any:
    return from_vae_pixels(numbers["pixels_cthw"])


@pytest.mark.parametrize("generation", ["t2i", "t2v"], indirect=True)
def test_generated_from_the_released_seed(generation: Case, sized: Any) -> None:
    """The released noise of these is what torch draws from the seed, as ours is."""
    asked, pipeline, task = generation.asked, sized(generation), generation.task
    opts = asked["opts"]
    common = {"seed": opts["seed"], "steps": opts["steps"], "shift": opts["shift"]}
    size = (asked["height"], asked["width"])
    if task is Task.T2I:
        result = pipeline.generate_image(asked["prompt"], size=size, **common)
    else:
        result = pipeline.generate_video(asked["prompt"], size=size, frames=asked["num_frames"], **common)
    frames = result.frames[generation.facts["pixel_frames_saved"]]
    # One level of 255: a value near the middle between two levels rounds either way.
    assert np.abs(frames.astype(int) - expected_frames(generation.numbers)).max() <= 1


@pytest.mark.parametrize("generation", ["image_edit", "video_edit"], indirect=True)
def test_edits_have_the_size_of_the_source(generation: Case, sized: Any) -> None:
    source = next(generation.find(name) for kind, name in generation.elements if kind != "text")
    result = sized(generation).edit(source, generation.asked["prompt"], seed=1, steps=1)
    channels, frames, height, width = generation.facts["pixel_full_shape"]
    assert result.frames.shape == (frames, height, width, channels)


@pytest.mark.parametrize("answer_case", ["x2t_image", "x2t_video"], indirect=True)
def test_answers(answer_case: Case, sized: Any) -> None:
    """Files and a question in, the released words out."""
    asked, pipeline = answer_case.asked, sized(answer_case)
    media = [answer_case.find(value) for kind, value in answer_case.elements if kind != "text"]
    _, question, _ = next(value for kind, value in answer_case.elements if kind == "text")
    answer = pipeline.ask(question, media, max_tokens=asked["max_new_tokens"])
    ids = answer_case.facts["generated_ids"]
    assert answer.text == pipeline.tokenizer.decode(ids, skip_special=True)
