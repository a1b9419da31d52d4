"""The one training loop: draws a batch, steps, keeps an average, and can be stopped and resumed."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from openlance.config import TrainConfig, to_dict
from openlance.errors import InputError
from openlance.flow.path import draw_times
from openlance.model.lance import Lance
from openlance.sequence.pack import PackedBatch, pack
from openlance.sequence.segment import Role, Sample, without
from openlance.train.losses import losses

Samples = Callable[[int], list[Sample]]
"""Step number → its samples, always the same for the same step, so that a resumed run sees the same data."""

CONDITIONS = (Role.USER, Role.SOURCE, Role.REFERENCE)


class NonFiniteLoss(RuntimeError):
    """The loss is not a number; the run stopped before the weights were touched."""


@dataclass(eq=False)
class State:
    """Everything that a resumed run needs: weights, their average, the optimiser and the step reached."""

    model: Lance
    ema: Lance
    optimizer: torch.optim.Optimizer
    step: int = 0

    def save(self, path: Path) -> None:
        """Write atomically: a killed process leaves the old file or the new one."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "ema", "optimizer")}
        save_atomically({**parts, "step": self.step}, path)

    def load(self, path: Path) -> None:
        """Raises InputError where the file does not hold a state of this model."""
        try:
            parts = torch.load(path, weights_only=True)
            for name in ("model", "ema", "optimizer"):
                getattr(self, name).load_state_dict(parts[name])
            self.step = parts["step"]
        except (RuntimeError, KeyError, EOFError, ValueError) as error:
            raise InputError(
                f"{path} does not hold a state of this model: {error}. Remove it to start anew"
            ) from error


def save_atomically(value: object, path: Path) -> None:
    """torch.save to a neighbouring file, then rename over `path`."""
    draft = path.with_suffix(".draft")
    torch.save(value, draft)
    os.replace(draft, path)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, constant, then linear to zero over the last `decay` of the steps."""
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    fall = (config.steps - step) / max(1.0, config.decay * config.steps)
    return config.learning_rate * min(rise, fall, 1.0)


def draw_batch(
    samples: list[Sample], model: Lance, config: TrainConfig, generator: torch.Generator
) -> tuple[PackedBatch, Tensor]:
    """Condition dropout, a time for each sample, and noise [g, channels] for its latents."""
    dropped = [_drop(sample, config, generator) for sample in samples]
    times = draw_times(len(samples), config.time_shift, generator)
    batch = pack(dropped, model.config, times=times.tolist())
    noise = torch.randn(batch.latents.shape, generator=generator)
    return batch.to(model.device, model.dtype), noise.to(model.device, model.dtype)


def _drop(sample: Sample, config: TrainConfig, generator: torch.Generator) -> Sample:
    """Words lose nothing; a sample that generates loses its conditions now and then, for guidance."""
    if any(segment.role is Role.ANSWER for segment in sample):
        return sample
    chance = float(torch.rand((), generator=generator))
    if chance < config.drop_all:
        return without(sample, *CONDITIONS)
    return without(sample, Role.USER) if chance < config.drop_all + config.drop_text else sample


def train(
    model: Lance,
    samples: Samples,
    config: TrainConfig,
    run_dir: Path,
    *,
    vocabulary: int | None = None,
    validate: Callable[[Lance, int], dict[str, float]] | None = None,
    validate_every: int = 500,
    save_seconds: float = 60.0,
    name: str = "joint",
) -> Lance:
    """Train the backbone (the vision tower stays as it is) and return the averaged model.

    Goes on from `run_dir/<name>.pt` where that exists; logs to `run_dir/<name>.jsonl`. Raises
    NonFiniteLoss with the step, and InputError for a state file of another model.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    trained = _trained(model)
    optimizer = torch.optim.AdamW(
        trained, config.learning_rate, config.betas, config.eps, weight_decay=0.0, fused=True
    )
    state = State(model, copy.deepcopy(model).requires_grad_(False), optimizer)
    file = run_dir / f"{name}.pt"
    if file.exists():
        state.load(file)
    (run_dir / f"{name}.json").write_text(json.dumps(to_dict(config), indent=1))
    saved, mean = time.monotonic(), {"ce": math.nan, "mse": math.nan}
    bar = tqdm(range(state.step, config.steps), initial=state.step, total=config.steps, desc=name)
    with open(run_dir / f"{name}.jsonl", "a") as log:
        for step in bar:
            found = _step(state, samples(step), config, trained, vocabulary)
            mean = {k: v if math.isnan(mean[k]) else 0.98 * mean[k] + 0.02 * found.get(k, mean[k])
                    for k, v in ({**mean, **found}).items()}  # fmt: skip
            bar.set_postfix({k: f"{v:.3f}" for k, v in mean.items()})
            state.step = step + 1
            last = state.step == config.steps
            if state.step % 50 == 0 or last:
                print(json.dumps({"step": state.step, **mean}), file=log, flush=True)
            if validate is not None and (state.step % validate_every == 0 or last):
                scores = validate(state.ema, state.step)
                print(json.dumps({"step": state.step, **scores}), file=log, flush=True)
                bar.write(f"step {state.step}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
            if last or time.monotonic() - saved > save_seconds:
                state.save(file)
                saved = time.monotonic()
    return state.ema


def _trained(model: Lance) -> list[nn.Parameter]:
    """Everything but the vision tower."""
    return [p for name, p in model.named_parameters() if not name.startswith("vision.")]


def _step(
    state: State,
    samples: list[Sample],
    config: TrainConfig,
    trained: list[nn.Parameter],
    vocabulary: int | None,
) -> dict[str, float]:
    """One update; its mean losses."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + state.step)
    batch, noise = draw_batch(samples, state.model, config, generator)
    found = losses(state.model, batch, config, noise, vocabulary=vocabulary)
    if not torch.isfinite(found.total):
        raise NonFiniteLoss(
            f"the loss at step {state.step} is {found.total.item()}; the last saved state is sound"
        )
    state.optimizer.zero_grad(set_to_none=True)
    found.total.backward()
    torch.nn.utils.clip_grad_norm_(trained, config.clip)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state.step, config)
    state.optimizer.step()
    decay = min(config.ema, (1 + state.step) / (10 + state.step))
    with torch.no_grad():
        for averaged, parameter in zip(_trained(state.ema), trained, strict=True):
            averaged.lerp_(parameter, 1 - decay)
    return {k: float(v.detach().mean()) for k, v in (("ce", found.ce), ("mse", found.mse)) if len(v)}
