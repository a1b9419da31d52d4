"""A training run on a budget of minutes that can be stopped at any time and continued."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

SAVE_EVERY = 60.0  # seconds


class TimedRun:
    """Counts the seconds spent training, saves everything each minute, and goes on from what was saved.

    `parts` are modules and optimisers by name; `rng` draws the data. Schedules are functions of the share of
    the budget that is spent, so a longer budget given later stretches them.
    """

    def __init__(self, path: Path, minutes: float, parts: dict[str, Any], rng: np.random.Generator) -> None:
        self.path, self.budget, self.parts, self.rng = path, minutes * 60, parts, rng
        self.seconds, self.step = 0.0, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._load()

    def progress(self) -> Iterator[float]:
        """The share of the budget spent, in [0, 1), once a step; saves every minute and at the end."""
        bar = self.bar = tqdm(total=round(self.budget), initial=round(self.seconds), unit="s", mininterval=5)
        last = saved = time.monotonic()
        while self.seconds < self.budget:
            yield self.seconds / self.budget
            now = time.monotonic()
            self.seconds, self.step, last = self.seconds + now - last, self.step + 1, now
            bar.update(min(round(self.seconds), round(self.budget)) - bar.n)
            if now - saved > SAVE_EVERY:
                self._save()
                last = saved = time.monotonic()
        self._save()
        bar.close()

    def report(self, **values: float) -> None:
        """Show numbers beside the progress bar."""
        self.bar.set_postfix({"step": self.step} | {k: f"{v:.4g}" for k, v in values.items()}, refresh=False)

    def _save(self) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"seconds": self.seconds, "step": self.step, "torch": torch.get_rng_state()}
        part = self.path.with_suffix(".part")
        torch.save(state | {"numpy": self.rng.bit_generator.state}, part)
        os.replace(part, self.path)

    def _load(self) -> None:
        state = torch.load(self.path, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.seconds, self.step = state["seconds"], state["step"]
        torch.set_rng_state(state["torch"])
        self.rng.bit_generator.state = state["numpy"]


def set_rate(optimizer: torch.optim.Optimizer, base: float, progress: float) -> None:
    """A short rise, a plateau, and a straight fall to zero over the last 40% of the budget."""
    rate = base * min(1.0, 0.1 + progress / 0.01, (1 - progress) / 0.4)
    for group in optimizer.param_groups:
        group["lr"] = rate
