"""Train nano's vision tower to say what stands in each place of a picture, on one CPU core, in minutes.

The heads are thrown away. Understanding starts only when features say what there is, so the tower learns that
first, on its own, and stays frozen afterwards, as in the real model.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from openlance.config import VisionConfig, nano
from openlance.data.buckets import to_vit_patches
from openlance.model.vision import Vision
from openlance.train.muon import Muon, split_parameters
from openlance.train.timed import TimedRun, set_rate
from openlance.world import (
    COLORS,
    GROUNDS,
    MOTIONS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    WORDS,
    Scene,
    WorldConfig,
    render,
    sample_scene,
)
from openlance.world.scene import STEPS

SIDE = 112  # pixels: 8 by 8 patches, 16 features
BATCH = 32
RATE_MATRICES, RATE_REST = 0.02, 2e-3
EMPTY_WEIGHT = 0.3  # of a place without a thing: most places are empty

STILL = WorldConfig(max_things=4)
DIET = (
    (0.6, STILL),
    (0.12, dataclasses.replace(STILL, textures=TEXTURES)),
    (0.1, dataclasses.replace(STILL, max_things=2, words=WORDS, text_share=1.0)),
    (0.18, dataclasses.replace(STILL, max_things=3, motions=MOTIONS)),
)
# What each head tells apart; 0 is "nothing here" in the first four, which are asked at every place.
PLACE_HEADS = {"shape": len(SHAPES), "color": len(COLORS), "size": len(SIZES), "motion": len(MOTIONS)}
PICTURE_HEADS = {"ground": len(GROUNDS), "texture": len(TEXTURES), "word": len(WORDS) + 1}


@dataclass(frozen=True)
class Example:
    """frames uint8 [2, H, W, 3]; places int64 [9, 4] and picture int64 [3]: the right class of every head."""

    frames: np.ndarray
    places: np.ndarray
    picture: np.ndarray


class Heads(nn.Module):
    """One linear map from all features of a picture to the classes of every head; not part of the model."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.sizes = [classes + 1 for classes in PLACE_HEADS.values()]
        self.places = nn.Linear(features, len(PLACES) * sum(self.sizes))
        self.picture = nn.Linear(features, sum(PICTURE_HEADS.values()))

    def forward(self, features: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """features [B, 16 * out_hidden] -> logits [B, 9, classes] per place head, [B, classes] per other."""
        places = self.places(features).view(len(features), len(PLACES), -1)
        picture = self.picture(features)
        return list(places.split(self.sizes, dim=-1)), list(
            picture.split(list(PICTURE_HEADS.values()), dim=-1)
        )


def train_vision(
    run_dir: Path, minutes: float, seed: int = 0, threads: int = 1, config: VisionConfig | None = None
) -> dict:
    """Train for `minutes` in all, going on from `run_dir/vision.pt` where it is.

    Writes `vision.safetensors` (names of `Vision.state_dict()`) and `vision.json` (configuration, held-out
    accuracy of every head, scale of the features), and returns what `vision.json` holds.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    config = config or nano().vision
    vision = Vision(config)
    heads = Heads((SIDE // 28) ** 2 * config.out_hidden)
    matrices, rest = split_parameters(vision)
    rest += list(heads.parameters())
    optimizers = (Muon(matrices, lr=RATE_MATRICES), torch.optim.AdamW(rest, lr=RATE_REST, weight_decay=0.01))
    parts = {"vision": vision, "heads": heads, "muon": optimizers[0], "adamw": optimizers[1]}
    run = TimedRun(Path(run_dir) / "vision.pt", minutes, parts, rng)
    shapes_right = 0.0
    for progress in run.progress():
        examples = [example(rng) for _ in range(BATCH)]
        features = see(vision, torch.stack([disturb(patches(e.frames), rng) for e in examples]))
        places, picture = heads(features)
        loss = losses(places, picture, examples)
        loss.backward()
        nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer, rate in zip(optimizers, (RATE_MATRICES, RATE_REST), strict=True):
            set_rate(optimizer, rate, progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        shapes_right += 0.05 * (_right(places, examples)["shape"] - shapes_right)
        run.report(loss=loss.item(), shape=shapes_right)
    return finish(vision, heads, Path(run_dir), run)


def see(vision: Vision, cut: Tensor) -> Tensor:
    """patches [B, 64, 1176] of B pictures -> all features of each [B, 16 * out_hidden]."""
    grid = torch.tensor([[1, SIDE // 14, SIDE // 14]]).expand(len(cut), 3)
    return vision(cut.flatten(0, 1), grid).view(len(cut), -1)


def losses(places: list[Tensor], picture: list[Tensor], examples: list[Example]) -> Tensor:
    """The sum of all heads' cross-entropies; empty places weigh less, and motion asks about things only."""
    wanted = torch.from_numpy(np.stack([e.places for e in examples]))
    total = torch.zeros(())
    for index, logits in enumerate(places):
        weight = torch.ones(logits.shape[-1])
        weight[0] = EMPTY_WEIGHT
        total = total + F.cross_entropy(logits.flatten(0, 1), wanted[..., index].flatten(), weight)
    wanted = torch.from_numpy(np.stack([e.picture for e in examples]))
    for index, logits in enumerate(picture):
        total = total + 0.3 * F.cross_entropy(logits, wanted[:, index])
    return total


def example(rng: np.random.Generator) -> Example:
    """A picture (two equal frames) or two frames of a clip, somewhere in its motion."""
    scene = sample_scene(rng, DIET[rng.choice(len(DIET), p=[share for share, _ in DIET])][1])
    if all(thing.motion == "still" for thing in scene.things):
        first = render(scene, SIDE)
        return Example(np.stack([first, first]), *labels(scene, 0.0))
    frames = int(rng.choice([2, 4, 6, 8, 9]))  # of the clip that the two are taken from
    at = 2 * int(rng.integers(frames // 2))
    start, end = at / (frames - 1), (at + 1) / (frames - 1)
    return Example(np.stack([render(scene, SIDE, start), render(scene, SIDE, end)]), *labels(scene, start))


def labels(scene: Scene, time: float) -> tuple[np.ndarray, np.ndarray]:
    """(places, picture) as in `Example`: each thing where it stands, and as large as it is, at that time."""
    places = np.zeros((len(PLACES), len(PLACE_HEADS)), dtype=np.int64)
    for thing in scene.things:
        size = thing.size
        spot = PLACES.index(thing.place)
        if time > 0.5:
            dx, dy = STEPS.get(thing.motion, (0, 0))
            spot += dx + 3 * dy
            size = {"grow": "large", "shrink": "small"}.get(thing.motion, size)
        kinds = (
            SHAPES.index(thing.shape),
            list(COLORS).index(thing.color),
            SIZES.index(size),
            MOTIONS.index(thing.motion),
        )
        places[spot] = np.add(kinds, 1)
    word = 1 + WORDS.index(scene.text.word) if scene.text else 0
    return places, np.array([list(GROUNDS).index(scene.ground), TEXTURES.index(scene.texture), word])


def patches(frames: np.ndarray) -> Tensor:
    """uint8 [2, H, W, 3] -> patches [64, 1176], as the model is given them."""
    return to_vit_patches(frames)[0]


def disturb(cut: Tensor, rng: np.random.Generator) -> Tensor:
    """Noise, loss of contrast and blur inside each patch: what a VAE does to a picture, roughly."""
    if rng.random() < 0.5:
        return cut
    images = cut.view(-1, 1, 14, 14)
    for _ in range(rng.integers(3)):
        images = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    gain, lift = rng.uniform(0.9, 1.1), rng.uniform(-0.1, 0.1)
    return images.reshape(cut.shape) * gain + lift + rng.uniform(0, 0.25) * torch.randn(cut.shape)


@torch.no_grad()
def finish(vision: Vision, heads: Heads, run_dir: Path, run: TimedRun, count: int = 512) -> dict:
    """Measure accuracy on scenes never trained on, held-out pairs apart; scale the features to a standard
    deviation of one through the last layer; write the result.
    """
    accuracy = {}
    for name, held_out in (("seen pairs", False), ("held-out pairs", True)):
        rng = np.random.default_rng(10**7)
        accuracy[name] = _accuracy(vision, heads, rng, held_out, count)
    rng = np.random.default_rng(10**6)
    shown = torch.stack([patches(example(rng).frames) for _ in range(64)])
    last = vision.tower.merger.mlp[2]
    scale = 1 / see(vision, shown).std()
    last.weight *= scale
    last.bias *= scale
    features = see(vision, shown)
    state = {name: value.contiguous() for name, value in vision.state_dict().items()}
    save_file(state, run_dir / "vision.safetensors")
    result = {
        "config": dataclasses.asdict(vision.config),
        "parameters": sum(p.numel() for p in vision.parameters()),
        "accuracy": accuracy,
        "features": {"mean": round(features.mean().item(), 4), "std": round(features.std().item(), 4)},
        "steps": run.step,
        "minutes": round(run.seconds / 60, 1),
    }
    (run_dir / "vision.json").write_text(json.dumps(result, indent=1))
    return json.loads((run_dir / "vision.json").read_text())


def _accuracy(
    vision: Vision, heads: Heads, rng: np.random.Generator, held_out: bool, count: int
) -> dict[str, float]:
    """The share right per head: over places with a thing, and of "empty" over places without one."""
    examples = []
    for _ in range(count):
        scene = sample_scene(rng, dataclasses.replace(STILL, max_things=3), held_out=held_out)
        first = render(scene, SIDE)
        examples.append(Example(np.stack([first, first]), *labels(scene, 0.0)))
    batches = [examples[i : i + 64] for i in range(0, count, 64)]
    sums: dict[str, float] = {}
    for batch in batches:
        places, _ = heads(see(vision, torch.stack([patches(e.frames) for e in batch])))
        for name, value in _right(places, batch).items():
            sums[name] = sums.get(name, 0.0) + value / len(batches)
    return {name: round(value, 4) for name, value in sums.items()}


def _right(places: list[Tensor], examples: list[Example]) -> dict[str, float]:
    wanted = torch.from_numpy(np.stack([e.places for e in examples]))
    there = wanted[..., 0] > 0
    right = {}
    for index, (name, logits) in enumerate(zip(PLACE_HEADS, places, strict=True)):
        right[name] = (logits.argmax(-1) == wanted[..., index])[there].float().mean().item()
    right["empty"] = (places[0].argmax(-1) == 0)[~there].float().mean().item()
    return right
