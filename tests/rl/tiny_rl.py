"""Reinforcement learning of the tiny network: prompts, a stand-in for the VAE, and a reward of brightness.

python tests/rl/tiny_rl.py RUN_DIR '{"steps": 4}' [--resume] [--weights FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import build_network, samples

from openlance.rl.learn import HeldOut, train_rl
from openlance.rl.rewards import Rewards
from openlance.rl.rollout import Prompt
from openlance.train.loop import Stopped
from openlance.train.parallel import Ranks, join, leave
from openlance.train.settings import RLConfig

RUN: dict[str, Any] = {
    "steps": 2, "lanes": 2, "group": 4, "rollout_steps": 4, "window": 1, "time_shift": 2.0, "guidance": 2.0,
    "learning_rate": 1e-3, "trains": ("gen",), "ema": 0.5, "save_every": 1, "validate_every": 0,
}  # fmt: skip


def rl_config(**changes: object) -> RLConfig:
    return RLConfig(**(RUN | changes))


def decode(latents: Tensor) -> np.ndarray:
    """A grey picture for each latent frame: brighter for larger values of the first channel."""
    level = torch.sigmoid(latents[..., 0].mean((1, 2)).float()) * 255
    return (
        level.round()
        .to(torch.uint8)
        .cpu()
        .numpy()[:, None, None, None]
        .repeat(16, 1)
        .repeat(16, 2)
        .repeat(3, 3)
    )


def bright(prompts: Sequence[str], media: Sequence[Any], metadata: Sequence[Mapping]) -> list[float]:
    return [float(frames.mean()) / 255 for frames in media]


def even(prompts: Sequence[str], media: Sequence[Any], metadata: Sequence[Mapping]) -> list[float]:
    return [0.25] * len(prompts)


def prompt(name: str = "t2i", lane: int = 0) -> Prompt:
    sample = samples()[name]
    return Prompt(
        name, sample[: 1 + next(i for i, s in enumerate(sample) if s.kind == "noisy")], {}, lane, name
    )


def tiny_held_out() -> HeldOut:
    return HeldOut([prompt("t2i"), prompt("image_edit"), prompt("t2v")], Rewards({"even": even}))


@dataclass
class TinyPrompts:
    """The same prompts at every step, one for each lane."""

    lanes: int
    ranks: Ranks = field(default_factory=Ranks)
    names: tuple[str, ...] = ("t2i",)
    served: list[int] = field(default_factory=list)

    def packs(self, step: int) -> Iterator[Prompt]:
        self.served.append(step)
        for lane in range(self.ranks.data_rank, self.lanes, self.ranks.data_size):
            yield prompt(self.names[(step + lane) % len(self.names)], lane)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, states: Mapping[str, Any]) -> None:
        pass


def run(
    run_dir: Path, config: RLConfig, ranks: Ranks | None = None, **options: Any
) -> tuple[Any, Any, TinyPrompts]:
    """A run of the tiny network: its averaged weights, the network and the feed."""
    model = options.pop("model", None) or build_network(3)
    feed = TinyPrompts(config.lanes, ranks or Ranks(), options.pop("names", ("t2i",)))
    rewards = options.pop("rewards", Rewards({"bright": bright}))
    found = train_rl(model, feed, config, run_dir, decode=decode, rewards=rewards, ranks=ranks, **options)
    return dict(found), model, feed


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--weights", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    ranks = join("cpu")
    try:
        weights, _, _ = run(
            args.run_dir, rl_config(**args.settings), ranks, resume=args.resume, held_out=tiny_held_out()
        )
        if args.weights is not None and ranks.main:
            torch.save(weights, args.weights)
    except Stopped as stopped:
        print(stopped, flush=True)
    finally:
        leave()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
