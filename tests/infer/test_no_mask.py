"""Inference materialises no mask: a long clip fits into memory that a square of its tokens would burst."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

CLIP, TARGET = (12, 32, 32), (3, 32, 32)
TOKENS = 12 * 32 * 32
ROOM = 64 * 2**20  # bytes; a mask of the clip takes 144 MiB, a float score of one head 576; measured 28

PROGRAM = """
    import resource, sys
    import torch
    sys.path.insert(0, sys.argv[1])
    from tiny import CHANNELS, compose_task, network, noise, seen, target, clean
    from openlance.config import SamplingConfig, TextConfig
    from openlance.infer.generate import denoise
    from openlance.infer.speak import speak
    from openlance.sequence.template import Task

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    torch.set_num_threads(1)
    clip, made = eval(sys.argv[2]), eval(sys.argv[3])
    short = compose_task(Task.X2T_VIDEO, [seen((1, 2, 2)), "What?"])
    list(speak(network(), short, TextConfig(max_tokens=2), allowed=300, stop=()))
    question = compose_task(Task.X2T_VIDEO, [seen(clip), "What?"])
    edit = compose_task(Task.VIDEO_EDIT, [clean(made), "Make it red."], target(made))[:-1]
    start = noise(*made, CHANNELS)
    before = peak()
    words = list(speak(network(), question, TextConfig(max_tokens=2), allowed=300, stop=()))
    denoise(network(), edit, SamplingConfig(steps=1), start)
    print(len(words), peak() - before)
"""


@pytest.mark.slow
def test_a_long_clip_needs_memory_for_its_tokens_only() -> None:
    helpers = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(helpers), str(CLIP), str(TARGET)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    words, grown = map(int, done.stdout.split())
    assert words == 2
    assert TOKENS**2 > 2 * ROOM  # so that a mask would not fit
    assert grown < ROOM
