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
    from openlance.infer.pipeline import LancePipeline
    from openlance.sequence.template import Task

__version__ = "0.1.0"
__all__ = ["InputError", "LancePipeline", "Task", "__version__"]

_HOMES = {"LancePipeline": "openlance.infer.pipeline", "Task": "openlance.sequence.template"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
