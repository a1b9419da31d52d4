"""What a task needs, reckoned on the meta device, against what the same code takes on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import CHANNELS, HIDDEN, config, network, noise, question, seen, vae

from openlance.config import SamplingConfig, lance_3b
from openlance.infer.context import encode
from openlance.infer.generate import Denoising, Target
from openlance.infer.memory import META, Estimator, Need, Peak, Shapes, _sample
from openlance.infer.orders import PARTS_OF
from openlance.model.checkpoint import count_parameters
from openlance.model.tiles import Tiles
from openlance.sequence.segment import Sample
from openlance.sequence.template import Message, Task

CPU = torch.device("cpu")


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
    assert half.weights * 2 == need.weights
    assert need.working // 2 <= half.working < need.working  # norms of the VAE are float32 in any dtype
    assert ("denoise" in need.phases, "decode" in need.phases) == (task.generates, task.generates)


def test_decoding_takes_on_the_cpu_what_was_reckoned(tiny: Estimator) -> None:
    need = tiny.need(Task.T2V, torch.float32)
    real, latents = vae(), torch.zeros(1, 2, 3, 3, 48)
    with torch.inference_mode(), Peak(torch.device("cpu")) as peak:
        real.decode(latents)
    assert need.phases["decode"] == pytest.approx(peak.most, rel=0.05)


def request(task: Task) -> Sample:
    sizes = config().sizes
    frames, side = (sizes.frames, sizes.video) if task.video else (1, sizes.image)
    return _sample(task, config(), frames, side, sizes.vit_image)


@torch.inference_mode()
def stepped(task: Task, **reuse: Any) -> int:
    """The most bytes in four real steps of the request that is reckoned with, all branches run whole."""
    model, sample = network(), request(task)
    settings = SamplingConfig(guidance_interval=(0.0, 1.0), **reuse)
    with Peak(CPU) as peak:
        work = Denoising(model, [Target(sample, noise(*sample[-1].grid, CHANNELS))], settings)
        peak.most = peak.live  # what contexts took is another phase
        for t in (1.0, 0.9, 0.7, 0.4):
            work.velocity(work.start, t)
    return peak.most


@pytest.mark.parametrize("task", [Task.T2I, Task.T2V])
def test_what_reuse_keeps_is_reckoned(task: Task) -> None:
    """Two states of both branches, of order 1 three, within what the allocations of a step differ by."""
    whole, found = config(), []
    states = 2 * request(task)[-1].inner * HIDDEN * 4
    for sampling in ({}, {"reuse": 1e-12}, {"reuse": 1e-12, "reuse_order": 1}):
        asked = replace(whole, sampling=replace(whole.sampling, **sampling))
        need = Estimator(asked).need(task, torch.float32).phases["denoise"]
        assert need == pytest.approx(stepped(task, **sampling), rel=0.05)
        found.append(need)
    assert found[1] - found[0] >= 2 * states
    assert found[2] - found[1] >= states


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


def test_running_an_operation_once_for_its_shapes_counts_the_same(
    tiny: Estimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, tilings = (Task.VIDEO_EDIT, Task.X2T_IMAGE), (None, Tiles(side=2))

    def needs() -> list[Need]:
        estimator = Estimator(config())
        return [estimator.need(task, torch.bfloat16, tiles) for task in tasks for tiles in tilings]

    tiny.need(Task.VIDEO_EDIT, torch.bfloat16)  # the first run of all makes constants
    once = needs()
    monkeypatch.setattr("openlance.infer.memory.Shapes", lambda known: Peak(META))
    assert needs() == once


def test_only_new_memory_is_remembered() -> None:
    """Views and what is written in place are run each time; what comes again has its strides and its size."""
    x, known = torch.empty(4, 6, device=META), dict[Any, Any]()
    with Shapes(known) as peak:
        for _ in range(2):
            parts = (x.T.contiguous(), x.view(2, 12), x.add_(1), torch.cat([x, x])[1:], *x.sort())
            assert parts[1].untyped_storage()._cdata == parts[2].untyped_storage()._cdata
            assert [part.stride() for part in parts] == [(4, 1), (12, 1), (6, 1), (6, 1), (6, 1), (6, 1)]
            assert peak.live == 4 * 24 + 4 * 48 + 4 * 24 + 8 * 24
            del parts
    assert peak.live == 0 and any(like is None for like in known.values()) and any(known.values())


def test_the_released_shapes_need_gigabytes_and_no_memory_to_say_so() -> None:
    released = Estimator(lance_3b())
    need = released.need(Task.T2I, torch.bfloat16)
    assert 11 < need.weights / 2**30 < 15
    assert 0.5 < need.working / 2**30 < 20
    words = released.need(Task.CHAT, torch.bfloat16)
    assert words.weights < need.weights / 1.7


def test_a_long_clip_is_looked_at_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention of the tower stays in a pair of frames, so that runs of them see what the whole sees."""
    tower, grid = network().vision, torch.tensor([[5, 4, 4], [1, 8, 4]])
    patches = torch.randn(5 * 16 + 32, 1176, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), Peak(CPU) as whole:
        expected = tower(patches, grid)
    monkeypatch.setattr("openlance.model.vision.PATCHES_AT_ONCE", 32)
    with torch.inference_mode(), Peak(CPU) as runs:
        found = tower(patches, grid)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert runs.most < 0.8 * whole.most


def test_of_many_clips_only_keys_and_values_stay() -> None:
    """Twice as many clips in a question add their cache, and no more of what one of them needs to run."""
    most, kept = [], []
    for count in (2, 4):
        clips = [seen((4, 4, 4), seed=number) for number in range(count)]
        sample = question(Message("user", (*clips, "?")))
        with torch.inference_mode(), Peak(CPU) as peak:
            cache = encode(network(), sample).cache
        most.append(peak.most)
        kept.append(cache.length * cache.layers * 2 * 2 * 8 * 4)  # two sides, heads of 8, float32
    one_layer = kept[1] // 2  # joined for the layer that runs
    assert most[1] - most[0] <= kept[1] - kept[0] + one_layer
