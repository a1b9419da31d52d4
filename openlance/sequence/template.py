"""Task, text and media into a sample: Qwen's chat template, cut into segments by role."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from openlance.errors import InputError
from openlance.sequence.segment import Kind, Role, Sample, Segment

Encode = Callable[[str], tuple[list[int], list[tuple[int, int]]]]
"""Text to token ids and each token's (start, end) in characters."""


class Task(StrEnum):
    """What is asked of the model."""

    T2I = "t2i"
    T2V = "t2v"
    I2V = "i2v"
    IMAGE_EDIT = "image_edit"
    VIDEO_EDIT = "video_edit"
    SUBJECT_IMAGE = "subject_image"
    SUBJECT_VIDEO = "subject_video"
    X2T_IMAGE = "x2t_image"
    X2T_VIDEO = "x2t_video"
    CHAT = "chat"

    @property
    def generates(self) -> bool:
        """Whether the task ends in a picture or clip (else in words)."""
        return self not in (Task.X2T_IMAGE, Task.X2T_VIDEO, Task.CHAT)

    @property
    def video(self) -> bool:
        """Whether what is generated or looked at is a clip."""
        return self in (Task.T2V, Task.I2V, Task.VIDEO_EDIT, Task.SUBJECT_VIDEO, Task.X2T_VIDEO)


def parse_task(name: str) -> Task:
    """A task by name. Raises InputError for an unknown one."""
    try:
        return Task(name)
    except ValueError:
        raise InputError(f"unknown task {name!r}: choose one of {', '.join(Task)}") from None


_MOTION = (
    "Describe the {} by detailing the color, quantity, visible text, shape, size, texture, spatial "
    "relationships and motion/camera movements of the objects and background:"
)
_EDIT = (
    "Describe the key features of the input {0} (color, shape, size, texture, objects, background), then "
    "explain how the user’s text instruction should alter or modify the {0}. Generate a new {0} that meets "
    "the user’s requirements while maintaining consistency with the original input where appropriate."
)
_SUBJECT = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background, "
    "style), then incorporate the user’s text description to generate a new {} that satisfies the user’s "
    "requirements while preserving the essential identity and object or style information from the "
    "reference input."
)
_CAPTION = (
    "Generate a detailed and accurate description of the {}, including all the key moments and visual "
    "details."
)

# The strings that the released weights were trained with, and so expect.
SYSTEM_PROMPTS: dict[str, str] = {
    Task.T2I: "Describe the image by detailing the color, quantity, text, shape, size, texture, spatial "
    "relationships of the objects and background:",
    Task.T2V: _MOTION.format("video"),
    Task.I2V: _MOTION.format("video"),
    Task.IMAGE_EDIT: _EDIT.format("image"),
    Task.VIDEO_EDIT: _EDIT.format("video"),
    Task.SUBJECT_IMAGE: _SUBJECT.format("image"),
    Task.SUBJECT_VIDEO: _SUBJECT.format("image"),  # sic: the released sampler names the reference's kind
    Task.X2T_IMAGE: "Look at the image carefully and answer the question.",
    Task.X2T_VIDEO: "Watch the video carefully and answer the question.",
    Task.CHAT: "You are a helpful assistant.",
    "caption_image": _CAPTION.format("image"),
    "caption_video": _CAPTION.format("video"),
}


def system_prompt(task: Task, overrides: dict[str, str], *, caption: bool = False) -> str:
    """The system prompt of a task: the checkpoint's own, else the released one.

    caption: an understanding task without a question, which has a prompt of its own.
    """
    key = str(task)
    if caption and task in (Task.X2T_IMAGE, Task.X2T_VIDEO):
        key = "caption_video" if task.video else "caption_image"
    return overrides.get(key, SYSTEM_PROMPTS[key])


@dataclass(frozen=True, eq=False)
class Message:
    """One turn. role: "system", "user" or "assistant". parts: words and visual segments, in order.

    past: an earlier turn, whose words are context: guidance keeps them, and they carry no loss.
    """

    role: str
    parts: tuple[str | Segment, ...]
    past: bool = False


_TEXT_ROLE = {"system": Role.TEMPLATE, "user": Role.USER, "assistant": Role.ANSWER}


def build(messages: Sequence[Message], encode: Encode, *, open_turn: bool = False) -> Sample:
    """Render messages with the chat template and cut the result into segments.

    Neighbouring words and markers are tokenised together, as the released code does, then cut at the
    borders between roles: a token belongs to the role in which it starts. `<|im_end|>` after an answer is
    part of the answer (the model learns to stop). open_turn: end with an open assistant turn, to be
    continued by the model. Raises InputError for an unknown role.
    """
    pieces: list[tuple[Role, str] | Segment] = []
    for index, message in enumerate(messages):
        if message.role not in _TEXT_ROLE:
            raise InputError(f"unknown message role {message.role!r}: choose system, user or assistant")
        role = Role.TEMPLATE if message.past else _TEXT_ROLE[message.role]
        pieces.append((Role.TEMPLATE, ("\n" if index else "") + f"<|im_start|>{message.role}\n"))
        for part in message.parts:
            pieces.append(part if isinstance(part, Segment) else (role, part))
        ends_answer = role is Role.ANSWER and bool(message.parts) and isinstance(message.parts[-1], str)
        pieces.append((Role.ANSWER if ends_answer else Role.TEMPLATE, "<|im_end|>"))
    if open_turn:
        pieces.append((Role.TEMPLATE, "\n<|im_start|>assistant\n"))

    sample: Sample = []
    run: list[tuple[Role, str]] = []
    for piece in pieces:
        if isinstance(piece, Segment):
            sample += _tokenise(run, encode)
            sample.append(piece)
            run = []
        else:
            run.append(piece)
    return sample + _tokenise(run, encode)


def compose(
    parts: Sequence[str | Segment],
    encode: Encode,
    *,
    system: str,
    ending: str | Segment | None = None,
    history: Sequence[Message] = (),
) -> Sample:
    """A task as a sample: system prompt, earlier turns, the user's turn, and what the assistant gives.

    parts: the user's turn in order; of each reference, its ViT segment, then its clean latents. ending:
    the target segment or the answer; None leaves the assistant's turn open for words to follow.
    """
    turns = [Message("system", (system,)), *history, Message("user", tuple(parts))]
    if ending is None:
        return build(turns, encode, open_turn=True)
    return build([*turns, Message("assistant", (ending,))], encode)


def _tokenise(run: list[tuple[Role, str]], encode: Encode) -> list[Segment]:
    """Text segments of a run of (role, text), one for each stretch of equal role."""
    ids, offsets = encode("".join(text for _, text in run))
    ends, end = [], 0
    for _, text in run:
        end += len(text)
        ends.append(end)
    segments: list[Segment] = []
    stretch: list[int] = []
    role = Role.TEMPLATE
    piece = 0
    for token, (start, _) in zip(ids, offsets, strict=True):
        while start >= ends[piece]:
            piece += 1
        if run[piece][0] is not role and stretch:
            segments.append(Segment(Kind.TEXT, role, torch.tensor(stretch)))
            stretch = []
        role = run[piece][0]
        stretch.append(token)
    if stretch:
        segments.append(Segment(Kind.TEXT, role, torch.tensor(stretch)))
    return segments
