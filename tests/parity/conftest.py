"""Shared by the parity tests: the golden checkpoint, its cases and readers of the golden files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import golden_folder
from golden_case import VARIANT_OF, Case, load_golden
from safetensors.torch import load_file

from openlance.infer.pipeline import LancePipeline

GENERATION = ("t2i", "t2v", "i2v", "image_edit", "video_edit", "idip_image", "idip_image_2ref")
ANSWERS = ("x2t_image", "x2t_image_eos", "x2t_video")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a case: those that every set should have, and whatever else this set has.

    A test that names its cases itself (parametrize, indirect) gets only those.
    """
    folder = golden_folder(metafunc.config)
    inputs = sorted(folder.glob("*/input.json")) if folder else []
    found = [path.parent.name for path in inputs]
    variants = [name for name in found if name.startswith(f"{VARIANT_OF}_")]
    cases = {
        "variant": variants or [f"{VARIANT_OF}_cfg_scale1"],
        "answer_case": [*ANSWERS, *(n for n in found if n.startswith("x2t") and n not in ANSWERS)],
        "generation": [
            *GENERATION,
            *(n for n in found if not n.startswith("x2t") and n not in {*variants, *GENERATION}),
        ],
    }
    chosen = {mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")}
    for fixture, names in cases.items():
        if fixture in metafunc.fixturenames and fixture not in chosen:
            metafunc.parametrize(fixture, names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def golden_checkpoint(golden_file: Callable[[str], Path]) -> Path:
    """The tiny random checkpoint in the released layout."""
    return golden_file("checkpoint")


@pytest.fixture(scope="session")
def golden_json(golden_file: Callable[[str], Path]) -> Callable[[str], Any]:
    """A function from a name inside the golden folder to the parsed JSON."""
    return lambda name: json.loads(golden_file(name).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def golden_tensors(golden_file: Callable[[str], Path]) -> Callable[[str], dict[str, torch.Tensor]]:
    """A function from a name inside the golden folder to the tensors of that safetensors file."""
    return lambda name: load_file(golden_file(name))


@pytest.fixture(scope="session")
def pipeline(golden_checkpoint: Path, golden_json: Callable[[str], Any]) -> LancePipeline:
    """The golden checkpoint, loaded."""
    return load_golden(golden_checkpoint, golden_json("model.json"))


@pytest.fixture(scope="session")
def generation(request: pytest.FixtureRequest, golden_file: Any, pipeline: LancePipeline) -> Case:
    """A case that makes a picture or clip."""
    golden_file(request.param)
    return Case(request.param, golden_file, pipeline)


@pytest.fixture(scope="session")
def variant(request: pytest.FixtureRequest, golden_file: Any, pipeline: LancePipeline) -> Case:
    """A case of other guidance over the sequence of the first."""
    golden_file(request.param)
    return Case(request.param, golden_file, pipeline, of=VARIANT_OF)


@pytest.fixture(scope="session")
def answer_case(request: pytest.FixtureRequest, golden_file: Any, pipeline: LancePipeline) -> Case:
    """A case that answers in words."""
    golden_file(request.param)
    return Case(request.param, golden_file, pipeline)


@pytest.fixture
def no_gradients() -> Iterator[None]:
    """Run without gradients, as inference does."""
    with torch.no_grad():
        yield
