"""Measure the judge: how often it reads each attribute right, and how often it rejects a wrong picture."""

import argparse
from collections import defaultdict
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from openlance.world.edits import edit
from openlance.world.judge import check
from openlance.world.language import claims_of
from openlance.world.render import render, render_clip
from openlance.world.scene import MOTIONS, TEXTURES, WORDS, WorldConfig, sample_scene

BLUR, NOISE = 1.0, 8.0  # sigma in pixels, sigma in levels of 0 to 255
PICTURES = WorldConfig(max_things=3, count_weights=(1, 1, 1), textures=TEXTURES, words=WORDS)
CLIPS = WorldConfig(max_things=3, count_weights=(1, 1, 1), textures=TEXTURES, motions=MOTIONS)


def spoil(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur and then disturb uint8 [..., H, W, 3]."""
    soft = ndimage.gaussian_filter(picture.astype(np.float32), (*(0,) * (picture.ndim - 3), BLUR, BLUR, 0))
    return np.clip(np.rint(soft + NOISE * rng.standard_normal(picture.shape)), 0, 255).astype(np.uint8)


def measure(
    config: WorldConfig, scenes: int, draw: Callable, rng: np.random.Generator, *, noisy: bool
) -> dict[str, float]:
    """Shares of scenes where the judge confirms what is true, by attribute, and rejects an edited scene.

    draw(scene) gives the picture or clip.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for _ in range(scenes):
        scene = sample_scene(rng, config, held_out=None)
        shown, other = draw(scene), draw(edit(scene, rng).after)
        if noisy:
            shown, other = spoil(shown, rng), spoil(other, rng)
        claims = claims_of(scene, clip=shown.ndim == 4)
        verdict = check(claims, shown)
        for name, value in verdict.claimed.items():
            right[name].append(value)
        right["all"].append(verdict.all)
        right["rejects"].append(not check(claims, other).all)
    return {name: float(np.mean(values)) for name, values in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m openlance.world.judge", description=__doc__)
    parser.add_argument("--scenes", type=int, default=1000, help="pictures, and a fifth as many clips")
    parser.add_argument("--size", type=int, default=112, help="side in pixels, a multiple of 16")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    columns = {}
    for noisy in (False, True):
        rng = np.random.default_rng(given.seed)
        draws = {
            "pictures": (PICTURES, given.scenes, lambda scene: render(scene, given.size)),
            "clips": (CLIPS, max(1, given.scenes // 5), lambda scene: render_clip(scene, 5, given.size)),
        }
        for kind, (config, scenes, draw) in draws.items():
            name = f"{kind}, {'noisy' if noisy else 'clean'}"
            columns[name] = measure(config, scenes, draw, rng, noisy=noisy)
    print(f"noisy: blur of {BLUR} pixels, then noise of {NOISE} levels; rejects: of scenes with one edit")
    print(f"{'':10}" + "".join(f"{name:>17}" for name in columns))
    for row in dict.fromkeys(name for column in columns.values() for name in column):
        cells = (f"{column[row]:.4f}" if row in column else "" for column in columns.values())
        print(f"{row:10}" + "".join(f"{cell:>17}" for cell in cells))


if __name__ == "__main__":
    main()
