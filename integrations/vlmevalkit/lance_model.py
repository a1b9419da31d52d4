"""Lance behind VLMEvalKit's interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmeval.vlm.base import BaseModel

from openlance.infer.pipeline import LancePipeline


class Lance(BaseModel):
    """Answers messages of pictures, clips and words, in the order in which they stand."""

    INSTALL_REQ = False
    INTERLEAVE = True
    VIDEO_LLM = True

    def __init__(self, model: str = "nano", variant: str | None = None, max_tokens: int = 512):
        super().__init__()
        self.max_tokens = max_tokens
        self.pipeline = LancePipeline.from_pretrained(
            model,
            variant=variant,
            tasks=["chat", "x2t_image", "x2t_video"],  # type: ignore[list-item]
        )

    def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to one message."""
        return self.chat_inner([{"role": "user", "content": message}], dataset)

    def chat_inner(self, messages: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to the last of several messages."""
        said = [{"role": m["role"], "content": [_part(part) for part in m["content"]]} for m in messages]
        return self.pipeline.chat(said, max_tokens=self.max_tokens, seed=0).text


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": part["type"], part["type"]: part["value"]}
