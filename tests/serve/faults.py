"""A safety function that does to the worker what its prompt says; given to servers as faults:act."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch


def act(prompt: str | None, made: Any) -> str | None:
    if prompt == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if prompt == "hang":
        time.sleep(600)
    if prompt == "take all memory":
        torch.empty(10**15)
    if prompt is not None and "forbidden" in prompt:
        return "it is forbidden"
    if made is not None and made.size == (16, 16):
        return "it is too small"
    return None
