"""Floating point operations of a training step, and what GPUs can do; the rules of the count are those of
`openlance.model.flops`."""

from __future__ import annotations

import re
from collections.abc import Collection

from openlance.config import ModelConfig
from openlance.model.embed import TIME_FEATURES
from openlance.model.experts import EXPERTS
from openlance.model.flops import Work, attention_flops, forward_flops, layers_flops, linear_flops


def backward_flops(config: ModelConfig, work: Work, trains: Collection[str] = EXPERTS) -> int:
    """Of the pass back: each product once for its input and, where its expert trains, once for its weight.

    Embedded times and latents need no gradient, so the two products that read them have one less.
    """
    total = 2 * attention_flops(config, work)
    for name, linear in (
        ("und", linear_flops(config, work.und, 0, work.answers)),
        ("gen", linear_flops(config, 0, work.gen, 0)),
    ):
        total += linear * (2 if name in trains else 1)
    return total - 2 * work.gen * config.backbone.hidden * (config.vae.channels + TIME_FEATURES)


def flops_per_step(
    config: ModelConfig, work: Work, *, trains: Collection[str] = EXPERTS, recompute: bool = False
) -> int:
    """Forward and backward of a step's work.

    recompute: count the layers' forward twice, as activation checkpointing runs it. Utilisation in the
    sense of PaLM (MFU) leaves it out; the utilisation of the hardware (HFU) has it in.
    """
    total = forward_flops(config, work) + backward_flops(config, work, trains)
    return total + (layers_flops(config, work) if recompute else 0)


# Words of a device's name -> dense bfloat16 operations a second, in 10^12, accumulated in float32; from the
# makers' data sheets (a GPU sold with "sparse" figures has half of them). The first row that fits counts.
PEAKS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("GH200", 989.4),
    ("H100 PCIE", 756.5),
    ("H100 NVL", 835.5),
    ("H100", 989.4),  # SXM
    ("A100", 312.0),
    ("L40S", 362.1),
    ("L4", 121.0),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)
OTHERS = {"LAPTOP", "D", "TI"}  # the same number, another chip or clock


def device_peak_flops(name: str, dtype: str = "bfloat16") -> float | None:
    """Dense operations a second of a GPU, by the name that `torch.cuda.get_device_name` gives, or part of it.

    dtype: bfloat16 or float16, for which these GPUs have the same figure. None for another dtype or GPU.
    """
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    if dtype.removeprefix("torch.") not in ("bfloat16", "float16") or words & OTHERS:
        return None
    return next((peak * 1e12 for key, peak in PEAKS if set(key.split()) <= words), None)
