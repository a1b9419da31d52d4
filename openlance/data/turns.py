"""Conversations with words, pictures and clips in any order: rows with a column `turns`.

`turns` is a list, or the JSON of one, of {"role": "user" or "assistant", "content": words or parts}; a part
is {"type": "text", "text": words}, {"type": "image", "image": place} or {"type": "video", "video": place}.
The place is an index into the column `media`, or the name of a column with the bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from openlance.data.example import Example, Turn
from openlance.data.fields import Fields
from openlance.data.media import Media
from openlance.sequence.template import Task


class Shown(NamedTuple):
    """A picture or clip of a conversation, not decoded yet."""

    video: bool
    place: int | str


Part = str | Shown


@dataclass(frozen=True)
class Exchange:
    """What the user said and showed, and what came back."""

    prompt: str
    shown: tuple[Shown, ...]
    reply: Part


def read_turns(fields: Fields, task: Task | None) -> Example:
    """One of the assistant's turns, drawn, with what went before it as history.

    task: draw only among the turns of this task. Raises BadRow for turns of another form, and where there is
    none to draw.
    """
    exchanges = _exchanges(fields)
    tasks = [_task(exchanges[: end + 1]) for end in range(len(exchanges))]
    wanted = [place for place, found in enumerate(tasks) if task in (None, found)]
    if not wanted:
        found = ", ".join(sorted(set(tasks))) or "without a turn of the assistant"
        raise fields.bad(f"the conversation has no turn to learn ({found})")
    place = wanted[int(fields.rng.integers(len(wanted)))]
    last = exchanges[place]
    return Example(
        fields.id,
        tasks[place],
        last.prompt,
        answer=last.reply if isinstance(last.reply, str) else None,
        sources=_decode_all(fields, last.shown),
        target=None
        if isinstance(last.reply, str)
        else fields.target("the reply", _decode(fields, last.reply)),
        history=tuple(_turn(fields, exchange) for exchange in exchanges[:place]),
    )


def _exchanges(fields: Fields) -> list[Exchange]:
    """The turns in pairs; what the user says after the last answer is left out."""
    found: list[Exchange] = []
    asked: list[Part] = []
    for message in _messages(fields):
        role = message.get("role")
        parts = list(_parts(fields, message.get("content")))
        if role == "user":
            asked += parts
        elif role == "assistant":
            found.append(_exchange(fields, asked, parts))
            asked = []
        else:
            raise fields.bad(f"a turn's role is {role!r}, not user or assistant")
    return found


def _messages(fields: Fields) -> Sequence[Mapping[str, Any]]:
    turns = fields.value("turns")
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except ValueError as error:
            raise fields.bad(f"turns: not JSON ({error})") from error
    if not isinstance(turns, list) or not all(isinstance(message, Mapping) for message in turns):
        raise fields.bad('turns must be a list of {"role": …, "content": …}')
    return turns


def _parts(fields: Fields, content: Any) -> Iterator[Part]:
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise fields.bad("a turn's content must be words, or a list of parts that is not empty")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        value = part.get(kind) if isinstance(part, Mapping) and kind in ("text", "image", "video") else None
        if kind == "text" and isinstance(value, str):
            yield value
        elif kind in ("image", "video") and isinstance(value, int | str):
            yield Shown(kind == "video", value)
        else:
            raise fields.bad("a part of a turn is no text, image or video with its words or its place")


def _exchange(fields: Fields, asked: list[Part], answered: list[Part]) -> Exchange:
    words = [part for part in answered if isinstance(part, str)]
    shown = [part for part in answered if isinstance(part, Shown)]
    if len(shown) + bool(words) != 1:
        raise fields.bad("a turn of the assistant must be either words or one picture or clip")
    reply: Part = shown[0] if shown else "\n".join(words)
    if isinstance(reply, str) and not reply.strip():
        raise fields.bad("a turn of the assistant is empty")
    prompt = "\n".join(part for part in asked if isinstance(part, str))
    return Exchange(prompt, tuple(part for part in asked if isinstance(part, Shown)), reply)


def _task(exchanges: Sequence[Exchange]) -> Task:
    """What the last of these turns asks for: it follows from the reply, and from all that stands before."""
    reply = exchanges[-1].reply
    seen = [part for exchange in exchanges for part in exchange.shown]
    seen += [exchange.reply for exchange in exchanges[:-1] if isinstance(exchange.reply, Shown)]
    clips = any(part.video for part in seen)
    if isinstance(reply, str):
        return (Task.X2T_VIDEO if clips else Task.X2T_IMAGE) if seen else Task.CHAT
    if not seen:
        return Task.T2V if reply.video else Task.T2I
    if not reply.video:
        return Task.IMAGE_EDIT
    return Task.VIDEO_EDIT if clips else Task.SUBJECT_VIDEO


def _turn(fields: Fields, exchange: Exchange) -> Turn:
    reply = exchange.reply if isinstance(exchange.reply, str) else _decode(fields, exchange.reply)
    return Turn(exchange.prompt, reply, _decode_all(fields, exchange.shown))


def _decode_all(fields: Fields, shown: Sequence[Shown]) -> tuple[Media, ...]:
    return tuple(_decode(fields, part) for part in shown)


def _decode(fields: Fields, part: Shown) -> Media:
    if isinstance(part.place, str):
        return fields.decode(part.place, fields.value(part.place), video=part.video)
    media = fields.value("media")
    if not isinstance(media, list) or not 0 <= part.place < len(media):
        raise fields.bad(f"turns name media[{part.place}], which is not there")
    return fields.decode(f"media[{part.place}]", media[part.place], video=part.video)
