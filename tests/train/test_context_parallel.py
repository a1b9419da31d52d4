"""Context parallelism on real processes: a pack that several share gives what it gives one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_processes import ENVIRONMENT, assert_close, here, log_of, run
from tiny import build_network

from openlance.errors import InputError
from openlance.train.parallel import Ranks, join, spread
from openlance.train.settings import TrainConfig

SCRIPT = Path(__file__).parent / "context_run.py"
ATOL = 1e-5  # float32, products of other shapes; gradients go up to about 1
SETTINGS = {"lanes": 4, "steps": 3, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Four lanes on one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    return folder, here(folder, SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, settings",
    [
        pytest.param(2, {"context": 2}, id="one-group"),
        pytest.param(
            4, {"context": 2, "replicas": 2, "checkpointing": True}, id="two-groups", marks=pytest.mark.slow
        ),
    ],
)
def test_processes_that_share_packs_are_one(
    tmp_path: Path, alone: tuple[Path, dict[str, torch.Tensor]], processes: int, settings: dict[str, Any]
) -> None:
    """Losses, gradient norm, padding and weights after three steps."""
    weights = run(tmp_path / "run", SETTINGS | settings, processes)
    assert_close(alone[1], weights)
    for one, many in zip(log_of(alone[0]), log_of(tmp_path / "run"), strict=True):
        assert one.keys() == many.keys()
        for name in one.keys() - {"tokens_per_second"}:
            assert many[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_a_shared_pack_gives_the_same_and_takes_a_share_of_the_memory(tmp_path: Path, processes: int) -> None:
    """4 heads over 2 processes, and over 4, which are more than there are heads of keys and values."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), str(tmp_path)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(processes):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert {name: error for name, error in found["errors"].items() if not error < ATOL} == {}
        # A network of two layers: what every process has whole (vision, the losses) weighs in.
        assert found["kept"]["long"] < 1 / processes + 0.1


@pytest.mark.parametrize("world", [1, 3])
def test_processes_must_fill_their_groups(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(InputError, match=f"packs cannot be shared by 2 processes each: {world} is no"):
        join("cpu", context=2)


def test_a_context_that_the_run_does_not_have_is_refused() -> None:
    with pytest.raises(InputError, match=r"context is 2: join the run with join\(context=2\)"):
        spread(build_network(0), TrainConfig(steps=1, context=2), Ranks())
    with pytest.raises(InputError, match="context must be at least 1, not 0"):
        TrainConfig(steps=1, context=0)
