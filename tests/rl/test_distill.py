"""Few steps without guidance, learnt from many with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import build_network, network
from tiny_rl import TinyPrompts, decode, prompt, rl_config
from torch import Tensor

from openlance.config import SamplingConfig
from openlance.errors import InputError
from openlance.flow.path import time_grid
from openlance.flow.solver import euler
from openlance.model.lance import Lance
from openlance.rl.distill import Distillation
from openlance.rl.learn import HeldOut, train_rl
from openlance.rl.prompts import DRAWN, of_tasks
from openlance.rl.rollout import Targets
from openlance.train.losses import Objective
from openlance.train.parallel import Ranks
from openlance.train.settings import RLConfig, TrainConfig

TEACHER = SamplingConfig(steps=6, shift=2.0, guidance=3.0, guidance_interval=(0.0, 1.0))
STUDENT = replace(TEACHER, guidance=1.0)


def config(**changes: object) -> RLConfig:
    ours = {"algorithm": "distill", "guidance": 1.0, "rollout_steps": 3, "teacher_steps": 6, "ema": 0.0}
    return rl_config(**{**ours, **changes})


def targets(model: Lance, sampling: SamplingConfig, name: str = "t2i") -> Targets:
    return Targets(Objective(model, TrainConfig(steps=1)), prompt(name).sample, range(2), sampling, Ranks())


def sampled(group: Targets, steps: int, seed: int = 0) -> Tensor:
    """What the ODE makes of noise in so many steps."""
    with torch.no_grad():
        start = group.draw(torch.Generator().manual_seed(seed))
        *_, end = euler(group.velocity, start, time_grid(steps, 2.0))
    return end


@pytest.mark.parametrize("name", ["t2i", "i2v", "image_edit"])
def test_steps_by_the_goals_lead_where_the_teacher_ends(name: str) -> None:
    group = targets(network(), STUDENT, name)
    algorithm = Distillation(config(), TEACHER)
    end, visits = algorithm.explore(group, range(3), torch.Generator().manual_seed(0))
    torch.testing.assert_close(end, sampled(group.sampled(TEACHER), 6), atol=1e-6, rtol=0)
    assert [visit.step.t for visit in visits] == time_grid(3, 2.0)[:-1].tolist()
    state = visits[0].state
    for visit in visits:
        torch.testing.assert_close(visit.state, state, atol=1e-5, rtol=0)
        state = state - visit.goal * visit.step.delta
    torch.testing.assert_close(state, end, atol=1e-5, rtol=0)


def test_the_loss_is_the_squared_distance_from_the_goal() -> None:
    group = targets(network(), STUDENT)
    algorithm = Distillation(config(), TEACHER)
    _, visits = algorithm.explore(group, range(3), torch.Generator().manual_seed(0))
    judged = algorithm.judge(visits[0], visits[0].goal + 0.5, torch.ones(2))
    torch.testing.assert_close(judged.loss, torch.full((2,), 0.25))
    assert algorithm.judge(visits[0], visits[0].goal, torch.ones(2)).loss.sum() == 0


def learn(folder: Path, steps: int, *, resume: bool = False, **changes: object) -> Lance:
    model = build_network(3)
    sampling = replace(
        model.config.sampling, guidance=3.0, guidance_interval=(0.0, 1.0), visual_guidance=None
    )
    model.config = replace(model.config, sampling=sampling)
    chosen = config(steps=steps, lanes=1, learning_rate=3e-3, **changes)
    train_rl(model, TinyPrompts(1), chosen, folder, decode=decode, rewards=None, resume=resume)
    return model


def test_the_student_comes_near_to_the_guided_teacher(tmp_path: Path) -> None:
    """From noise that it has not seen, in half the steps; the teacher stays what the run began with."""
    wanted = sampled(targets(build_network(3), TEACHER), 6, seed=99)
    before = sampled(targets(build_network(3), STUDENT), 3, seed=99)
    after = sampled(targets(learn(tmp_path, 40), STUDENT), 3, seed=99)
    assert (after - wanted).square().mean() < 0.2 * (before - wanted).square().mean()


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    """The teacher is what the run was given at first, not what it had become."""
    whole = learn(tmp_path / "whole", 3).state_dict()
    learn(tmp_path / "cut", 1)
    again = learn(tmp_path / "cut", 3, resume=True).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_held_out_prompts_are_shown_without_a_reward(tmp_path: Path) -> None:
    model = build_network(3)
    train_rl(
        model, TinyPrompts(1), config(steps=1, lanes=1, validate_every=1), tmp_path,
        decode=decode, rewards=None, held_out=HeldOut([prompt("t2i")]),
    )  # fmt: skip
    assert (tmp_path / "samples" / "step-00000001.png").stat().st_size > 0


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"guidance": 2.0}, "distill learns without guidance"),
        ({"teacher_steps": 7}, r"teacher_steps must be a multiple of rollout_steps \(3\), not 7"),
        ({"kl": 0.1}, "set kl to 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        config(**changes)


def test_other_algorithms_want_a_reward(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no reward"):
        train_rl(build_network(3), TinyPrompts(1), rl_config(), tmp_path, decode=decode, rewards=None)


def test_the_world_asks_for_every_kind_of_picture() -> None:
    draw, rng = of_tasks(96), np.random.default_rng(0)
    found = [draw(rng) for _ in range(200)]
    assert {metadata["task"] for _, metadata in found} == set(DRAWN)
    for words, metadata in found:
        assert words and ("picture" in metadata) == (metadata["task"] not in ("t2i", "t2v"))
        assert "picture" not in metadata or metadata["picture"].shape == (96, 96, 3)
