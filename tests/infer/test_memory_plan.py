"""Plans for a budget: what is chosen, and that real runs stay within it and give the same.

Host and device are both the CPU here; weights that go to the device are copies, and are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny import config, network, tokenizer, vae

from openlance.config import BackboneConfig, ModelConfig, lance_3b
from openlance.data.media import VAE_DIVISOR, Buckets
from openlance.data.save import save_video
from openlance.errors import InputError
from openlance.infer.load import load
from openlance.infer.memory import Estimator, Peak
from openlance.infer.pipeline import LancePipeline
from openlance.infer.plan import MARGIN, Plan, make_plan, parse_memory, plan_for, weigh
from openlance.infer.prepare import sizes_of
from openlance.model.adapters import add_lora, save_adapter
from openlance.model.checkpoint import count_parameters
from openlance.model.lance import Lance
from openlance.model.quantize import SCHEMES
from openlance.model.vae import VAE
from openlance.sequence.template import Task

CPU = torch.device("cpu")


def plan(estimator: Estimator, task: Task, budget: float) -> Plan:
    return make_plan(estimator, [task], torch.float32, int(budget))


@pytest.fixture(scope="module")
def tiny() -> Estimator:
    return Estimator(config())


@pytest.mark.parametrize(
    "text, size",
    [("8GB", 8 * 10**9), ("7.5 GiB", 15 * 2**29), ("900mb", 9 * 10**8), (10**9, 10**9)],
)
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["8", "much", "-1GB", "0GB", "8 TB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="max_memory"):
        parse_memory(text)


def test_all_weights_are_weighed_once() -> None:
    counts = count_parameters(lance_3b())
    weights = weigh(lance_3b(), list(Task), torch.bfloat16, {})
    assert weights.all == 2 * sum(counts.values())
    assert set(weights.parts) == {"encoder", "decoder", "vision", "head"}
    only = weigh(lance_3b(), [Task.T2I], torch.bfloat16, {})
    assert weights.all - only.all == 2 * counts["vision"]
    small = weigh(lance_3b(), [Task.T2I], torch.bfloat16, {"und": SCHEMES["int8"]})
    assert 0.5 < small.layer["und"] / only.layer["und"] < 0.51
    assert small.layer["gen"] == only.layer["gen"]


def test_less_memory_moves_more(tiny: Estimator) -> None:
    """From everything on the device, over fewer and fewer layers that stay, to nothing that fits."""
    need = tiny.need(Task.T2I, torch.float32)
    assert plan(tiny, Task.T2I, need.total * MARGIN + 2).resident
    found = []
    for share in (0.95, 0.9, 0.85, 0.8, 0.75, 0.7):
        try:
            found.append(plan(tiny, Task.T2I, need.total * MARGIN * share))
        except InputError as error:
            assert "would do" in str(error)
            break
    assert found and not found[-1].resident
    for one in found:
        assert one.peak * MARGIN <= one.budget
    kept = [sum(one.layers["denoise"].values()) for one in found if not one.resident]
    assert kept == sorted(kept, reverse=True)


def test_the_least_that_is_named_does(tiny: Estimator) -> None:
    with pytest.raises(InputError, match="too little for t2i") as caught:
        plan(tiny, Task.T2I, 1000)
    least = float(str(caught.value).split(" GB would do")[0].split()[-1])
    assert plan(tiny, Task.T2I, least * 1.01e9).peak * MARGIN <= least * 1.01e9


def test_a_budget_on_the_cpu_cannot_send_weights_elsewhere(tiny: Estimator) -> None:
    need = tiny.need(Task.T2I, torch.float32)
    options = (config(), [Task.T2I], torch.float32, CPU)
    found = plan_for(*options, int(need.total * MARGIN * 1.1), {})
    assert found is not None and found.resident
    with pytest.raises(InputError, match="nowhere else"):
        plan_for(*options, int(need.total * MARGIN * 0.9), {})
    assert plan_for(*options, None, {}) is None


def wide() -> ModelConfig:
    """More layers and width than tiny, so that weights are what memory goes to."""
    body = BackboneConfig(
        hidden=64, layers=6, heads=4, kv_heads=2, mlp=256, vocab=330, rope_sections=(2, 3, 3)
    )
    words = {str(task): "Do it." for task in Task}  # the tiny tokenizer has a token for nearly each letter
    return replace(
        config(), backbone=body, vision=replace(config().vision, out_hidden=64), system_prompts=words
    )


def build(seed: int = 0) -> LancePipeline:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, pixels = Lance(wide()).requires_grad_(False), VAE(wide().vae).requires_grad_(False)
    return LancePipeline(model, tokenizer(), pixels)


def draw(lance: LancePipeline, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return lance.generate_image("a red circle", seed=1, steps=2).frames


def edit(lance: LancePipeline, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return lance.edit(picture, "make it blue", seed=1, steps=2).frames


def answer(lance: LancePipeline, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    said = lance.ask("what colour?", picture, max_tokens=4, temperature=1.0, seed=1)
    return np.frombuffer(said.text.encode(), np.uint8)


Run = Callable[[LancePipeline, NDArray[np.uint8]], NDArray[np.uint8]]


@pytest.mark.parametrize(
    "task, run",
    [(Task.T2I, draw), (Task.IMAGE_EDIT, edit), (Task.X2T_IMAGE, answer)],
    ids=["t2i", "image_edit", "x2t_image"],
)
def test_runs_stay_within_their_budget_and_give_the_same(
    task: Task, run: Run, picture: NDArray[np.uint8]
) -> None:
    estimator, expected = Estimator(wide()), run(build(), picture)
    with pytest.raises(InputError) as caught:
        plan(estimator, task, 1)
    least = float(str(caught.value).split(" GB would do")[0].split()[-1]) * 1e9
    chosen = plan(estimator, task, least * 1.01)
    assert chosen.budget < 0.8 * MARGIN * estimator.need(task, torch.float32).total
    lance = build()
    with Peak(CPU) as peak:
        lance.follow(chosen, CPU)
        made = run(lance, picture)
    assert peak.most <= chosen.budget
    assert np.array_equal(made, expected)


def test_requests_beyond_a_plan_run_one_by_one(tiny: Estimator) -> None:
    whole = tiny.need(Task.T2I, torch.float32)
    tight, roomy = (plan(tiny, Task.T2I, whole.total * MARGIN * share + 2) for share in (1, 2))
    assert 2 * whole.tokens <= tight.tokens < 2.1 * whole.tokens < roomy.tokens / 2
    lance = LancePipeline(network(), tokenizer(), vae())
    orders = [lance.order.generate_image("a circle", seed=seed, steps=2) for seed in (1, 2)]
    found = []
    for chosen in (roomy, replace(tight, tokens=orders[0].tokens)):
        active: list[int] = []
        lance.follow(chosen, CPU)
        lance.run(orders, on_step=lambda step, active=active: active.append(step.order))
        found.append(active)
    assert found == [[0, 1, 0, 1], [0, 0, 1, 1]]


def test_adapters_go_where_the_weights_are(tmp_path: Path) -> None:
    lance, plain = build(), build()
    add_lora(plain.model, ["gen"], rank=2)
    for name, parameter in plain.model.named_parameters():
        if "lora_B" in name:
            parameter.data.add_(0.5)
    save_adapter(plain.model, tmp_path / "adapter")
    before = plain.generate_image("a red circle", seed=1, steps=1).frames
    lance.follow(plan(Estimator(wide()), Task.T2I, 5.5e6), CPU)
    lance.load_adapter(tmp_path / "adapter")
    assert np.array_equal(lance.generate_image("a red circle", seed=1, steps=1).frames, before)


def planned(folder: Path, task: Task, **largest: object) -> Plan:
    loaded = load(folder, None, "cpu", torch.float32, [task], None, None, "1GB", largest)
    assert loaded.plan is not None and loaded.model.config.sizes == config().sizes
    return loaded.plan


def test_a_plan_of_an_edit_is_for_its_source(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """For its frames and the area of its bucket; tiny's clips have 5 frames at 4 a second, 8 at most."""
    frames, sizes = np.zeros((9, 40, 60, 3), np.uint8), config().sizes
    asked = {}
    for name, count in (("usual", 6), ("short", 1)):
        save_video(frames[:count], tmp_path / f"{name}.mp4", fps=4)
        found = sizes_of(tmp_path / f"{name}.mp4", config())
        assert found["frames"] == {"usual": 5, "short": 1}[name]
        size = Buckets(sizes.video).out_size(40, 60, VAE_DIVISOR)
        assert found["video"] ** 2 >= size[0] * size[1] > (found["video"] - 16) ** 2
        asked[name] = planned(tiny_checkpoint, Task.VIDEO_EDIT, source=tmp_path / f"{name}.mp4")
    side = (found["video"], found["video"])
    told = planned(tiny_checkpoint, Task.VIDEO_EDIT, size=side, frames=5)
    assert asked["usual"].phases == pytest.approx(told.phases, rel=1e-3)  # a first run makes small constants
    for phase in ("encode", "look", "context", "denoise", "decode"):
        assert asked["short"].phases[phase] < asked["usual"].phases[phase]
    long = planned(tiny_checkpoint, Task.I2V, source=frames[0], frames=9)
    told = planned(tiny_checkpoint, Task.I2V, size=side, frames=9)
    assert long.phases == pytest.approx(told.phases, rel=1e-3)


def test_a_plan_is_for_the_largest_request(tiny_checkpoint: Path) -> None:
    """The sizes of the checkpoint stay what they are."""
    sizes, usual = config().sizes, planned(tiny_checkpoint, Task.T2I)
    assert planned(tiny_checkpoint, Task.T2I, size=(sizes.image, sizes.image), frames=None) == usual
    wide = planned(tiny_checkpoint, Task.T2I, size=(2 * sizes.image, sizes.image))
    assert wide.phases["denoise"] > usual.phases["denoise"] and wide.phases["decode"] > usual.phases["decode"]
    long, short = (planned(tiny_checkpoint, Task.T2V, **asked) for asked in ({"frames": 33}, {}))
    assert long.phases["denoise"] > short.phases["denoise"]
    plain, kept, led = (
        planned(tiny_checkpoint, Task.T2V, **asked)
        for asked in ({}, {"reuse": 0.1}, {"reuse": 0.1, "reuse_order": 1})
    )
    assert plain.phases["denoise"] < kept.phases["denoise"] < led.phases["denoise"]
