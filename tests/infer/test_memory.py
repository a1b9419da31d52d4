"""What a task needs, reckoned on the meta device, against what the same code takes on the CPU."""

from __future__ import annotations

import pytest
import torch
from tiny import config, vae

from openlance.config import lance_3b
from openlance.infer.memory import Estimator, Peak
from openlance.infer.orders import PARTS_OF
from openlance.model.checkpoint import count_parameters
from openlance.sequence.template import Task


@pytest.fixture(scope="module")
def tiny() -> Estimator:
    return Estimator(config())


@pytest.mark.parametrize("task", list(Task))
def test_every_task_has_a_need(tiny: Estimator, task: Task) -> None:
    need = tiny.need(task, torch.float32)
    counts = count_parameters(config())
    assert need.weights == 4 * sum(counts[part] for part in PARTS_OF[task])
    assert need.tokens > 0
    assert need.working > 0
    half = tiny.need(task, torch.bfloat16)
    assert (half.weights * 2, half.working) == (need.weights, need.working // 2)


def test_decoding_takes_on_the_cpu_what_was_reckoned(tiny: Estimator) -> None:
    need = tiny.need(Task.T2V, torch.float32)
    assert need.phase == "decode"
    real, latents = vae(), torch.zeros(1, 2, 3, 3, 48)
    with torch.inference_mode(), Peak(torch.device("cpu")) as peak:
        real.decode(latents)
    assert need.working == pytest.approx(peak.most, rel=0.05)


def test_peak_counts_what_lives_at_once() -> None:
    before = torch.zeros(1000)
    with Peak(torch.device("cpu")) as peak:
        a = torch.zeros(100)
        b = a[:50]
        del a
        before.add_(1)
        c = b + 1
        del b
        d = c + 1
    assert (peak.most, peak.live) == (400 + 200, 200 + 200)
    assert len(c) == len(d)


def test_the_released_shapes_need_gigabytes_and_no_memory_to_say_so() -> None:
    released = Estimator(lance_3b())
    need = released.need(Task.T2I, torch.bfloat16)
    assert 11 < need.weights / 2**30 < 15
    assert 0.5 < need.working / 2**30 < 20
    words = released.need(Task.CHAT, torch.bfloat16)
    assert words.weights < need.weights / 1.7
