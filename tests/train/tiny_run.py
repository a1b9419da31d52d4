"""A training run of the tiny network, as a script: what tests start on several processes, kill and resume.

    python tests/train/tiny_run.py RUN_DIR '{"steps": 4, "lanes": 2}' [--resume] [--weights FILE]

Its settings are those of TrainConfig; "pause": seconds before each step, "spoil": the step from which latents
are NaN.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import build_network, samples

from openlance.sequence.segment import Sample
from openlance.train.loop import Stopped, train
from openlance.train.parallel import Ranks, join, leave
from openlance.train.settings import TrainConfig

NAMES = list(samples())
RUN: dict[str, Any] = {
    "steps": 4, "lanes": 2, "learning_rate": 1e-2, "warmup": 2, "drop_text": 0.3, "ema": 0.5,
    "time_shift": 3.0, "save_every": 1, "validate_every": 0,
}  # fmt: skip


@dataclass
class TinyPack:
    lane: int
    samples: list[Sample]
    ids: list[str]


@dataclass
class TinyFeed:
    """Each lane counts through the samples: what comes next depends on where it stands, as with real data."""

    lanes: int
    ranks: Ranks = field(default_factory=Ranks)
    each: int = 2
    pause: float = 0.0
    spoil: int | None = None
    names: tuple[str, ...] = tuple(NAMES)
    served: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.places = {lane: lane for lane in range(self.ranks.data_rank, self.lanes, self.ranks.data_size)}

    def packs(self, step: int) -> Iterator[TinyPack]:
        self.served.append(step)
        time.sleep(self.pause)
        for lane, place in self.places.items():
            names = [self.names[(place + i) % len(self.names)] for i in range(self.each)]
            self.places[lane] = place + self.lanes
            given = [samples()[name] for name in names]
            if self.spoil is not None and step >= self.spoil:
                given = [[_spoiled(segment) for segment in sample] for sample in given]
            yield TinyPack(lane, given, [f"{step}/{lane}/{name}" for name in names])

    def state(self) -> dict[str, Any]:
        return {str(lane): place for lane, place in self.places.items()}

    def restore(self, states: Mapping[str, Any]) -> None:
        self.places = {lane: states[str(lane)] for lane in self.places}


def _spoiled(segment: Any) -> Any:
    return segment if segment.latents is None else replace(segment, latents=segment.latents * math.nan)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--weights", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    extra = {name: args.settings.pop(name) for name in ("pause", "spoil") if name in args.settings}
    settings = RUN | args.settings
    if "trains" in settings:
        settings["trains"] = tuple(settings["trains"])
    config = TrainConfig(**settings)
    ranks = join("cpu", config.context)
    feed = TinyFeed(config.lanes, ranks, **extra)
    try:
        weights = train(build_network(3), feed, config, args.run_dir, ranks=ranks, resume=args.resume)
        if args.weights is not None and ranks.main:
            torch.save(dict(weights), args.weights)
    except Stopped as stopped:
        print(stopped, flush=True)
    finally:
        leave()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
