"""The loop: a run that is stopped and resumed is the run that was not, bit for bit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import build_network, config, samples

from openlance.config import TrainConfig
from openlance.errors import InputError
from openlance.model.lance import Lance
from openlance.sequence.pack import pack
from openlance.sequence.segment import Role, Sample
from openlance.train.loop import NonFiniteLoss, draw_batch, learning_rate, train
from openlance.train.losses import losses

RUN = TrainConfig(steps=4, batch=3, learning_rate=1e-2, warmup=2, drop_text=0.3, ema=0.5)
NAMES = list(samples())


class Stopped(Exception):
    """Stands for a killed process."""


def data(step: int) -> list[Sample]:
    """Three samples, other ones each step."""
    return [samples()[NAMES[(3 * step + i) % len(NAMES)]] for i in range(3)]


def state_of(model: Lance) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    differ = [name for name in first if not torch.equal(first[name], second[name])]
    assert differ == []


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    whole = build_network(3)
    averaged = train(whole, data, RUN, tmp_path / "whole")

    def cut(step: int) -> list[Sample]:
        if step == 2:
            raise Stopped
        return data(step)

    with pytest.raises(Stopped):
        train(build_network(3), cut, RUN, tmp_path / "cut", save_seconds=0.0)
    resumed = build_network(4)  # whatever it begins with, the file decides
    steps: list[int] = []

    def rest(step: int) -> list[Sample]:
        steps.append(step)
        return data(step)

    again = train(resumed, rest, RUN, tmp_path / "cut")
    assert steps == [2, 3]
    assert_equal(state_of(whole), state_of(resumed))
    assert_equal(state_of(averaged), state_of(again))


def test_a_finished_run_gives_its_model_again(tmp_path: Path) -> None:
    first = train(build_network(3), data, RUN, tmp_path)
    second = train(build_network(5), lambda step: pytest.fail("nothing is left to do"), RUN, tmp_path)
    assert_equal(state_of(first), state_of(second))


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    runs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        runs[name] = state_of(train(build_network(3), data, replace(RUN, seed=seed), tmp_path / name))
    assert_equal(runs["a"], runs["b"])
    assert not torch.equal(runs["a"]["head.weight"], runs["c"]["head.weight"])


def test_each_step_draws_anew(tmp_path: Path) -> None:
    """The same samples get other times and other noise at another step."""
    model, times, noisy = build_network(3), [], []

    def note(module: Lance, given: tuple, options: dict) -> None:
        times.append(float(given[0].times.max()))
        noisy.append(options["latents"])

    model.register_forward_pre_hook(note, with_kwargs=True)
    train(model, lambda step: [samples()["t2i"]], RUN, tmp_path)
    assert len(set(times)) == RUN.steps
    clean = samples()["t2i"][-2].latents.flatten(0, 2)
    drawn = [(x - (1 - t) * clean) / t for x, t in zip(noisy, times, strict=True)]
    assert float(torch.pdist(torch.stack(drawn).flatten(1)).min()) > 1


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    """Before the weights are touched, with the step; the saved state is the last sound one."""
    model = build_network(3)
    sound: dict[str, torch.Tensor] = {}

    def spoiled(step: int) -> list[Sample]:
        if step < 2:
            return data(step)
        sound.update(state_of(model))
        *before, target, after = samples()["t2i"]
        broken = replace(target, latents=torch.full_like(target.latents, math.nan))
        return [[*before, broken, after]]

    with pytest.raises(NonFiniteLoss, match="step 2 is nan"):
        train(model, spoiled, RUN, tmp_path, save_seconds=0.0)
    assert_equal(state_of(model), sound)
    saved = torch.load(tmp_path / "joint.pt", weights_only=True)
    assert saved["step"] == 2
    assert_equal(saved["model"], sound)


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"x": torch.zeros(1)}, "ema": {}, "optimizer": {}, "step": 1}, tmp_path / "joint.pt")
    with pytest.raises(InputError, match=r"joint\.pt does not hold a state of this model"):
        train(build_network(3), data, RUN, tmp_path)
    (tmp_path / "joint.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"joint\.pt does not hold a state"):
        train(build_network(3), data, RUN, tmp_path)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    run = TrainConfig(steps=100, learning_rate=2.0, warmup=10, decay=0.3)
    rates = [learning_rate(step, run) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[4] == pytest.approx(1.0)
    assert rates[9:70] == [2.0] * 61
    assert rates[85] == pytest.approx(1.0) and rates[99] == pytest.approx(2 / 30)
    assert rates[:10] == sorted(rates[:10]) and rates[70:] == sorted(set(rates[70:]), reverse=True)
    constant = TrainConfig(steps=100, learning_rate=2.0, warmup=0, decay=0.0)
    assert {learning_rate(step, constant) for step in range(100)} == {2.0}


def test_training_lowers_the_loss_and_leaves_the_vision_tower(tmp_path: Path) -> None:
    model = build_network(3)
    start = state_of(model)
    run = TrainConfig(steps=30, learning_rate=1e-2, warmup=5, drop_text=0.0, ema=0.9)
    given = [samples()["t2i"], samples()["question"], samples()["chat"]]
    averaged = train(model, lambda step: given, run, tmp_path, name="small")
    for trained in (model, averaged):
        for name, tensor in trained.state_dict().items():
            changed = not torch.equal(tensor, start[name])
            assert changed != name.startswith("vision."), name
    (line,) = [json.loads(line) for line in (tmp_path / "small.jsonl").read_text().splitlines()]
    assert line["step"] == 30
    before, after = (_ce(network, given) for network in (build_network(3), averaged))
    assert after < 0.5 < 4 < before
    assert json.loads((tmp_path / "small.json").read_text())["steps"] == 30


@torch.no_grad()
def _ce(model: Lance, given: list[Sample]) -> float:
    batch = pack(given, config())
    return float(losses(model, batch, RUN, torch.zeros_like(batch.latents)).ce.mean())


def test_validation_runs_on_the_average(tmp_path: Path) -> None:
    seen: list[tuple[int, bool]] = []
    model = build_network(3)

    def validate(averaged: Lance, step: int) -> dict[str, float]:
        seen.append((step, averaged is model))
        return {"score": 0.5}

    train(model, data, RUN, tmp_path, validate=validate, validate_every=2)
    assert seen == [(2, False), (4, False)]
    assert '"score": 0.5' in (tmp_path / "joint.jsonl").read_text()


@pytest.mark.parametrize(
    "settings, kept",
    [
        ({"drop_text": 0.0, "drop_all": 0.0}, {Role.USER, Role.SOURCE}),
        ({"drop_text": 1.0, "drop_all": 0.0}, {Role.SOURCE}),
        ({"drop_text": 0.0, "drop_all": 1.0}, set()),
    ],
)
def test_conditions_are_dropped_where_something_is_generated(settings: dict, kept: set[Role]) -> None:
    """An answer keeps its question: only what guidance needs is learnt without conditions."""
    run = TrainConfig(steps=1, **settings)
    given = [samples()["image_edit"], samples()["question"]]
    batch, noise = draw_batch(given, build_network(3), run, torch.Generator().manual_seed(0))
    edit, question = given
    edit_length = sum(len(s) for s in edit if s.role in kept or s.role in (Role.TEMPLATE, Role.TARGET))
    assert batch.visibility.sample.bincount().tolist() == [edit_length, sum(map(len, question))]
    assert noise.shape == batch.latents.shape


def test_times_and_drops_vary_over_a_batch() -> None:
    run = TrainConfig(steps=1, drop_text=0.5)
    given = [samples()["t2i"]] * 40
    batch, _ = draw_batch(given, build_network(3), run, torch.Generator().manual_seed(0))
    lengths = batch.visibility.sample.bincount()
    assert len(lengths.unique()) == 2
    assert 8 <= int((lengths == lengths.min()).sum()) <= 32  # of 40 at one half: 4 sigma
    assert len(batch.times.unique()) == 40
