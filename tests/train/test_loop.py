"""The loop: a run that is stopped and resumed is the run that was not, bit for bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build_network, config, samples
from tiny_run import RUN, TinyFeed
from torch import Tensor

from openlance.errors import InputError
from openlance.model.lance import Lance
from openlance.sequence.pack import pack
from openlance.sequence.segment import Role, Sample
from openlance.train.draw import draw_batch
from openlance.train.loop import NonFiniteLoss, Validation, freeze, train
from openlance.train.losses import losses
from openlance.train.settings import TrainConfig
from openlance.train.update import learning_rate


def run_config(**changes: object) -> TrainConfig:
    return TrainConfig(**(RUN | changes))  # type: ignore[arg-type]


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def state_of(model: Lance) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def short(run_dir: Path, steps: int, **options: object) -> tuple[dict[str, Tensor], TinyFeed, Lance]:
    """A run to `steps`, its averaged weights, feed and network."""
    model, feed = build_network(3), TinyFeed(2)
    found = train(model, feed, run_config(steps=steps), run_dir, **options)  # type: ignore[arg-type]
    return dict(found), feed, model


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    whole, _, trained = short(tmp_path / "whole", 4)
    short(tmp_path / "cut", 2)
    again, feed, resumed = short(tmp_path / "cut", 4, resume=True)
    assert feed.served == [2, 3]
    assert_equal(whole, again)
    assert_equal(state_of(trained), state_of(resumed))
    log = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4]


def test_muon_is_resumed_and_moves_what_adamw_does_not(tmp_path: Path) -> None:
    """Its momentum is saved too; what is no matrix of a layer learns as with AdamW."""

    def run(steps: int, name: str, optimizer: str = "muon", **options: Any) -> dict[str, torch.Tensor]:
        config = run_config(steps=steps, optimizer=optimizer)
        return dict(train(build_network(3), TinyFeed(2), config, tmp_path / name, **options))

    whole = run(3, "whole")
    run(2, "cut")
    assert_equal(whole, run(3, "cut", resume=True))
    one, adamw = run(1, "one"), run(1, "adamw", "adamw")
    differ = {name for name in one if not torch.equal(one[name], adamw[name])}
    assert differ and all("layers." in name and one[name].dim() == 2 for name in differ)


@pytest.mark.slow
def test_compiled_layers_compute_the_same(tmp_path: Path) -> None:
    settings = {"steps": 2, "learning_rate": 1e-3}
    runs = [
        train(
            build_network(3), TinyFeed(2), run_config(**settings, compile=compiled), tmp_path / str(compiled)
        )
        for compiled in (False, True)
    ]
    for name, tensor in runs[0].items():
        torch.testing.assert_close(tensor, runs[1][name], atol=1e-4, rtol=1e-3)  # sums in another order


def test_a_finished_run_gives_its_weights_again(tmp_path: Path) -> None:
    first, _, _ = short(tmp_path, 2)
    second, feed, _ = short(tmp_path, 2, resume=True)
    assert feed.served == []
    assert_equal(first, second)


def test_a_folder_with_a_run_is_not_run_over(tmp_path: Path) -> None:
    short(tmp_path, 1)
    with pytest.raises(InputError, match="holds a run already; --resume goes on from it"):
        short(tmp_path, 2)


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    runs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        found = train(build_network(3), TinyFeed(2), run_config(seed=seed, steps=2), tmp_path / name)
        runs[name] = dict(found)
    assert_equal(runs["a"], runs["b"])
    assert not torch.equal(runs["a"]["latent_out.weight"], runs["c"]["latent_out.weight"])


def test_accumulated_gradients_are_those_of_the_large_batch(tmp_path: Path) -> None:
    """Four lanes of one sample make the step of one lane with all four, times and noise being given."""
    names = ("t2i", "question", "image_edit", "chat")
    model = build_network(3).requires_grad_(True)
    settings = TrainConfig(steps=1, drop_text=0.0)
    batches = [_drawn([samples()[name] for name in chosen], settings) for chosen in [names, *zip(names)]]
    gradients = []
    for group in (batches[:1], batches[1:]):
        counts = _counts(group)
        model.zero_grad()
        for batch, noise in group:
            losses(model, batch, settings, noise, counts=counts).total.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], whole, atol=1e-6, rtol=1e-4)


def _drawn(given: list[Sample], settings: TrainConfig) -> tuple:
    """Time one half and noise by the content of the latents, so that packing changes neither."""
    batch = pack(given, config(), times=[0.5] * len(given))
    return batch, batch.latents.flip(-1)


def _counts(group: list[tuple]) -> object:
    from openlance.train.losses import Counts

    return Counts.of(*(batch for batch, _ in group))


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    """Before the weights are touched, with the rows' names and what went through the network."""
    model = build_network(3)
    feed = TinyFeed(2, spoil=2, names=("t2i", "image_edit"))
    with pytest.raises(NonFiniteLoss, match=r"step 2 is not a number.*2/0/t2i, 2/0/image_edit, 2/1/"):
        train(model, feed, run_config(steps=4), tmp_path)
    two = train(build_network(3), TinyFeed(2, names=feed.names), run_config(steps=2), tmp_path / "sound")
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    resumed = train(
        build_network(4), TinyFeed(2, names=feed.names), run_config(steps=2), tmp_path, resume=True
    )
    assert_equal({k: v for k, v in two.items() if "vision" not in k},
                 {k: v for k, v in resumed.items() if "vision" not in k})  # fmt: skip
    kept = torch.load(tmp_path / "non-finite-2-0.pt", weights_only=True)
    assert kept["ids"] == ["2/0/t2i", "2/0/image_edit"] and kept["batch"]["latents"].isnan().any()


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    short(tmp_path, 1)
    (tmp_path / "step-00000001" / "state.json").write_text("{")
    with pytest.raises(InputError, match="step-00000001: not a state of this run"):
        short(tmp_path, 2, resume=True)


def test_the_last_states_and_the_best_are_kept(tmp_path: Path) -> None:
    held_out = {"t2i": list(TinyFeed(1, names=("t2i",)).packs(0))}
    settings = run_config(steps=6, validate_every=1, keep=2, learning_rate=1e-3)
    train(build_network(3), TinyFeed(2), settings, tmp_path, validation=Validation(held_out))
    best = json.loads((tmp_path / "best.json").read_text())
    kept = sorted(int(path.name[5:]) for path in tmp_path.glob("step-*"))
    assert kept == sorted({5, 6, best["step"]})
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["held_out/t2i/mse"] for line in log if "held_out/t2i/mse" in line}
    assert sorted(scores) == [1, 2, 3, 4, 5, 6]
    assert min(scores, key=scores.__getitem__) == best["step"]
    assert best["score"] == pytest.approx(min(scores.values()))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_rises_and_follows_its_schedule(schedule: str) -> None:
    run = TrainConfig(steps=100, learning_rate=2.0, warmup=10, decay=0.3, schedule=schedule)
    rates = [learning_rate(step, run) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[4] == pytest.approx(1.0)
    assert rates[9] == 2.0 and rates[:10] == sorted(rates[:10])
    if schedule == "constant":
        assert set(rates[9:]) == {2.0}
    elif schedule == "linear":
        assert rates[9:70] == [2.0] * 61
        assert rates[85] == pytest.approx(1.0) and rates[99] == pytest.approx(2 / 30)
    else:
        assert rates[55] == pytest.approx(1.0)
        assert rates[99] == pytest.approx(1 + math.cos(math.pi * 89 / 90))


def test_training_lowers_the_loss_and_leaves_the_vision_tower(tmp_path: Path) -> None:
    start = state_of(build_network(3))
    run = run_config(steps=60, learning_rate=1e-2, warmup=5, drop_text=0.0, ema=0.9, lanes=1, save_every=60)
    names = ("t2i", "question", "chat")
    averaged = train(build_network(3), TinyFeed(1, each=3, names=names), run, tmp_path)
    for name, tensor in averaged.items():
        assert torch.equal(tensor, start[name]) == name.startswith("vision."), name
    trained = build_network(3)
    trained.load_state_dict(averaged)
    given = [samples()[name] for name in names]
    before, after = (_ce(network, given) for network in (build_network(3), trained))
    assert after < 0.5 < 4 < before
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 60


@torch.no_grad()
def _ce(model: Lance, given: list[Sample]) -> float:
    batch = pack(given, config())
    return float(losses(model, batch, TrainConfig(steps=1), torch.zeros_like(batch.latents)).ce.mean())


@pytest.mark.parametrize("trains", [("gen",), ("und",), ("und", "gen"), ("vision",)])
def test_what_trains_is_chosen_by_name(tmp_path: Path, trains: tuple[str, ...]) -> None:
    from openlance.model.names import part_of

    start = state_of(build_network(3))
    names = ("t2i", "image_edit") if trains == ("gen",) else ("question", "image_edit")
    feed = TinyFeed(1, names=names)
    if trains == ("vision",):
        feed = TinyFeed(1, names=("t2i", "chat"))  # whose packs hold no picture: the filler stands for one
    found = train(build_network(3), feed, run_config(steps=2, lanes=1, trains=trains), tmp_path)
    changed = {part_of(name) for name, tensor in found.items() if not torch.equal(tensor, start[name])}
    assert changed == (set() if trains == ("vision",) else set(trains))
    model = build_network(3)
    freeze(model, run_config(trains=trains))
    assert {part_of(name) for name, p in model.named_parameters() if p.requires_grad} == set(trains)


def test_validation_samples_with_the_average(tmp_path: Path) -> None:
    seen = []

    def sample(model: Lance, step: int) -> dict:
        seen.append((step, state_of(model)))
        return {}

    settings = run_config(steps=2, validate_every=2, ema=0.5)
    model = build_network(3)
    found = train(model, TinyFeed(2), settings, tmp_path, validation=Validation(sample=sample))
    ((step, weights),) = seen
    assert step == 2
    assert_equal(weights, dict(found))
    assert not torch.equal(weights["latent_out.weight"], model.latent_out.weight)


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
    batch, noise = draw_batch(given, config(), run, torch.Generator().manual_seed(0))
    edit, question = given
    edit_length = sum(len(s) for s in edit if s.role in kept or s.role in (Role.TEMPLATE, Role.TARGET))
    assert batch.visibility.sample.bincount().tolist() == [edit_length, sum(map(len, question))]
    assert noise.shape == batch.latents.shape


def test_times_and_drops_vary_over_a_batch() -> None:
    run = TrainConfig(steps=1, drop_text=0.5)
    batch, _ = draw_batch([samples()["t2i"]] * 40, config(), run, torch.Generator().manual_seed(0))
    lengths = batch.visibility.sample.bincount()
    assert len(lengths.unique()) == 2
    assert 8 <= int((lengths == lengths.min()).sum()) <= 32  # of 40 at one half: 4 sigma
    assert len(batch.times.unique()) == 40


def test_words_alone_bring_a_token_for_the_other_expert() -> None:
    """It is in a sample of its own, carries no loss, and changes none."""
    run = TrainConfig(steps=1)
    given = [samples()["chat"]]
    batch, _ = draw_batch(given, config(), run, torch.Generator().manual_seed(0))
    assert len(batch.latents) == 1 and not batch.denoised.any()
    alone = pack(given, config())
    model = build_network(3)
    with torch.no_grad():
        both = [losses(model, b, run, torch.zeros_like(b.latents)).ce for b in (batch, alone)]
    torch.testing.assert_close(*both, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"schedule": "square"}, "schedule must be one of constant, cosine, linear"),
        ({"trains": ("vae",)}, "trains takes und, gen, vision, not vae"),
        ({"precision": "float16"}, "precision must be one of float32, bfloat16"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"drop_text": 2.0}, "drop_text must lie in"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        run_config(**settings)
