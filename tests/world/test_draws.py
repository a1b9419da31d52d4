"""What a seed draws never changes: the bundled model was trained on it, and nano-bench is measured on it."""

from hashlib import sha256

import numpy as np
import pytest

from openlance.train.nano_data import KINDS, draw
from openlance.world import (
    MOTIONS,
    TEXTURES,
    WORDS,
    WorldConfig,
    caption,
    describe,
    edit,
    question,
    render,
    sample_scene,
)

FULL = WorldConfig(max_things=3, textures=TEXTURES, words=WORDS, motions=MOTIONS)


@pytest.mark.parametrize(
    ("config", "held_out", "digest"),
    [
        (WorldConfig(), False, "7134b21c26671a2a"),
        (WorldConfig(), True, "80d34c6443474583"),
        (FULL, False, "0e9cfae183da9f03"),
    ],
)
def test_scenes_words_questions_and_edits_are_the_same_as_ever(config, held_out, digest):
    said = []
    for index in range(20):
        rng = np.random.default_rng((987_654, 1, index))
        scene = sample_scene(rng, config, held_out=held_out)
        asked, change = question(scene, rng), edit(scene, rng)
        said += [describe(scene, rng)[0], asked.question, asked.answer, change.instruction]
        said += [caption(change.after), str(rng.integers(1 << 30))]
    assert sha256("\n".join(said).encode()).hexdigest()[:16] == digest


ENCODED = (
    "1888dd4ad349020e",
    "1067f4efdf147986",
    "1d35014147323089",
    "55e59b183c802b1b",
    "4e3a3698ba2261dd",
    "a24624bd1e0373e0",
    "f557a2acf3e40adb",
    "c5016a6f2e7fe258",
    "e9c2122b94c33b46",
)


@pytest.mark.parametrize(
    ("kind", "digest"),
    list(zip(KINDS, ENCODED, strict=True)),
)
def test_encoded_items_are_the_same_as_ever(kind, digest):
    """By pixels, since an item's latents are stored and its words are drawn again."""
    found = sha256()
    for index in range(4):
        scenes, words = draw(kind, index)
        found.update(" ".join(words).encode())
        for scene in scenes:
            found.update(render(scene, 48).tobytes() + render(scene, 48, 1.0).tobytes())
    assert found.hexdigest()[:16] == digest
