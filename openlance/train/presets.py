"""The training stages as presets, each a small difference from the one before.

The numbers of `pt`, `ct` and `sft` are the paper's (arXiv 2605.18678). Tokens are of one process and step
there: on N processes, train with N lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from openlance.errors import InputError
from openlance.train.settings import RLConfig, TrainConfig


def pre_training() -> TrainConfig:
    """Pictures, clips and words from a Qwen2.5-VL: 1.5T tokens."""
    return TrainConfig(
        steps=350_000, stage="pre-training", tokens=50_000, longest=40_000, learning_rate=1e-4, warmup=2_500,
        time_shift=1.0, ce_weight=0.25, drop_text=0.10, drop_all=0.0,
        precision="bfloat16", checkpointing=True, save_every=1_000, validate_every=2_500,
    )  # fmt: skip


def continual_training() -> TrainConfig:
    """Editing, subjects and animation join in, step by step: 300B tokens."""
    return replace(
        pre_training(),
        steps=80_000, stage="continual training", tokens=80_000, longest=70_000,
        time_shift=4.0, ce_weight=0.5, drop_text=0.05, drop_all=0.05,
    )  # fmt: skip


def supervised_fine_tuning() -> TrainConfig:
    """Chosen data, a falling rate: 72B tokens."""
    return replace(
        continual_training(),
        steps=15_000, stage="fine-tuning", learning_rate=2.5e-5, schedule="cosine", warmup=500,
        ce_weight=0.25,
    )  # fmt: skip


def fine_tuning_lora() -> TrainConfig:
    """Fine-tuning on one consumer GPU: adapters of the generation expert, packs of one or two pictures."""
    return replace(
        supervised_fine_tuning(),
        steps=2_000, tokens=8_192, longest=8_192, learning_rate=1e-4, warmup=100, trains=("gen",),
        lora_rank=16, ema=0.999, save_every=250, validate_every=250,
    )  # fmt: skip


def nano_pre_training() -> TrainConfig:
    """The bundled model on two CPU cores: pictures and words of the world. In bfloat16, and the layers'
    matrices by Muon."""
    return TrainConfig(
        steps=1_800, stage="pre-training", lanes=2, tokens=4_200, optimizer="muon", precision="bfloat16",
        learning_rate=2e-3, warmup=100, ema=0.998, time_shift=3.0, drop_text=0.10,
        save_every=100, validate_every=200,
    )  # fmt: skip


def nano_continual_training() -> TrainConfig:
    """All tasks."""
    return replace(
        nano_pre_training(), steps=2_700, stage="continual training", warmup=50, drop_text=0.05, drop_all=0.05
    )


def nano_fine_tuning() -> TrainConfig:
    """All tasks, with a rate that falls to zero; the seed is for other draws than before."""
    return replace(
        nano_continual_training(), steps=1_600, stage="fine-tuning", schedule="linear", decay=1.0, seed=1
    )


def reinforcement() -> RLConfig:
    """GRPO of the generation expert, with the paper's rate, length and time shift; the setting of group and
    window is the one of FlowGRPO on BAGEL."""
    return RLConfig(
        steps=800, lanes=8, tokens=80_000, learning_rate=2e-6, warmup=50, time_shift=4.0, trains=("gen",),
        group=16, rollout_steps=15, window=3, noise=1.3, ratio_range=1e-5, ema=0.99,
        precision="bfloat16", checkpointing=True, save_every=50, validate_every=50,
    )  # fmt: skip


def nano_reinforcement() -> RLConfig:
    """The bundled model, rewarded by the judge of its world. By DiffusionNFT, whose step takes half as long
    as GRPO's on CPU: it learns without guidance."""
    return replace(
        reinforcement(),
        algorithm="nft", guidance=1.0,
        steps=200, lanes=4, tokens=4_096, learning_rate=1e-4, warmup=10, time_shift=3.0, group=8,
        rollout_steps=10, ema=0.9, precision="float32", checkpointing=False, save_every=10, validate_every=20,
    )  # fmt: skip


def distillation() -> RLConfig:
    """The generation expert in eight steps without guidance, from itself in forty with it."""
    return RLConfig(
        steps=2_000, stage="distillation", algorithm="distill", lanes=8, tokens=80_000, learning_rate=1e-5,
        warmup=50, schedule="cosine", time_shift=4.0, trains=("gen",), group=4, rollout_steps=8, guidance=1.0,
        teacher_steps=40, ema=0.99, precision="bfloat16", checkpointing=True, save_every=50,
        validate_every=100,
    )  # fmt: skip


def nano_distillation() -> RLConfig:
    """The bundled model in five steps without guidance, as an adapter: this made nano-fast."""
    return replace(
        distillation(),
        steps=160, lanes=3, tokens=1_024, learning_rate=1e-3, warmup=10, time_shift=3.0, group=4,
        rollout_steps=5, teacher_steps=10, ema=0.95, lora_rank=32, lora_alpha=64.0, precision="float32",
        checkpointing=False, save_every=10, validate_every=50,
    )  # fmt: skip


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "pt": pre_training,
    "ct": continual_training,
    "sft": supervised_fine_tuning,
    "lora": fine_tuning_lora,
    "rl": reinforcement,
    "distill": distillation,
    "nano-pt": nano_pre_training,
    "nano-ct": nano_continual_training,
    "nano-sft": nano_fine_tuning,
    "nano-rl": nano_reinforcement,
    "nano-distill": nano_distillation,
}


def preset(name: str) -> TrainConfig:
    """A stage by name. Raises InputError for an unknown one."""
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]()
