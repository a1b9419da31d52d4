"""The settings of training: of the stages that learn from data, and of those that learn from what the model
makes itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from openlance.errors import InputError

TRAINABLE = ("und", "gen", "vision")
SCHEDULES = ("constant", "cosine", "linear")
PRECISIONS = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class TrainConfig:
    """One run of the training loop, on any number of processes."""

    steps: int
    """Updates of the weights."""
    stage: str = "pre-training"
    """Which mixture of tasks is drawn: pre-training, continual training or fine-tuning."""
    lanes: int = 1
    """Packs of samples in one step, over all processes: one for each, or several whose gradients are added
    up."""
    tokens: int = 4096
    """Of one pack, at most; no sample is cut."""
    longest: int | None = None
    """Tokens of a sample; a longer one is left out and counted. Default: those of a pack."""
    learning_rate: float = 1e-4
    """The highest; it is reached after the warm-up."""
    schedule: str = "constant"
    """constant; cosine (to zero over all steps) or linear (to zero over the last ones)."""
    warmup: int = 0
    """Steps in which the learning rate rises."""
    decay: float = 0.3
    """Share of the steps in which a linear schedule falls."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    eps: float = 1e-15
    """Of AdamW."""
    optimizer: str = "adamw"
    """adamw, as in the paper; or muon for the matrices of the layers, with AdamW for the rest."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.9999
    """Decay of the averaged weights, which are what is measured and saved."""
    time_shift: float = 1.0
    """Of the times that are drawn: higher trains more near noise."""
    ce_weight: float = 0.25
    """Of the cross-entropy, a mean over all answer tokens of a step."""
    mse_weight: float = 1.0
    """Of the velocity error, a mean over all denoised tokens of a step."""
    drop_text: float = 0.1
    """Share of generating samples that lose the user's words, for guidance."""
    drop_all: float = 0.0
    """Share that lose what the user shows as well."""
    trains: tuple[str, ...] = ("und", "gen")
    """Parts that learn: und, gen, vision. (Never the VAE: the velocities are of its latents, which would
    move.)"""
    lora_rank: int = 0
    """Above 0, the parts learn by low-rank adapters of their linear layers instead."""
    lora_alpha: float = 32.0
    """Adapters are scaled by this over their rank."""
    lora_dropout: float = 0.0
    """Of what goes into adapters."""
    precision: str = "float32"
    """Of the computation, float32 or bfloat16; weights and their updates stay float32."""
    checkpointing: bool = False
    """Compute activations again in the backward pass: slower, in far less memory."""
    compile: bool = False
    """Layers through torch.compile."""
    replicas: int = 1
    """Copies of the model, each spread over its share of the processes (hybrid sharding)."""
    context: int = 1
    """Processes that share each pack, for samples too long for one device (context parallelism)."""
    save_every: int = 500
    """Steps after which the run is saved."""
    validate_every: int = 500
    """Steps after which it is measured; 0: never."""
    keep: int = 2
    """Saved states that are kept, beside the best."""
    seed: int = 0
    """Of data order, times, noise and new weights."""

    def __post_init__(self) -> None:
        for name in ("steps", "lanes", "tokens", "keep", "save_every", "replicas", "context"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name, known in (("schedule", SCHEDULES), ("precision", PRECISIONS), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        unknown = set(self.trains) - set(TRAINABLE)
        if unknown or not self.trains:
            raise InputError(
                f"trains takes {', '.join(TRAINABLE)}, not {', '.join(sorted(unknown)) or 'nothing'}"
            )
        for name in ("drop_text", "drop_all", "decay", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie in [0, 1], not {getattr(self, name)}")


ALGORITHMS = ("grpo", "nft", "words", "distill")
UNGUIDED = ("nft", "distill")


@dataclass(frozen=True)
class RLConfig(TrainConfig):
    """One run of reinforcement learning: at each step a lane makes a group of media of one prompt."""

    stage: str = "reinforcement learning"
    """A name for the log."""
    algorithm: str = "grpo"
    """grpo (stochastic steps and their densities), nft (DiffusionNFT: no trajectories, no guidance), words
    (GRPO of answers), or distill (no rewards: few steps without guidance, from many with it)."""
    group: int = 8
    """Pictures or clips of one prompt, which are compared with each other."""
    rollout_steps: int = 15
    """Denoising steps of what is made."""
    guidance: float | None = None
    """Of what is made, and of the policy that learns. Default: the checkpoint's."""
    window: int = 3
    """grpo: steps that are stochastic and learnt from; nft: times at which each picture is learnt from."""
    window_within: float = 0.5
    """grpo: the window lies anywhere in this first share of the steps, drawn anew each time."""
    noise: float = 0.7
    """grpo: a of the noise level a · √(t / (1 − t)) in the window."""
    ratio_range: float = 1e-5
    """grpo and words: how far the ratio of densities may leave 1 before it is clipped."""
    kl: float = 0.0
    """Weight of the divergence from the weights that the run began with; 0: none is computed."""
    strength: float = 1.0
    """nft: how far the two implied policies lie from the one that drew (β)."""
    max_words: int = 64
    """words: tokens of an answer, at most."""
    temperature: float = 1.0
    """words: of what is drawn."""
    updates: int = 1
    """Of the weights, from each rollout."""
    teacher_steps: int = 20
    """distill: of the teacher, a multiple of rollout_steps, which are the student's."""
    teacher_guidance: float | None = None
    """distill: of the teacher. Default: the checkpoint's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rollout_steps", "window", "max_words", "updates", "teacher_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.group < 2:
            raise InputError(f"group must be at least 2, or there is nothing to compare, not {self.group}")
        if self.algorithm not in ALGORITHMS:
            raise InputError(f"algorithm must be one of {', '.join(ALGORITHMS)}, not {self.algorithm!r}")
        for name in ("noise", "ratio_range", "strength", "temperature"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"{name} must be above 0, not {getattr(self, name)}")
        if not (math.isfinite(self.kl) and self.kl >= 0):
            raise InputError(f"kl must be 0 or more, not {self.kl}")
        if not 0 < self.window_within <= 1:
            raise InputError(f"window_within must lie in (0, 1], not {self.window_within}")
        if self.context != 1:
            raise InputError(f"context must be 1 in reinforcement learning, not {self.context}")
        if self.lora_dropout:
            raise InputError("lora_dropout must be 0: dropout would change the densities between two looks")
        self._check_algorithm()

    def _check_algorithm(self) -> None:
        if self.algorithm in UNGUIDED:
            if self.guidance != 1:
                raise InputError(f"{self.algorithm} learns without guidance: set guidance to 1")
            if self.algorithm == "distill" and self.kl:
                raise InputError("distill learns from the first weights themselves: set kl to 0")
            if self.algorithm == "distill" and self.teacher_steps % self.rollout_steps:
                raise InputError(
                    f"teacher_steps must be a multiple of rollout_steps ({self.rollout_steps}), not "
                    f"{self.teacher_steps}"
                )
        elif self.algorithm == "words":
            if "und" not in self.trains:
                raise InputError("words are the und expert's: have it in trains")
        elif self.window > self.window_steps:
            raise InputError(
                f"a window of {self.window} steps does not fit into the first {self.window_steps} of "
                f"{self.rollout_steps} (window_within {self.window_within})"
            )

    @property
    def window_steps(self) -> int:
        """The first steps, where the window may lie; never the last, which leads to the picture itself."""
        return min(math.ceil(self.window_within * self.rollout_steps), self.rollout_steps - 1)
