"""The recipe of nano, run from nothing to a model that loads, at a size that takes seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from openlance.config import TrainConfig
from openlance.infer.pipeline import LancePipeline
from openlance.sequence.template import Task
from openlance.train.nano import MIXTURE, NanoRecipe, nano_tokenizer, train_nano
from openlance.train.nano_data import KINDS, EncodedWorld, draw
from openlance.world import is_held_out, render

TINY = NanoRecipe(
    vae_minutes=0.02,
    clip_minutes=0.02,
    vision_minutes=0.02,
    items=(6, 3, 3, 2),
    words=TrainConfig(steps=2, batch=4, decay=0.0),
    train=TrainConfig(steps=2, batch=6),
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano")
    train_nano(folder, TINY, threads=1)
    return folder


@pytest.mark.slow
def test_the_recipe_ends_in_a_model_that_draws_and_answers(run_dir: Path) -> None:
    pipeline = LancePipeline.from_pretrained(run_dir / "nano")
    assert pipeline.generate_image("a red circle", steps=2, seed=0).frames.shape == (1, 96, 96, 3)
    assert isinstance(pipeline.ask("what shape is red?", render(draw(KINDS[0], 0)[0][0], 96)).text, str)


@pytest.mark.slow
def test_a_finished_recipe_goes_on_where_it_was(run_dir: Path) -> None:
    encoded = run_dir / "image.latents.safetensors"
    before = encoded.stat().st_mtime_ns
    longer = replace(TINY, train=replace(TINY.train, steps=3))
    train_nano(run_dir, longer, threads=1)
    assert encoded.stat().st_mtime_ns == before
    assert torch.load(run_dir / "joint.pt", weights_only=True)["step"] == 3


@pytest.mark.slow
def test_rows_repeat_by_step_and_cover_the_mixture(run_dir: Path) -> None:
    world = EncodedWorld(run_dir, MIXTURE)
    first, again, other = world.rows(3, 64), world.rows(3, 64), world.rows(4, 64)
    assert [row.prompt for row in first] == [row.prompt for row in again]
    assert [row.prompt for row in first] != [row.prompt for row in other]
    tasks = {row.task for step in range(20) for row in world.rows(step, 40)}
    assert tasks == set(MIXTURE)
    stored = load_file(run_dir / "clip.latents.safetensors")["values"]
    assert stored.shape == (4, 3, 6, 6, 48)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_items_are_fixed_and_never_held_out(kind) -> None:  # type: ignore[no-untyped-def]
    for index in range(40):
        scenes, words = draw(kind, index)
        again, same_words = draw(kind, index)
        assert (scenes, words) == (again, same_words)
        assert len(scenes) == kind.scenes_each
        assert not any(is_held_out(scene) for scene in scenes)


def test_the_mixture_has_every_task_that_nano_learns() -> None:
    assert set(MIXTURE) == set(Task) - {Task.CHAT, Task.SUBJECT_VIDEO}
    assert np.isclose(sum(MIXTURE.values()), 1.0)


def test_the_tokenizer_knows_the_world_in_whole_words(tmp_path: Path) -> None:
    tokenizer = nano_tokenizer(tmp_path / "tokenizer")
    assert tokenizer.size <= 512
    assert len(tokenizer.encode("a large red circle at the top left on white")) == 10
