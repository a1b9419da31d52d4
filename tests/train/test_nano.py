"""The recipe of nano, run from nothing to a model that loads, at a size that takes seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import config as tiny_config
from tiny import tokenizer

from openlance.data.mixture import Schedule
from openlance.data.tasks import Row, View, to_sample
from openlance.errors import InputError
from openlance.infer.pipeline import LancePipeline
from openlance.model.checkpoint import find_release, save_pretrained
from openlance.sequence.segment import Kind, Role
from openlance.sequence.template import Task
from openlance.train.loop import Validation, train
from openlance.train.nano import (
    MIXTURES,
    NanoParts,
    NanoRecipe,
    make_parts,
    nano_tokenizer,
)
from openlance.train.nano_data import KINDS, EncodedWorld, Shares, WorldFeed, draw, stored
from openlance.train.parallel import Ranks, leave
from openlance.train.presets import PRESETS, preset
from openlance.train.settings import RLConfig
from openlance.world import Scene, box, is_held_out, read_boxes, render
from openlance.world.language import NUMBERS

LAST = MIXTURES["fine-tuning"].values[-1]
TINY = NanoRecipe(
    vae_minutes=0.02,
    decoder_minutes=0.02,
    clip_minutes=0.02,
    vision_minutes=0.02,
    items=(6, 3, 3, 2, 4, 4, 4, 2, 4),
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> NanoParts:
    return make_parts(tmp_path_factory.mktemp("nano"), TINY)


@pytest.mark.slow
def test_every_stage_runs_and_the_last_draws_and_answers(parts: NanoParts, tmp_path: Path) -> None:
    weights: Mapping[str, torch.Tensor] = parts.new_model(0).state_dict()
    for name in ("nano-pt", "nano-ct", "nano-sft"):
        model = parts.new_model(0)
        model.load_state_dict(weights)
        config = replace(preset(name), steps=2, tokens=300, validate_every=2)
        feed, held_out = parts.feed(config, Ranks()), parts.held_out(config)
        weights = train(model, feed, config, tmp_path / name, validation=Validation(held_out))
        leave()  # bfloat16 is a group of one
    save_pretrained(
        tmp_path / "out", model=weights, vae=parts.vae, tokenizer=parts.tokenizer, config=parts.config,
        dtype=torch.bfloat16,
    )  # fmt: skip
    pipeline = LancePipeline.from_pretrained(tmp_path / "out")
    assert pipeline.generate_image("a red circle", steps=2, seed=0).frames.shape == (1, 96, 96, 3)
    assert isinstance(pipeline.ask("what shape is red?", render(draw(KINDS[0], 0)[0][0], 96)).text, str)


def test_a_model_that_goes_on_learning_keeps_its_own_parts(tmp_path: Path) -> None:
    """The bundled one's, without a minute of training; parts of another model are refused."""
    release = find_release("nano", None)
    taken = make_parts(tmp_path, NanoRecipe(items=(2, 2, 1, 1, 1, 1, 1, 1, 1)), release=release)
    bundled = LancePipeline.from_pretrained("nano")
    assert replace(taken.config, sampling=bundled.config.sampling) == bundled.config
    for mine, its in ((taken.vision, bundled.model.vision), (taken.vae, bundled.vae)):
        assert its is not None
        assert all(torch.equal(value, its.state_dict()[name]) for name, value in mine.state_dict().items())
    assert taken.tokenizer.encode("a red circle") == bundled.tokenizer.encode("a red circle")
    make_parts(tmp_path, NanoRecipe(items=(2, 2, 1, 1, 1, 1, 1, 1, 1)), release=release)  # the same again
    state = load_file(tmp_path / "vae.safetensors")
    save_file({name: value + 1 for name, value in state.items()}, tmp_path / "vae.safetensors")
    with pytest.raises(InputError, match=r"vae\.safetensors: is not of .*--parts"):
        make_parts(tmp_path, release=release)


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
    tasks = {task: 1.0 for task in Task if task not in (Task.CHAT, Task.SUBJECT_VIDEO)}
    world = EncodedWorld(parts.folder)
    first, again, other = (list(islice(world.rows(tasks, 0, step), 64)) for step in (3, 3, 4))
    assert [row.prompt for row in first] == [row.prompt for row in again]
    assert [row.prompt for row in first] != [row.prompt for row in other]
    assert {row.task for row in islice(world.rows(tasks, 1), 800)} == set(tasks)


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
    for row in islice(EncodedWorld(parts.folder).rows({Task.T2I: 1.0}, 0), 60):
        assert row.target is not None and not torch.equal(row.target.latents, latents[-1])


@pytest.fixture
def encoded(tmp_path: Path) -> Path:
    """A folder of items whose features and latents are their own row's number, as no encoder would make."""
    for kind in KINDS:
        count = 4 * kind.scenes_each
        tokens, frames = 16 * ((kind.frames + 1) // 2), (kind.frames + 3) // 4
        rows = torch.arange(count, dtype=torch.float16)
        save_file(
            {"values": rows[:, None, None].expand(-1, tokens, 8).clone()}, stored(tmp_path, kind, "features")
        )
        latents = rows[:, None, None, None, None].expand(-1, frames, 6, 6, 48).clone()
        save_file({"values": latents}, stored(tmp_path, kind, "latents"))
    return tmp_path


def number(view: View) -> int:
    """The row of a view of `encoded`."""
    assert view.features is not None and view.latents is not None
    assert torch.equal(view.features.unique(), view.latents.unique())
    return int(view.features.unique())


def scenes_of(name: str, number: int) -> tuple[Scene, int]:
    """(scene, which of its item) that a row of the kind stands for."""
    kind = next(kind for kind in KINDS if kind.name == name)
    item, place = divmod(number, kind.scenes_each)
    return draw(kind, item)[0][place], place


def rows_of(folder: Path, name: str, count: int = 40) -> list[Row]:
    return list(islice(EncodedWorld(folder).rows({name: 1.0}, 0), count))


def test_boxes_are_those_of_the_picture(encoded: Path) -> None:
    for row in rows_of(encoded, "boxes"):
        scene, _ = scenes_of("image", number(row.sources[0]))
        assert row.answer is not None
        assert set(read_boxes(row.answer)) <= {box(thing, 112) for thing in scene.things}


def test_words_in_pictures_are_drawn_edited_and_read(encoded: Path) -> None:
    rows = rows_of(encoded, "written")
    (kind,) = (kind for kind in KINDS if kind.name == "written")
    assert {row.task for row in rows} == {Task.T2I, Task.IMAGE_EDIT, Task.X2T_IMAGE}
    for row in rows:
        scene, place = scenes_of("written", number((*row.sources, row.target)[0]))
        assert place == 0
        if row.task is Task.IMAGE_EDIT:
            assert row.prompt == draw(kind, number(row.target) // 2)[1][0]
            assert number(row.target) == number(row.sources[0]) + 1
        elif row.prompt in ("what does the text say?", "which word is written?"):
            assert scene.text and row.answer == scene.text.word.lower()


def test_several_pictures_are_shown_in_order(encoded: Path) -> None:
    rows = rows_of(encoded, "several")
    assert {len(row.sources) for row in rows} == {2, 3}
    for row in rows:
        numbers = list(map(number, row.sources))
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) and numbers[0] % 3 == 0
        if row.prompt == "how many shapes are there in all pictures?":
            total = sum(len(scenes_of("several", n)[0].things) for n in numbers)
            assert row.answer == NUMBERS[total]


def test_the_last_turn_of_a_conversation_is_learnt(encoded: Path) -> None:
    rows = rows_of(encoded, "turns")
    assert {row.task for row in rows} == {Task.IMAGE_EDIT, Task.X2T_IMAGE}
    encode = tokenizer().encode_with_offsets
    for row in rows:
        seen = [number(view) % 3 for view in row.views()]
        assert seen == sorted(seen) and len({number(view) // 3 for view in row.views()}) == 1
        assert row.history and not row.sources
        sample = to_sample(row, encode, tiny_config())
        learnt = [s for s in sample if s.role in (Role.ANSWER, Role.TARGET)]
        assert [s.kind for s in learnt] == [Kind.NOISY if row.target is not None else Kind.TEXT]
        if row.target is not None:
            assert torch.equal(learnt[0].latents, row.target.latents)
        else:
            assert tokenizer().decode(learnt[0].ids.tolist()).startswith(row.answer)


def test_a_story_says_what_comes_first(encoded: Path) -> None:
    rows = rows_of(encoded, "story")
    assert {row.task for row in rows} == {Task.T2V, Task.VIDEO_EDIT, Task.X2T_VIDEO}
    for row in rows:
        if row.task is Task.X2T_VIDEO:
            scene, _ = scenes_of("story", number(row.sources[0]))
            [first] = [thing for thing in scene.things if thing.when == "early"]
            assert row.answer in (first.shape, f"{first.color} {first.shape}")


def test_a_short_prompt_is_drawn_as_its_scene_has_it(encoded: Path) -> None:
    for row in rows_of(encoded, "brief"):
        assert row.task is Task.T2I and row.target is not None
        (scene, _), words = scenes_of("brief", number(row.target)), row.prompt
        assert words.startswith(("a ", "an ", "two ", "three ", "four "))
        assert " on " not in words or words.endswith(f" on {scene.ground}")
        assert all(thing.shape in words for thing in scene.things)


def test_pairs_ask_about_one_of_two_things(encoded: Path) -> None:
    rows = rows_of(encoded, "pairs", 200)
    for row in rows:
        scene, _ = scenes_of("image", number(row.sources[0]))
        assert row.task is Task.X2T_IMAGE and len(scene.things) > 1
    asked = {row.answer for row in rows}
    assert {"yes", "no"} < asked and asked & {"left", "right", "above", "below"}


def test_every_share_is_of_all_and_the_last_mixture_has_everything(encoded: Path) -> None:
    for mixture in MIXTURES.values():
        for shares in mixture.values:
            assert np.isclose(sum(shares.values()), 1.0)
            assert set(shares) <= set(LAST)
    rows = islice(EncodedWorld(encoded).rows(LAST, 0), 300)
    assert {len(row.sources) for row in rows} >= {0, 1, 2, 3}


def test_a_feed_draws_by_the_mixture_of_its_step(encoded: Path) -> None:
    changes: Schedule[Shares] = Schedule(((0, {Task.T2I: 1.0}), (2, {"boxes": 1.0})))
    encode = tokenizer().encode_with_offsets
    feed = WorldFeed(EncodedWorld(encoded), changes, encode, tiny_config(), lanes=1, tokens=100)
    drawn = [
        any(segment.kind is Kind.NOISY for sample in pack.samples for segment in sample)
        for step in range(4)
        for pack in feed.packs(step)
    ]
    assert drawn == [True, True, False, False]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_items_are_fixed_and_never_held_out(kind) -> None:  # type: ignore[no-untyped-def]
    for index in range(40):
        scenes, words = draw(kind, index)
        again, same_words = draw(kind, index)
        assert (scenes, words) == (again, same_words)
        assert len(scenes) == kind.scenes_each
        assert not any(is_held_out(scene) for scene in scenes)


def test_all_stages_together_have_every_task_that_nano_learns() -> None:
    wide = {"brief", "pairs", "boxes", "written", "several", "turns", "story"}
    assert set(LAST) == set(Task) - {Task.CHAT, Task.SUBJECT_VIDEO} | wide


def test_every_preset_has_a_mixture() -> None:
    """Those that learn from data: rewards need none."""
    learning = [preset(name) for name in PRESETS]
    assert {config.stage for config in learning if not isinstance(config, RLConfig)} == set(MIXTURES)


def test_the_tokenizer_knows_the_world_in_whole_words(tmp_path: Path) -> None:
    tokenizer = nano_tokenizer(tmp_path / "tokenizer")
    assert tokenizer.size <= 512
    assert len(tokenizer.encode("a large red circle at the top left on white")) == 10
