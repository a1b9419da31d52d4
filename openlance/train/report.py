"""What a run says of itself: a progress bar, a log of lines, and a tracker with curves and pictures."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from openlance.errors import InputError
from openlance.train.parallel import Ranks

if TYPE_CHECKING:
    from PIL.Image import Image

TRACKERS = ("tensorboard", "wandb", "none")
LOG = "log.jsonl"
SMOOTH = 0.98


class Tracker(Protocol):
    """Where curves and pictures go."""

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def image(self, name: str, image: Image, step: int) -> None: ...

    def close(self) -> None: ...


class NoTracker:
    """The log alone."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        pass

    def image(self, name: str, image: Image, step: int) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoard:
    """`tensorboard --logdir RUN_DIR` shows it."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, name: str, image: Image, step: int) -> None:
        self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """Project "openlance"; what its own environment variables say holds."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        import wandb

        self.wandb = wandb
        self.run = wandb.init(project="openlance", dir=str(folder), name=folder.name, config=dict(config))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def image(self, name: str, image: Image, step: int) -> None:
        self.run.log({name: self.wandb.Image(image)}, step=step)

    def close(self) -> None:
        self.run.finish()


def make_tracker(name: str, folder: Path, config: Mapping[str, Any]) -> Tracker:
    """A tracker by name. Raises InputError for one that is unknown or not installed."""
    if name not in TRACKERS:
        raise InputError(f"unknown tracker {name!r}: choose one of {', '.join(TRACKERS)}")
    try:
        if name == "tensorboard":
            return TensorBoard(folder)
        return WeightsAndBiases(folder, config) if name == "wandb" else NoTracker()
    except ImportError as error:
        extra = "wandb" if name == "wandb" else "train"
        raise InputError(f"the tracker {name} is not installed: pip install 'openlance[{extra}]'") from error


class Report:
    """Says on the main process how the run goes; nothing on the others."""

    def __init__(self, run_dir: Path, first: int, steps: int, stage: str, tracker: Tracker, ranks: Ranks):
        self.tracker, self.ranks = tracker, ranks
        self.bar = tqdm(
            total=steps, initial=first, desc=stage, unit="step", disable=not ranks.main, dynamic_ncols=True
        )
        self.log = open(run_dir / LOG, "a") if ranks.main else None  # noqa: SIM115 (open as long as the run)
        self.shown: dict[str, float] = {}
        self.clock = time.perf_counter()

    def step(self, step: int, found: Mapping[str, float], tokens: float, flops: float, peak: float) -> None:
        """One update done.

        tokens: over all processes; flops: of the update, all processes, 0 where not known; peak: operations a
        second that all devices could do, 0 where not known.
        """
        now = time.perf_counter()
        seconds, self.clock = max(now - self.clock, 1e-9), now
        values = {**found, "tokens_per_second": tokens / seconds}
        if self.ranks.device.type == "cuda":
            values["memory_gib"] = torch.cuda.max_memory_allocated(self.ranks.device) / 2**30
        if flops and peak:
            values["mfu"] = flops / seconds / peak
        if self.log is None:
            return
        for name, value in values.items():
            old = self.shown.get(name, math.nan)
            self.shown[name] = value if math.isnan(old) else SMOOTH * old + (1 - SMOOTH) * value
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in self.shown.items()}, refresh=False)
        self.bar.update()
        self.write(step, values)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step, to the log and the tracker."""
        if self.log is not None:
            print(json.dumps({"step": step, **values}), file=self.log, flush=True)
            self.tracker.scalars(values, step)

    def say(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers that come now and then (validation): to the log, the tracker and the screen."""
        if self.log is not None:
            self.write(step, values)
            self.bar.write(
                f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            )

    def pictures(self, step: int, images: Mapping[str, Image]) -> None:
        for name, image in images.items():
            self.tracker.image(name, image, step)

    def close(self) -> None:
        self.bar.close()
        if self.log is not None:
            self.log.close()
            self.tracker.close()
