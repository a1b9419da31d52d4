"""Conversations as a user writes them, into turns that the model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from openlance.config import ModelConfig
from openlance.data.media import Media, Video
from openlance.errors import InputError
from openlance.infer.prepare import Resolutions, load, view
from openlance.infer.result import Generated
from openlance.sequence.segment import Role, Segment
from openlance.sequence.template import Message, Task, system_prompt

PART = 'give {"type": "text", "text": …}, {"type": "image", "image": …} or {"type": "video", "video": …}'


def question(words: str, media: Any) -> list[dict[str, Any]]:
    """One user's message: media first, then words where there are any. Raises InputError for neither."""
    sources = list(media) if isinstance(media, (list, tuple)) else [media]
    content: list[dict[str, Any]] = [{"type": "media", "media": source} for source in sources]
    if words.strip():
        content.append({"type": "text", "text": words})
    if not content:
        raise InputError("nothing is asked: give a question, or something to look at")
    return [{"role": "user", "content": content}]


def read(messages: Sequence[Mapping[str, Any]], config: ModelConfig) -> tuple[Task, list[Message]]:
    """What is asked, and the turns with their media seen and a system prompt in front.

    messages: as for `LancePipeline.chat`; a system message of the user's own replaces the checkpoint's.
    Raises InputError for a message or part of another form, or a last turn that is not the user's.
    """
    for message in messages:
        if not isinstance(message, Mapping):
            raise InputError(f'unknown message {message!r}: give {{"role": "user", "content": …}}')
    loaded = [(message.get("role", ""), _content(message, config)) for message in messages]
    if not loaded or loaded[-1][0] != "user":
        raise InputError("a conversation must end with a user's message")
    media = [part for _, parts in loaded for part in parts if not isinstance(part, str)]
    video = any(isinstance(part, Video) for part in media)
    task = (Task.X2T_VIDEO if video else Task.X2T_IMAGE) if media else Task.CHAT
    turns = [Message(role, tuple(_see(part, config) for part in parts)) for role, parts in loaded]
    if turns[0].role != "system":
        caption = not any(isinstance(part, str) for part in loaded[-1][1])  # as in training
        turns.insert(0, Message("system", (system_prompt(task, config.system_prompts, caption=caption),)))
    return task, turns


def prompt(text: Any) -> str:
    """The words of a prompt. Raises InputError where there are none."""
    if not isinstance(text, str) or not text.strip():
        raise InputError("the prompt is empty: say what you want")
    return text


def media_of(source: Any, config: ModelConfig) -> Media:
    """A picture or clip from wherever it is, an earlier result included."""
    return source.media if isinstance(source, Generated) else load(source, config.sizes)


def _content(message: Mapping[str, Any], config: ModelConfig) -> list[str | Media]:
    content = message.get("content")
    if isinstance(content, str):
        return [content if message.get("role") == "assistant" else prompt(content)]  # a model may say nothing
    if not isinstance(content, (list, tuple)) or not content:
        raise InputError("a message's content must be a text, or a list of parts that is not empty")
    parts: list[str | Media] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "image", "video", "media") or kind not in part:
            raise InputError(f"unknown part {part!r}: {PART}")
        parts.append(prompt(part["text"]) if kind == "text" else media_of(part[kind], config))
    return parts


def _see(part: str | Media, config: ModelConfig) -> str | Segment:
    if isinstance(part, str):
        return part
    resolutions = Resolutions.of(config.sizes, video=isinstance(part, Video))
    return view(part, resolutions, config, None).segments(Role.SOURCE)[0]
