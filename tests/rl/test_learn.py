"""The stage as a whole, on the tiny network and a reward of brightness."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build_network
from tiny_rl import bright, even, prompt, rl_config, run, tiny_held_out
from torch import Tensor

from openlance.errors import InputError
from openlance.model.adapters import add_lora
from openlance.model.names import part_of
from openlance.rl.learn import HeldOut
from openlance.rl.rewards import RewardError, Rewards
from openlance.train.parallel import leave

SCRIPT = Path(__file__).parent / "tiny_rl.py"


def log_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_on_policy_the_ratio_is_one_to_the_bit(tmp_path: Path) -> None:
    """With guidance, in one pass and in several, on a first and a second rollout; afterwards it is not."""
    names = ("t2i", "image_edit")
    for name, changes in (("whole", {}), ("parts", {"tokens": 40, "window": 2}), ("more", {"updates": 2})):
        run(tmp_path / name, rl_config(**changes), names=names)
        for line in log_of(tmp_path / name):
            assert line["first_ratio_off"] == 0.0
            assert (line["ratio"] == 1.0 and line["clipped"] == 0.0) == (name != "more")


def test_in_bfloat16_the_ratio_is_one_as_well(tmp_path: Path) -> None:
    try:
        run(tmp_path, rl_config(precision="bfloat16", kl=0.1))
    finally:
        leave()
    first, second = log_of(tmp_path)
    assert first["first_ratio_off"] == second["first_ratio_off"] == first["kl"] == 0.0 < second["kl"]


@pytest.mark.parametrize("changes", [{"kl": 0.1, "updates": 2}, {"algorithm": "nft", "guidance": 1.0}])
def test_resumed_is_uninterrupted(tmp_path: Path, changes: dict) -> None:
    names = ("t2i", "image_edit", "i2v")
    whole, trained, _ = run(tmp_path / "whole", rl_config(steps=3, **changes), names=names)
    run(tmp_path / "cut", rl_config(steps=1, **changes), names=names)
    again, resumed, feed = run(tmp_path / "cut", rl_config(steps=3, **changes), names=names, resume=True)
    assert feed.served == [1, 2]
    assert_equal(whole, again)
    assert_equal(trained.state_dict(), resumed.state_dict())
    start = build_network(3).state_dict()
    assert {part_of(name) for name, t in trained.state_dict().items() if not torch.equal(t, start[name])} == {
        "gen"
    }


def test_the_divergence_begins_at_nothing(tmp_path: Path) -> None:
    run(tmp_path, rl_config(kl=0.1, steps=2))
    first, second = log_of(tmp_path)
    assert first["kl"] == 0.0 < second["kl"]


def test_equal_rewards_teach_nothing_and_it_is_said(tmp_path: Path) -> None:
    _, trained, _ = run(tmp_path, rl_config(), rewards=Rewards({"even": even}))
    assert_equal(trained.state_dict(), build_network(3).state_dict())
    for line in log_of(tmp_path):
        assert (line["without_spread"], line["reward"], line["reward_spread"]) == (1.0, 0.25, 0.0)
        assert "ratio" not in line


def test_adapters_alone_learn(tmp_path: Path) -> None:
    """The reference is the network without them, as they begin at nothing."""
    model = build_network(3)
    add_lora(model, ("gen",), rank=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(tmp_path, rl_config(lora_rank=2, kl=0.1), model=model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all("lora_" in name for name in changed)
    assert log_of(tmp_path)[0]["kl"] == 0.0


def test_a_reward_that_is_none_stops_the_run(tmp_path: Path) -> None:
    rewards = Rewards({"bright": bright, "mine": lambda p, m, d: [float("nan")] * len(p)})
    with pytest.raises(RewardError, match="the reward mine gave nan for 't2i'"):
        run(tmp_path, rl_config(), rewards=rewards)


def test_held_out_prompts_are_measured_with_a_second_reward(tmp_path: Path) -> None:
    """On the averaged weights; what they look like is kept."""
    held_out = HeldOut([prompt("t2i"), prompt("i2v")], Rewards({"even": even}))
    run(tmp_path, rl_config(steps=2, validate_every=1), held_out=held_out)
    measured = [line for line in log_of(tmp_path) if "held_out/reward" in line]
    assert [line["step"] for line in measured] == [1, 2]
    assert all(line["held_out/even"] == 0.25 for line in measured)
    assert measured[0]["held_out/bright"] == measured[0]["held_out/reward"] != measured[1]["held_out/reward"]
    assert sorted(file.name for file in (tmp_path / "samples").iterdir()) == [
        "step-00000001.png", "step-00000002.png",
    ]  # fmt: skip
    assert json.loads((tmp_path / "best.json").read_text())["score"] == min(
        -line["held_out/reward"] for line in measured
    )


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"group": 1}, "group must be at least 2"),
        ({"window": 4}, "a window of 4 steps does not fit into the first 2 of 4"),
        ({"algorithm": "ppo"}, "algorithm must be one of grpo, nft"),
        ({"algorithm": "nft"}, "nft learns without guidance"),
        ({"kl": -1.0}, "kl must be 0 or more"),
        ({"noise": 0.0}, "noise must be above 0"),
        ({"lora_dropout": 0.1}, "lora_dropout must be 0"),
        ({"updates": 0}, "updates must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        rl_config(**changes)


def test_a_folder_with_a_run_is_not_run_over(tmp_path: Path) -> None:
    run(tmp_path, rl_config(steps=1))
    with pytest.raises(InputError, match="holds a run already"):
        run(tmp_path, rl_config(steps=2))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"ratio_range": 0.2}, {"algorithm": "nft", "guidance": 1.0}])
def test_what_is_rewarded_comes_more_often(tmp_path: Path, changes: dict) -> None:
    settings = rl_config(steps=30, learning_rate=3e-3, lanes=2, group=8, noise=1.0, save_every=30, **changes)
    run(tmp_path, settings)
    rewards = [line["reward"] for line in log_of(tmp_path)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"kl": 0.1, "ratio_range": 0.2},
        {"algorithm": "distill", "guidance": 1.0, "rollout_steps": 2, "teacher_steps": 4},
    ],
)
def test_two_processes_learn_what_one_learns(tmp_path: Path, changes: dict) -> None:
    """The same groups from the same noise: weights agree up to the order of sums."""
    settings = {"steps": 2, "lanes": 2, "validate_every": 1, **changes}
    one, two = (tmp_path / name for name in ("one", "two"))
    whole, _, _ = run(one, rl_config(**settings), held_out=tiny_held_out())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    given = [str(two), json.dumps(settings), "--weights", str(tmp_path / "two.pt")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*launcher, str(SCRIPT), *given],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, tensor in torch.load(tmp_path / "two.pt", weights_only=True).items():
        torch.testing.assert_close(tensor, whole[name], atol=1e-5, rtol=1e-4, msg=name)
    for first, second in zip(log_of(one), log_of(two), strict=True):
        assert first.keys() == second.keys()
        for name in {"reward", "held_out/reward", "kl", "first_ratio_off", "norm", "error"} & first.keys():
            assert second[name] == pytest.approx(first[name], rel=1e-3, abs=1e-6), name
