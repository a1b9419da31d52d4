"""Training on real processes: spread over several, killed and resumed, asked to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import build_network
from tiny_run import RUN, TinyFeed

from openlance.train.loop import train
from openlance.train.parallel import leave
from openlance.train.settings import TrainConfig

SCRIPT = Path(__file__).parent / "tiny_run.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
# float32, other order of addition over the processes and the packs; Adam's steps make it larger
ATOL = 2e-5


def command(run_dir: Path, settings: dict, processes: int = 1, *options: str) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launcher, str(SCRIPT), str(run_dir), json.dumps(settings), *options]


def run(run_dir: Path, settings: dict, processes: int = 1, *options: str) -> dict[str, torch.Tensor]:
    """Run to the end; the averaged weights."""
    weights = run_dir.with_suffix(".pt")
    done = subprocess.run(
        command(run_dir, settings, processes, *options, "--weights", str(weights)),
        env=ENVIRONMENT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(weights, weights_only=True)


def log_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(
            tensor, second[name], atol=ATOL, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def here(run_dir: Path, settings: dict, resume: bool = False) -> dict[str, torch.Tensor]:
    """The same run inside this process."""
    config = TrainConfig(**(RUN | settings))
    try:
        return dict(train(build_network(3), TinyFeed(config.lanes), config, run_dir, resume=resume))
    finally:
        leave()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Four lanes on one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    return folder, here(folder, {"lanes": 4, "steps": 3, "learning_rate": 1e-3})


@pytest.mark.parametrize("processes, replicas", [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_many_processes_are_one(
    tmp_path: Path, alone: tuple[Path, dict[str, torch.Tensor]], processes: int, replicas: int
) -> None:
    """Loss, gradient norm and weights after three steps; with full and with hybrid sharding."""
    settings = {"lanes": 4, "steps": 3, "learning_rate": 1e-3, "replicas": replicas}
    weights = run(tmp_path / "run", settings, processes)
    assert_close(alone[1], weights)
    for one, many in zip(log_of(alone[0]), log_of(tmp_path / "run"), strict=True):
        for name in ("ce", "mse", "norm", "rate"):
            assert (name in one) == (name in many)
            if name in one:
                assert many[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_muon_shared_by_processes_is_muon_alone(tmp_path: Path, processes: int) -> None:
    settings = {"lanes": processes, "steps": 2, "learning_rate": 1e-3, "optimizer": "muon"}
    many = run(tmp_path / "many", {**settings, "replicas": processes}, processes)
    assert_close(here(tmp_path / "one", settings), many)


@pytest.mark.slow
def test_a_state_is_read_by_another_number_of_processes(
    tmp_path: Path, alone: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    settings = {"lanes": 4, "steps": 2, "learning_rate": 1e-3}
    run(tmp_path / "run", settings, 2)
    assert_close(alone[1], here(tmp_path / "run", {**settings, "steps": 3}, resume=True))


def test_bfloat16_computes_on_float32_weights(tmp_path: Path) -> None:
    settings = {"lanes": 1, "steps": 3, "learning_rate": 1e-3, "precision": "bfloat16"}
    low = here(tmp_path / "low", settings)
    high = here(tmp_path / "high", {**settings, "precision": "float32"})
    assert {tensor.dtype for tensor in low.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in low.values())
    losses = [[line["mse"] for line in log_of(tmp_path / name)] for name in ("low", "high")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)
    assert low.keys() == high.keys()


def test_activations_computed_again_are_the_same(tmp_path: Path) -> None:
    settings = {"lanes": 1, "steps": 2}
    plain, again = (
        here(tmp_path / n, {**settings, "checkpointing": n == "again"}) for n in ("plain", "again")
    )
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def wait_for(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while not (run_dir / f"step-{step:08d}" / "state.json").is_file():
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.02)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    settings = {"lanes": 2, "steps": 5}
    whole = here(tmp_path / "whole", settings)
    slow = {**settings, "pause": 0.3}
    process = subprocess.Popen(command(tmp_path / "cut", slow), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "cut", 2)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert not (tmp_path / "cut" / "step-00000005").exists()
    resumed = here(tmp_path / "cut", settings, resume=True)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_a_run_that_is_asked_to_stop_saves_and_leaves(tmp_path: Path) -> None:
    """As a scheduler asks before it takes the machine away: exit code 0, and nothing is lost."""
    settings = {"lanes": 2, "steps": 200, "save_every": 1000, "pause": 0.2}
    process = subprocess.Popen(
        command(tmp_path / "run", settings), env=ENVIRONMENT, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not ((tmp_path / "run" / "log.jsonl").is_file() and len(log_of(tmp_path / "run")) > 1):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    step = log_of(tmp_path / "run")[-1]["step"]
    assert said.strip() == f"saved at step {step}"
    assert json.loads((tmp_path / "run" / f"step-{step:08d}" / "state.json").read_text())["step"] == step
