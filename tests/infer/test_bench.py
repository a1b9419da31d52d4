"""Floors from shapes: those of the released model are known; phases are counted to the operation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import build_network, config, network, vae
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from openlance.cli import main
from openlance.config import lance_3b
from openlance.errors import InputError
from openlance.infer import bench
from openlance.infer.bench import Bench, Ceilings, Cost, Job, costs, evaluations, jobs_of, sample_of
from openlance.infer.generate import Denoising, Target
from openlance.sequence.template import Task

PETA = 1e15
H200 = Ceilings(790e12, 4.3e12)  # measured on one: bfloat16 products, copies


@pytest.mark.parametrize(
    ("job", "peta", "seconds"),
    [
        (Job("picture", Task.T2I, (768, 768)), 0.81, 1.02),
        (Job("large", Task.T2I, (1024, 1024)), 1.56, 1.97),
        (Job("edit", Task.IMAGE_EDIT, (768, 768)), 0.92, 1.16),
        (Job("clip", Task.T2V, (480, 848), 49), 13.5, 17.1),
        (Job("long", Task.T2V, (480, 848), 121), 55.6, 70.3),
    ],
    ids=lambda value: value.name if isinstance(value, Job) else "",
)
def test_the_floors_of_the_released_model(job: Job, peta: float, seconds: float) -> None:
    # Worked out by hand from the shapes, without the text around the target: 2 % is what that adds at most.
    found = costs(lance_3b(), job)["denoise"]
    assert found.operations / PETA == pytest.approx(peta, rel=0.02)
    assert found.floor(H200) == pytest.approx(seconds, rel=0.02)


def test_words_cost_a_reading_of_the_expert_each() -> None:
    found = costs(lance_3b(), Job("words", Task.CHAT))["words"]
    assert found.read / bench.WORDS == pytest.approx(6.2e9, rel=0.01)
    assert bench.WORDS / found.floor(H200) == pytest.approx(696, rel=0.01)


def test_most_of_the_released_steps_are_guided() -> None:
    assert evaluations(lance_3b()) == (26, 4)


def test_the_jobs_of_the_released_model() -> None:
    names = [job.name for job in jobs_of(lance_3b())]
    assert names == [
        "picture 768²", "picture 1024²", "edit 768²", "clip 480x848, 49 frames", "clip 480x848, 121 frames",
        "64 words",
    ]  # fmt: skip
    assert [job.name for job in jobs_of(lance_3b(), quick=True)] == [names[i] for i in (0, 2, 3, 5)]


def test_the_longer_of_two_floors_counts() -> None:
    ceilings = Ceilings(operations=100.0, bytes=10.0)
    assert Cost(200, 10).floor(ceilings) == 2.0
    assert Cost(200, 50).floor(ceilings) == 5.0


@pytest.mark.parametrize("task", [Task.T2I, Task.T2V])
def test_steps_are_counted_to_the_operation(task: Task) -> None:
    """By torch's counter over the steps themselves."""
    job = Job("one", task, (48, 64), 5 if task is Task.T2V else 1)
    sample = sample_of(config(), job)
    grid = sample[-1].grid
    assert grid is not None
    target = Target(sample, torch.zeros(*grid, config().vae.channels))
    work = Denoising(network(), [target], config().sampling)
    guided, plain = evaluations(config())
    counts = []
    for t in (1.0, 0.01):  # with guidance, and without
        with torch.inference_mode(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            work.velocity(work.start, t)
        counts.append(counter.get_total_flops())
    assert plain == 0  # of two steps; the second count tells the conditional branch alone
    assert costs(config(), job)["denoise"].operations == guided * counts[0]
    assert counts[1] < counts[0] < 2 * counts[1]


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_the_vae_decoder_is_counted_to_the_operation(frames: int) -> None:
    shape = (1, frames, 2, 3, config().vae.channels)
    with torch.inference_mode(), FlopCounterMode(display=False) as found, sdpa_kernel(SDPBackend.MATH):
        vae().decode(torch.zeros(shape))
    assert bench.vae_decode_flops(config().vae, frames, 2, 3) == found.get_total_flops()


@pytest.mark.parametrize("task", [Task.T2I, Task.IMAGE_EDIT, Task.T2V, Task.CHAT])
def test_each_phase_is_timed_in_the_order_of_the_work(task: Task) -> None:
    job = Job("small", task, (32, 48), 5 if task is Task.T2V else 1)
    phases = list(Bench(network(), vae(), repeats=1).run(job))
    names = [phase.name for phase in phases]
    assert (
        names
        == {
            Task.T2I: ["context", "denoise", "decode"],
            Task.T2V: ["context", "denoise", "decode"],
            Task.IMAGE_EDIT: ["look", "encode", "context", "denoise", "decode"],
            Task.CHAT: ["context", "words"],
        }[task]
    )
    assert all(phase.seconds > 0 and phase.cost.operations > 0 for phase in phases)


def test_random_weights_that_do_not_fit_are_refused() -> None:
    body = replace(lance_3b().backbone, hidden=2**17, heads=1024, kv_heads=64, mlp=2**19)
    huge = replace(lance_3b(), name="huge", backbone=body)
    with pytest.raises(InputError, match=r"huge: its weights take \d+\.\d GB in bfloat16.*GB free"):
        bench.random_bench(huge, torch.device("cpu"), torch.bfloat16, 1)


def test_what_is_free_is_known_here() -> None:
    free = bench._free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50


def test_random_weights_run(tmp_path: Path) -> None:
    made = bench.random_bench(config(), torch.device("cpu"), torch.float32, 1)
    assert made.model.dtype == torch.float32
    assert [phase.name for phase in made.run(Job("words", Task.CHAT))] == ["context", "words"]
    weights, other = made.model.head.weight.detach(), build_network(0).head.weight
    assert weights.shape == other.shape and 0.015 < float(weights.std()) < 0.025


def test_the_command_prints_a_table(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    assert (
        main(["bench", "--model", str(tiny_checkpoint), "--task", "t2i", "--quick", "--out", str(out)]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny") and "TFLOP/s" in lines[0] and "loaded in" in lines[0]
    rows = [line for line in lines if line.startswith("| picture 64²")]
    assert [row.split(" | ")[1] for row in rows] == ["context", "denoise", "decode", "all"]
    record = json.loads(out.read_text())
    assert [phase["phase"] for phase in record["phases"]] == ["context", "denoise", "decode"]
    assert record["ceilings"]["operations"] > 1e8
    assert all(phase["floor"] > 0 for phase in record["phases"])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--task", "i2v"], "nothing is measured of it; choose one of t2i, image_edit, t2v, chat"),
        (["--out", "table.txt"], "must end in .json"),
        (["--model", "lance_3b", "--max-memory", "8GB"], "--max-memory: lance_3b has random weights"),
    ],
)
def test_mistakes_are_named(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    assert reason in capsys.readouterr().err
