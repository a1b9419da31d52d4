"""Every word of the world, to train a tokenizer on."""

import numpy as np

from openlance.world.boxes import locate
from openlance.world.edits import WIDE_EDIT_KINDS, edit
from openlance.world.language import NUMBERS, caption
from openlance.world.questions import WIDE_QUESTION_KINDS, question
from openlance.world.scene import (
    COLORS,
    GROUNDS,
    MOTIONS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    TIMES,
    WORDS,
    WorldConfig,
    sample_scene,
)
from openlance.world.several import question_of_several, sample_several
from openlance.world.talk import PLANS, chain, converse

WIDE = WorldConfig(max_things=3, textures=TEXTURES, words=WORDS)
TIMED = WorldConfig(max_things=2, motions=MOTIONS, times=TIMES)
WIDE_ROUNDS = 60  # few, so that the words of every caption stay whole in a small vocabulary


def vocabulary_texts() -> list[str]:
    """Captions, questions, answers and instructions with every word of the world, to train a tokenizer on."""
    rng = np.random.default_rng(0)
    moving = WorldConfig(max_things=3, textures=TEXTURES, words=WORDS, motions=MOTIONS)
    texts = [" ".join(words) for words in (SHAPES, COLORS, GROUNDS, PLACES, SIZES, NUMBERS)]
    texts += [word.lower() for word in WORDS]
    for config in (WorldConfig(), moving):
        for _ in range(400):
            scene = sample_scene(rng, config)
            asked = question(scene, rng)
            texts += [caption(scene, rng), asked.question, asked.answer, edit(scene, rng).instruction]
    return texts + [text for _ in range(WIDE_ROUNDS) for text in _wide_texts(rng)]


def _wide_texts(rng: np.random.Generator) -> list[str]:
    """One round of what the wide kinds say."""
    scene = sample_scene(rng, WIDE)
    located, several = locate(scene, rng), question_of_several(sample_several(rng, WIDE), rng)
    asked = question(scene, rng, (*WIDE_QUESTION_KINDS, "count"))
    changed = edit(scene, rng, (*WIDE_EDIT_KINDS, "recolor"))
    (first, *_) = converse(*chain(rng, WorldConfig()), rng, PLANS[int(rng.integers(len(PLANS)))])
    return [
        caption(sample_scene(rng, TIMED), rng), located.question, located.answer, several.question,
        several.answer, asked.question, asked.answer, changed.instruction, first.words,
    ]  # fmt: skip
