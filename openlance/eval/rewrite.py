"""Prompts in more words, which models that learnt from long captions follow better.

Only what the model reads is rewritten: files keep the names, and scorers the prompts, of the benchmark.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from openlance.data.save import save_json
from openlance.errors import InputError
from openlance.eval.endpoint import ask
from openlance.eval.settings import Endpoint
from openlance.model.release import read_json

if TYPE_CHECKING:
    from openlance.infer.pipeline import LancePipeline

MAX_TOKENS = 300
INSTRUCTIONS = {
    "picture": (
        "You write prompts for a model that draws pictures. Say the user's prompt again in one paragraph of "
        "40 to 90 words that describes the finished picture: keep every object, number, color, position and "
        "written word exactly as given, add only what they leave open (setting, light, framing), and "
        "contradict nothing. Answer with the paragraph alone."
    ),
    "clip": (
        "You write prompts for a model that films short clips. Say the user's prompt again in one paragraph "
        "of 60 to 120 words that describes the finished clip: keep every subject, action, number, color, "
        "place, style and movement of the camera exactly as given, say how things move from beginning to "
        "end, add only what is left open, and contradict nothing. Answer with the paragraph alone."
    ),
}

Writer = Callable[[str, str], str]
"""(instruction, prompt) → the prompt in more words."""


class Rewriter:
    """Rewrites prompts, each once: what was rewritten is kept in `folder`, one file for each prompt.

    name: of the writer, so that another one writes anew. kind: "picture" or "clip".
    """

    def __init__(self, writer: Writer, name: str, kind: str, folder: Path):
        self.writer, self.name, self.folder = writer, name, folder
        self.instruction = INSTRUCTIONS[kind]

    def __call__(self, prompt: str) -> str:
        """The prompt in more words. Raises InputError for a writer that fails or says nothing."""
        key = "\n".join((self.name, self.instruction, prompt))
        file = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
        if file.is_file():
            return str(read_json(file)["rewritten"])
        rewritten = " ".join(self.writer(self.instruction, prompt).split())
        if not rewritten:
            raise InputError(f"{self.name}: rewrote a prompt into nothing: {prompt!r}")
        save_json({"prompt": prompt, "rewritten": rewritten, "by": self.name}, file)
        return rewritten


def by_service(service: Endpoint) -> Writer:
    """A writer behind an OpenAI-compatible endpoint."""
    return lambda instruction, prompt: ask(service, prompt, system=instruction, max_tokens=MAX_TOKENS)


def by_model(lance: LancePipeline) -> Writer:
    """The measured model's own chat."""

    def write(instruction: str, prompt: str) -> str:
        messages = [{"role": "system", "content": instruction}, {"role": "user", "content": prompt}]
        return lance.chat(messages, max_tokens=MAX_TOKENS, seed=0).text

    return write
