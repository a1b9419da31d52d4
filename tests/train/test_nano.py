"""The recipe of nano, run from nothing to a model that loads, at a size that takes seconds."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from openlance.infer.pipeline import LancePipeline
from openlance.model.checkpoint import save_pretrained
from openlance.sequence.template import Task
from openlance.train.loop import Validation, train
from openlance.train.nano import CONTINUAL, MIXTURES, NanoParts, NanoRecipe, make_parts, nano_tokenizer
from openlance.train.nano_data import KINDS, EncodedWorld, draw
from openlance.train.parallel import Ranks
from openlance.train.presets import PRESETS, preset
from openlance.world import is_held_out, render

TINY = NanoRecipe(vae_minutes=0.02, clip_minutes=0.02, vision_minutes=0.02, items=(6, 3, 3, 2))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> NanoParts:
    return make_parts(tmp_path_factory.mktemp("nano"), TINY)


@pytest.mark.slow
def test_every_stage_runs_and_the_last_draws_and_answers(parts: NanoParts, tmp_path: Path) -> None:
    model = parts.new_model(0)
    for name in ("nano-pt", "nano-ct", "nano-sft"):
        config = replace(preset(name), steps=2, tokens=300, validate_every=2)
        feed, held_out = parts.feed(config, Ranks()), parts.held_out(config)
        weights = train(model, feed, config, tmp_path / name, validation=Validation(held_out))
        model.load_state_dict(weights)
    save_pretrained(
        tmp_path / "out", model=weights, vae=parts.vae, tokenizer=parts.tokenizer, config=parts.config,
        dtype=torch.bfloat16,
    )  # fmt: skip
    pipeline = LancePipeline.from_pretrained(tmp_path / "out")
    assert pipeline.generate_image("a red circle", steps=2, seed=0).frames.shape == (1, 96, 96, 3)
    assert isinstance(pipeline.ask("what shape is red?", render(draw(KINDS[0], 0)[0][0], 96)).text, str)


@pytest.mark.slow
def test_parts_that_are_there_are_left_alone(parts: NanoParts) -> None:
    files = sorted(parts.folder.glob("*.safetensors"))
    before = [file.stat().st_mtime_ns for file in files]
    again = make_parts(parts.folder, TINY)
    assert [file.stat().st_mtime_ns for file in files] == before
    assert again.config == parts.config
    stored = load_file(parts.folder / "clip.latents.safetensors")["values"]
    assert stored.shape == (4, 3, 6, 6, 48)


@pytest.mark.slow
def test_rows_repeat_by_seed_and_cover_the_mixture(parts: NanoParts) -> None:
    world = EncodedWorld(parts.folder, CONTINUAL)
    first, again, other = (list(islice(world.rows(0, step), 64)) for step in (3, 3, 4))
    assert [row.prompt for row in first] == [row.prompt for row in again]
    assert [row.prompt for row in first] != [row.prompt for row in other]
    assert {row.task for row in islice(world.rows(1), 800)} == set(CONTINUAL)


@pytest.mark.slow
def test_lanes_do_not_depend_on_the_number_of_processes(parts: NanoParts) -> None:
    config = replace(preset("nano-pt"), lanes=4, tokens=400)
    whole = [pack.ids for pack in parts.feed(config, Ranks()).packs(7)]
    spread = [[pack.ids for pack in parts.feed(config, Ranks(rank, 2)).packs(7)] for rank in (0, 1)]
    assert whole == [spread[0][0], spread[1][0], spread[0][1], spread[1][1]]
    (pack, *_) = parts.feed(config, Ranks()).packs(7)
    assert sum(len(segment) for sample in pack.samples for segment in sample) <= 400


@pytest.mark.slow
def test_held_out_items_are_never_trained_on(parts: NanoParts) -> None:
    """Six pictures are stored: the last is held out."""
    (pack, *_) = parts.held_out(preset("nano-pt"))["t2i"]
    latents = load_file(parts.folder / "image.latents.safetensors")["values"].float()
    for sample in pack.samples:
        (target,) = (segment.latents for segment in sample if segment.latents is not None)
        assert torch.equal(target, latents[-1])
    for row in islice(EncodedWorld(parts.folder, {Task.T2I: 1.0}).rows(0), 60):
        assert row.target is not None and not torch.equal(row.target.latents, latents[-1])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_items_are_fixed_and_never_held_out(kind) -> None:  # type: ignore[no-untyped-def]
    for index in range(40):
        scenes, words = draw(kind, index)
        again, same_words = draw(kind, index)
        assert (scenes, words) == (again, same_words)
        assert len(scenes) == kind.scenes_each
        assert not any(is_held_out(scene) for scene in scenes)


@pytest.mark.parametrize("stage", MIXTURES)
def test_every_stage_has_every_task_that_nano_learns(stage: str) -> None:
    assert set(MIXTURES[stage]) == set(Task) - {Task.CHAT, Task.SUBJECT_VIDEO}
    assert np.isclose(sum(MIXTURES[stage].values()), 1.0)


def test_every_preset_has_a_mixture() -> None:
    assert {preset(name).stage for name in PRESETS} == set(MIXTURES)


def test_the_tokenizer_knows_the_world_in_whole_words(tmp_path: Path) -> None:
    tokenizer = nano_tokenizer(tmp_path / "tokenizer")
    assert tokenizer.size <= 512
    assert len(tokenizer.encode("a large red circle at the top left on white")) == 10
