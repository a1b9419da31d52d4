"""Where to compute."""

from __future__ import annotations

import torch

from openlance.errors import InputError


def default_device() -> str:
    """CUDA, else MPS, else CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def pick_device(name: str | torch.device | None) -> torch.device:
    """The device of this name, or the best there is. Raises InputError where it is not there."""
    try:
        device = torch.device(default_device() if name is None else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise InputError(
            f"device {name} cannot be used here ({reason}): choose {default_device()} or cpu"
        ) from error
    return device
