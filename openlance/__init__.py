"""Run, train and measure Lance: one model that understands, generates and edits images and videos.

    from openlance import LancePipeline

    lance = LancePipeline.from_pretrained("nano")
    lance.generate_image("a large red circle on white", seed=1).save("circle.png")
    print(lance.ask("what color is the circle?", "circle.png"))

Importing this is light: what needs torch is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from openlance.errors import InputError

if TYPE_CHECKING:
    from openlance.data.frames import Video
    from openlance.infer.aio import AsyncLance, AsyncText
    from openlance.infer.conversation import Conversation
    from openlance.infer.generate import Cancelled, Step
    from openlance.infer.orders import TextOptions
    from openlance.infer.pipeline import LancePipeline, Options
    from openlance.infer.result import Answer, Generated
    from openlance.infer.turn import Turn
    from openlance.sequence.template import Task

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "AsyncLance",
    "AsyncText",
    "Cancelled",
    "Conversation",
    "Generated",
    "InputError",
    "LancePipeline",
    "Options",
    "Step",
    "Task",
    "TextOptions",
    "Turn",
    "Video",
    "__version__",
]

_HOMES = {
    "Answer": "openlance.infer.result",
    "AsyncLance": "openlance.infer.aio",
    "AsyncText": "openlance.infer.aio",
    "Cancelled": "openlance.infer.generate",
    "Conversation": "openlance.infer.conversation",
    "Generated": "openlance.infer.result",
    "LancePipeline": "openlance.infer.pipeline",
    "Options": "openlance.infer.pipeline",
    "Step": "openlance.infer.generate",
    "Task": "openlance.sequence.template",
    "TextOptions": "openlance.infer.orders",
    "Turn": "openlance.infer.turn",
    "Video": "openlance.data.frames",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
