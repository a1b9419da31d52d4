"""Reuse between steps: what runs, what is kept for which branch, and that guidance stays."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import CHANNELS, GENERATING, network, noise, samples
from torch import Tensor, nn

from openlance.config import SamplingConfig
from openlance.errors import InputError
from openlance.flow.guidance import guide
from openlance.flow.path import time_grid
from openlance.flow.solver import euler
from openlance.infer.generate import Cancelled, Denoising, Step, Target, denoise, denoise_together
from openlance.infer.pipeline import LancePipeline
from openlance.infer.step_cache import StepCache
from openlance.model.lance import Halves, Stack
from openlance.sequence.segment import Role, without

ATOL = 1e-5  # float32 over several steps, sums in another order
GUIDED = SamplingConfig(steps=5, shift=2.0, guidance=3.0, guidance_interval=(0.4, 1.0))
NEVER, ALWAYS = 1e-12, 1e12  # thresholds that no change is below, and that every change is
orders = pytest.mark.parametrize("order", [0, 1], ids=["as it was", "led on"])


def targets(*names: str) -> list[Target]:
    """Each with noise of its own."""
    chosen = [samples()[name][:-1] for name in names]
    return [Target(s, noise(*s[-1].grid, CHANNELS, seed=seed)) for seed, s in enumerate(chosen)]


def assert_near(actual: Any, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=0)


@torch.inference_mode()
def walked(given: list[Target], settings: SamplingConfig) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """The latents of each target, and for each step how many branches ran whole, of how many."""
    work = Denoising(network(), given, settings)
    *_, end = euler(work.velocity, work.start, time_grid(settings.steps, settings.shift))
    assert work.reuse is not None
    return work.latents(end), work.reuse.runs


@pytest.fixture
def layers() -> Iterator[list[int]]:
    """How often each layer of the network ran."""
    counts = [0] * len(network().layers)

    def counter(number: int) -> Any:
        def count(*_: Any) -> None:
            counts[number] += 1

        return count

    hooks = [layer.register_forward_hook(counter(n)) for n, layer in enumerate(network().layers)]
    yield counts
    for hook in hooks:
        hook.remove()


@orders
@pytest.mark.parametrize("visual", [None, 1.6], ids=["guided", "visual"])
def test_where_nothing_is_reused_nothing_changes(visual: float | None, order: int) -> None:
    """To the bit, for every task together; off, nothing is even kept."""
    given = targets(*GENERATING)
    settings = replace(GUIDED, visual_guidance=visual, reuse_order=order)
    found = denoise_together(network(), given, replace(settings, reuse=NEVER))
    for latents, plain in zip(found, denoise_together(network(), given, settings), strict=True):
        assert torch.equal(latents, plain)
    assert settings.reuse == 0 and Denoising(network(), given[:1], settings).reuse is None


def test_after_the_first_step_only_the_first_layer_runs(layers: list[int]) -> None:
    given = targets("t2i")
    before = list(layers)
    denoise_together(network(), given, replace(GUIDED, steps=1, reuse=ALWAYS))
    context = layers[1] - before[1] - 1  # the layers of the context run before the first step
    before = list(layers)
    denoise_together(network(), given, replace(GUIDED, reuse=ALWAYS))
    ran = [now - then - context for now, then in zip(layers, before, strict=True)]
    assert ran == [GUIDED.steps, 1]


@orders
def test_guidance_stays_and_each_branch_has_its_own(order: int) -> None:
    """With all steps but the first ones reused, guidance is of what each branch alone would give."""
    [target] = targets("t2i")
    away = replace(target, sample=without(target.sample, Role.USER))
    settings = replace(GUIDED, guidance_interval=(0.0, 1.0), renorm="none", reuse=NEVER, reuse_order=order)
    with torch.inference_mode():
        both = Denoising(network(), [target], settings)
        alone = [Denoising(network(), [t], replace(settings, guidance=1.0)) for t in (target, away)]
        state = both.start
        for number, t in enumerate(time_grid(4, 2.0)[:-1].tolist()):
            for work in (both, *alone):
                assert work.reuse is not None
                work.reuse.threshold = ALWAYS if number > order else NEVER
            cond, uncond = (work.velocity(state, t) for work in alone)
            assert float((cond - uncond).abs().max()) > 100 * ATOL
            guided = both.velocity(state, t)
            assert_near(guided, guide(cond, uncond, settings))
            state = state - 0.2 * guided
    assert both.reuse is not None
    assert both.reuse.runs == [(0, 2) if number > order else (2, 2) for number in range(4)]


@pytest.mark.parametrize("name", ["t2i", "image_edit", "i2v"])
def test_the_result_is_a_guided_one(name: str) -> None:
    """However much is reused, it is nearer to what guidance gives than what no guidance gives is."""
    [target] = targets(name)
    reused, _ = walked([target], replace(GUIDED, reuse=ALWAYS))
    guided, plain = (
        denoise(network(), target.sample, c, target.noise) for c in (GUIDED, replace(GUIDED, guidance=1.0))
    )
    assert float((reused[0] - guided).norm()) < 0.5 * float((plain - guided).norm())
    assert not torch.equal(reused[0], guided)


def test_where_guidance_begins_all_is_run_whole() -> None:
    """At t = 1, 8/9, 3/4, 4/7, 1/3: it acts at the second, third and fourth of them."""
    settings = replace(GUIDED, guidance_interval=(0.4, 0.9), reuse=ALWAYS)
    _, runs = walked(targets("t2i"), settings)
    assert runs == [(1, 1), (2, 2), (0, 2), (0, 2), (0, 1)]


def test_the_same_again_costs_one_layer_and_changes_nothing() -> None:
    with torch.inference_mode():
        work = Denoising(network(), targets("image_edit", "t2v"), replace(GUIDED, reuse=1e-3))
        whole, again = (work.velocity(work.start, 0.7) for _ in range(2))
    assert_near(again, whole)
    assert work.reuse is not None and work.reuse.runs == [(4, 4), (0, 4)]


class Adds(nn.Module):
    """A layer that adds a number to every latent. A test sets it, time after time."""

    amount = 0.0

    def forward(self, halves: Halves, *_: Any) -> Halves:
        return {**halves, "gen": halves["gen"] + self.amount}


@torch.inference_mode()
def test_what_is_linear_in_time_is_led_on_exactly() -> None:
    """Layers behind the first add 3 - 2 t: of order 1 that is found at times that were never run, of order 0
    what was added last; and with one whole evaluation behind them both are the same."""
    work = Denoising(network(), targets("t2v"), replace(GUIDED, guidance=1.0))
    now, first, rest = work._pass(False), Adds(), Adds()
    stack = Stack(nn.ModuleList([first, rest]), now.prepared.table, now.pattern, now.cache)
    nothing = {"und": torch.zeros(2, 4), "gen": torch.zeros(len(work.start), 4)}
    found = {}
    for order in (0, 1):
        kept = StepCache(0.5, order)

        def added(t: float, moved: float, kept: StepCache = kept) -> float:
            first.amount, rest.amount = moved, 3 - 2 * t
            values = kept.through(stack, nothing, now=now, t=t)["gen"] - moved
            assert values.min() == values.max()
            return float(values[0, 0])

        found[order] = [
            added(t, moved) for t, moved in ((1.0, 1.0), (0.875, 1.0), (0.75, 2.0), (0.5, 2.0), (0.25, 2.0))
        ]
        assert kept.runs == [(1, 1), (0, 1), (1, 1), (0, 1), (0, 1)]
    assert found == {0: [1.0, 1.0, 1.5, 1.5, 1.5], 1: [1.0, 1.0, 1.5, 2.0, 2.5]}


def test_with_one_whole_evaluation_there_is_no_line() -> None:
    """Order 1 is then order 0, to the bit: nothing is led on before all branches of a target can be. Here all
    are run at the second step, where guidance begins to act, and one of the two already at the first."""
    given = targets("image_edit", "t2i")
    settings = replace(GUIDED, guidance_interval=(0.1, 0.9), reuse=ALWAYS)
    found = [walked(given, replace(settings, reuse_order=order)) for order in (0, 1)]
    assert found[0][1] == found[1][1] == [(2, 2), (4, 4), (0, 4), (0, 4), (0, 4)]
    for a, b in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(a, b)


def halfway() -> float:
    """A threshold that one target's changes reach at a step where another's do not."""
    with torch.inference_mode():
        work = Denoising(network(), targets("t2i", "subject", "i2v"), replace(GUIDED, reuse=NEVER))
        state, changes = work.start, []
        for t in time_grid(GUIDED.steps, GUIDED.shift)[:2].tolist():
            kept = dict(work.reuse._kept) if work.reuse else {}
            velocity = work.velocity(state, t)
            for key, now in work.reuse._kept.items() if work.reuse and kept else ():
                changes.append((float(kept[key].change(now.first)), key[0]))
            state = state - 0.1 * velocity
    largest = sorted(max(c for c, number in changes if number == wanted) for wanted in range(3))
    return (largest[0] + largest[2]) / 2


@orders
def test_each_target_decides_for_itself(order: int) -> None:
    """Together they give what each gives alone, where at some step one is run whole and another is not."""
    given = targets("t2i", "subject", "i2v")
    settings = replace(GUIDED, reuse=halfway(), reuse_order=order)
    together, runs = walked(given, settings)
    assert any(0 < ran < of for ran, of in runs)
    total = 0
    for latents, target in zip(together, given, strict=True):
        [alone], own = walked([target], settings)
        total += sum(ran for ran, _ in own)
        assert_near(latents, alone)
    assert total == sum(ran for ran, _ in runs)


@orders
def test_one_can_be_cancelled(order: int) -> None:
    given = targets("t2i", "t2v", "subject")
    settings = replace(GUIDED, reuse=0.3, reuse_order=order)

    def stop_the_second(step: Step) -> bool:
        return (step.order, step.number) != (1, 2)

    found = denoise_together(network(), given, settings, stop_the_second)
    assert isinstance(found[1], Cancelled)
    for index in (0, 2):
        [alone], _ = walked([given[index]], settings)
        assert_near(found[index], alone)


@orders
@pytest.mark.parametrize("solver", ["ab2", "dpm++2m", "unipc"])
def test_it_works_with_every_solver(solver: str, order: int) -> None:
    [target] = targets("first_and_last")
    settings = replace(GUIDED, solver=solver, reuse_order=order)
    same, reused, plain = (
        denoise(network(), target.sample, replace(settings, reuse=reuse), target.noise)
        for reuse in (NEVER, ALWAYS, 0.0)
    )
    assert torch.equal(same, plain) and not torch.equal(reused, plain)
    assert torch.equal(reused[[0, 2]], target.segment.latents[[0, 2]])


def test_it_stands_in_the_record(lance: LancePipeline) -> None:
    made = lance.generate_image("a red circle", size=32, seed=1, reuse=0.1, reuse_order=1, solver="unipc")
    kept = made.settings["sampling"]
    assert (kept["reuse"], kept["reuse_order"], kept["solver"]) == (0.1, 1, "unipc")
    again = lance.generate_image("a red circle", size=32, seed=1, **made.settings["sampling"])
    assert (again.frames == made.frames).all()


@pytest.mark.parametrize("wrong", [-0.1, math.nan, math.inf])
def test_what_is_no_threshold_is_named(wrong: float) -> None:
    with pytest.raises(InputError, match=r"reuse must be 0 \(off\) or more"):
        SamplingConfig(reuse=wrong)


def test_what_is_no_order_is_named() -> None:
    with pytest.raises(InputError, match="reuse_order must be 0 or 1, not 2"):
        SamplingConfig(reuse_order=2)
