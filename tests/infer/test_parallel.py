"""Denoising on several processes gives what it gives on one, and the same on all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import CHANNELS, network, noise, samples

from openlance.config import SamplingConfig
from openlance.errors import InputError
from openlance.infer.generate import Target
from openlance.infer.parallel import denoise_parallel

SCRIPT = Path(__file__).parent / "parallel_run.py"
ATOL = 1e-5  # float32 over a few steps, sums in another order


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_together_are_one(tmp_path: Path, processes: int) -> None:
    """With 3 processes one of them has no branch, and shares of tokens differ in length."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), str(tmp_path)],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(processes):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert set(found) == {"guidance", "tokens"} and len(found["guidance"]) == len(found["tokens"]) + 3
        for spread, errors in found.items():
            assert {name: error for name, error in errors.items() if not error < ATOL} == {}, spread


@pytest.mark.parametrize(
    ("spread", "reuse", "reason"),
    [
        ("layers", 0.0, "spread must be one of guidance, tokens, not 'layers'"),
        ("tokens", 0.1, "reuse between steps needs all tokens on one process"),
        ("guidance", 0.0, "start with torchrun"),
    ],
)
def test_mistakes_are_named(spread: str, reuse: float, reason: str) -> None:
    sample = samples()["t2i"][:-1]
    target = Target(sample, noise(*sample[-1].grid, CHANNELS))
    with pytest.raises(InputError, match=reason):
        denoise_parallel(network(), [target], SamplingConfig(reuse=reuse), spread=spread)
