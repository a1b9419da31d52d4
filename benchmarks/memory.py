"""What each memory plan takes, phase by phase: reckoned beforehand, and counted while it runs.

    python benchmarks/memory.py --threads 1

A model of the released depth and an eighth of its width or less, with random weights, draws a picture, edits
one and answers about it, under budgets from all that it needs to the least that a plan exists for. Host and
device are both the CPU: weights that go to the device are copies, and every tensor that is made is counted,
with what the host itself needs (pictures, pixels on their way). Results must not change by one bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from machine import about, describe, options, read, write

from openlance import LancePipeline
from openlance.config import ModelConfig, lance_3b
from openlance.errors import InputError
from openlance.infer.memory import Estimator, Peak
from openlance.infer.plan import MARGIN, Plan, make_plan
from openlance.model.checkpoint import find_release, read_config
from openlance.model.lance import Lance
from openlance.model.vae import VAE
from openlance.sequence.template import Task
from openlance.tokenizer import Tokenizer

CPU = torch.device("cpu")
Run = Callable[[LancePipeline], bytes]


def small(side: int) -> tuple[ModelConfig, Tokenizer]:
    """nano, with as many layers as lance_3b has, and as wide ones for its width."""
    release = find_release("nano")
    tokenizer = Tokenizer.load(release.folder)
    config, body = read_config(release, tokenizer), lance_3b().backbone
    ratio = config.backbone.hidden / body.hidden
    body = replace(config.backbone, layers=body.layers, mlp=int(body.mlp * ratio))
    return replace(config, backbone=body, sizes=replace(config.sizes, image=side)), tokenizer


def runs(side: int) -> dict[Task, Run]:
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    return {
        Task.T2I: lambda lance: lance.generate_image("a red circle", seed=1, steps=2).frames.tobytes(),
        Task.IMAGE_EDIT: lambda lance: lance.edit(picture, "blue", seed=1, steps=2).frames.tobytes(),
        Task.X2T_IMAGE: lambda lance: lance.ask(
            "what?", picture, seed=1, temperature=1.0, max_tokens=4
        ).text.encode(),
    }  # fmt: skip


def build(config: ModelConfig, tokenizer: Tokenizer) -> LancePipeline:
    torch.manual_seed(0)
    model, vae = (part(shapes).requires_grad_(False) for part, shapes in ((Lance, config), (VAE, config.vae)))
    return LancePipeline(model, tokenizer, vae)


@contextmanager
def counted(lance: LancePipeline, plan: Plan) -> Iterator[dict[str, int]]:
    """The most bytes in each phase, where the plan has phases; the whole run otherwise."""
    found: dict[str, int] = {}
    with Peak(CPU) as peak:
        lance.follow(plan, CPU)
        placement = lance.placement
        if placement is not None:
            enter = placement.enter

            def noted(phase: str) -> None:
                if phase != placement.phase:
                    before = placement.phase or "begin"
                    found[before] = max(found.get(before, 0), peak.most)
                    enter(phase)
                    peak.most = peak.live
                    return
                enter(phase)

            placement.enter = noted  # type: ignore[method-assign]
        yield found
    last = (placement.phase if placement else None) or "whole"
    found[last] = max(found.get(last, 0), peak.most)


def plans(estimator: Estimator, task: Task) -> list[Plan]:
    """For all that the task needs, three quarters of it, and the least that does."""
    whole = estimator.need(task, torch.float32).total * MARGIN
    found = []
    for share in (1.01, 0.75, 0.5, 0.25, 0.15):
        try:
            found.append(make_plan(estimator, [task], torch.float32, int(whole * share)))
        except InputError:
            break
    return found


def main() -> None:
    parser = options(__doc__, model=False)
    parser.add_argument("--side", type=int, default=256, help="of the pictures, in pixels")
    args = read(parser)
    config, tokenizer = small(args.side)
    estimator, rows = Estimator(config), []
    print(f"{config.backbone.layers} layers, pictures {args.side}²; {describe(about(CPU))}\n")
    print("| task | budget (MB) | plan | phase: reckoned / counted (MB) | within |\n|---|---|---|---|---|")
    for task, run in runs(args.side).items():
        expected = run(build(config, tokenizer))
        for plan in plans(estimator, task):
            lance = build(config, tokenizer)
            with counted(lance, plan) as found:
                same = run(lance) == expected
            assert same, f"{task}: {plan}"
            beyond = plan.weights.all if plan.resident else 0  # weights that were there before
            most = max(found.values()) + beyond
            phases = {
                phase: (size, found[phase]) for phase, size in plan.phases.items() if phase in found
            } or {"whole": (plan.peak, most)}
            told = ", ".join(f"{name} {a / 1e6:.1f} / {b / 1e6:.1f}" for name, (a, b) in phases.items())
            kept = plan.layers.get("denoise") or plan.layers.get("answer") or {}
            how = "resident" if plan.resident else f"kept {kept}"
            within = "yes" if most <= plan.budget else "NO"
            print(f"| {task} | {plan.budget / 1e6:.1f} | {how} | {told} | {within} |", flush=True)
            rows.append({"task": task, "budget": plan.budget, "plan": str(plan), "phases": phases})
    write(args.out, {"machine": about(CPU), "rows": rows})


if __name__ == "__main__":
    main()
