"""VLMEvalKit's own run.py, with Lance in its table of models."""

from __future__ import annotations

import os
import runpy
import sys
from functools import partial
from pathlib import Path


def add_lance() -> None:
    """Lance among `supported_VLM`, as the environment says which."""
    from lance_model import Lance
    from vlmeval.config import supported_VLM

    model, variant = os.environ.get("OPENLANCE_MODEL", "nano"), os.environ.get("OPENLANCE_VARIANT")
    supported_VLM["Lance"] = partial(Lance, model=model, variant=variant)


if __name__ == "__main__":
    script = Path(os.environ.get("VLMEVALKIT", "VLMEvalKit")) / "run.py"
    if not script.is_file():
        sys.exit(f"{script}: no such file: set VLMEVALKIT to a clone of VLMEvalKit")
    add_lance()
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")
