"""Configuration as plain frozen dataclasses. Presets are small differences from a base.

Nothing here knows of tensors. `openlance.model.checkpoint` reads these from a released folder.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from openlance.errors import InputError

# Fixed per-channel statistics of the Wan2.2 latent space, published with that VAE.
WAN22_LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
WAN22_LATENT_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


@dataclass(frozen=True)
class BackboneConfig:
    """Shapes of each of the two experts, and of the vocabulary."""

    hidden: int = 2048
    layers: int = 36
    heads: int = 16
    kv_heads: int = 2
    mlp: int = 11008
    vocab: int = 151936
    norm_eps: float = 1e-6
    rope_base: float = 1e6
    rope_sections: tuple[int, int, int] = (16, 24, 24)  # rotary pairs for time, height, width
    qk_norm: bool = True  # Lance normalises queries and keys of each head; Qwen2.5-VL does not

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise InputError(
                f"hidden {self.hidden}, heads {self.heads}, kv_heads {self.kv_heads}: "
                "each must divide the one before"
            )
        if 2 * sum(self.rope_sections) != self.head_dim:
            raise InputError(
                f"rope_sections {self.rope_sections} must add up to half the head size {self.head_dim}"
            )


@dataclass(frozen=True)
class VisionConfig:
    """The Qwen2.5-VL vision tower (ViT)."""

    depth: int = 32
    hidden: int = 1280
    heads: int = 16
    mlp: int = 3420
    out_hidden: int = 2048
    patch: int = 14
    temporal_patch: int = 2
    merge: int = 2
    window: int = 112
    full_attention_layers: tuple[int, ...] = (7, 15, 23, 31)


@dataclass(frozen=True)
class VAEConfig:
    """The Wan2.2 causal 3D VAE: 16 times smaller in space, 4 times in time."""

    channels: int = 48
    base: int = 160
    decoder_base: int = 256
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    residual_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    mean: tuple[float, ...] = WAN22_LATENT_MEAN
    std: tuple[float, ...] = WAN22_LATENT_STD
    spatial_stride: int = 16
    temporal_stride: int = 4


@dataclass(frozen=True)
class MaPEConfig:
    """Where each group of visual tokens starts on the temporal axis (modality-aware rotary encoding).

    `shift_understanding` says whether ViT tokens are moved in a sequence that generates nothing: the
    released code moves them in training and not at inference, so it belongs to the checkpoint.
    """

    vit: int = 1000
    reference: int = 2000
    shift_understanding: bool = False


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that the sequence needs; read from the tokenizer by their contents."""

    im_start: int = 151644
    im_end: int = 151645
    vision_start: int = 151652
    vision_end: int = 151653
    video_pad: int = 151656
    endoftext: int = 151643


SolverName = Literal["euler", "ab2", "dpm++2m", "unipc"]
SOLVERS: tuple[str, ...] = get_args(SolverName)
ReuseOrder = Literal[0, 1]
REUSE_ORDERS: tuple[int, ...] = get_args(ReuseOrder)


@dataclass(frozen=True)
class SamplingConfig:
    """How pictures and clips are denoised; the defaults are the released ones.

    steps: network evaluations of the conditional branch; the grid has `steps` intervals.
    solver: "euler", as released; or "ab2", "dpm++2m" or "unipc", of second order, for fewer steps.
    shift: time shift s, t <- s t / (1 + (s - 1) t).
    guidance: scale g of v = v_uncond + g (v_cond - v_uncond); 1 turns guidance off.
    guidance_interval: guidance acts while low < t <= high, on shifted times.
    renorm: "global", "channel" or "none"; renorm_min: its smallest factor.
    visual_guidance: second scale, for the visual condition of edits and subjects; None is off.
    sample_posterior: draw the latents of conditions from the VAE's posterior, as the released code does,
        instead of taking its mean.
    released_cached_sampler: do as the released cached sampler does, for comparison only: the
        unconditional context keeps the conditional one's positions (which training never saw), and
        global renormalisation counts the fixed frames of image-to-video.
    reuse: where the first layer's work changed by less than this share since the last whole evaluation, take
        the other layers' from there; 0 is off, and exact.
    reuse_order: 0 takes it as it was; 1 leads it on in time, along the last two whole evaluations.
    """

    steps: int = 30
    solver: str = "euler"
    shift: float = 3.5
    guidance: float = 4.0
    guidance_interval: tuple[float, float] = (0.4, 1.0)
    renorm: str = "global"
    renorm_min: float = 0.0
    visual_guidance: float | None = None
    sample_posterior: bool = False
    released_cached_sampler: bool = False
    reuse: float = 0.0
    reuse_order: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps must be at least 1, not {self.steps}")
        if self.solver not in SOLVERS:
            raise InputError(f"solver must be one of {', '.join(SOLVERS)}, not {self.solver!r}")
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise InputError(f"shift must be a positive number, not {self.shift}")
        if not math.isfinite(self.guidance):
            raise InputError(f"guidance must be a finite number, not {self.guidance}")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise InputError(f"guidance_interval must be 0 <= low <= high <= 1, not {self.guidance_interval}")
        if self.renorm not in ("global", "channel", "none"):
            raise InputError(f"renorm must be global, channel or none, not {self.renorm!r}")
        if not 0 <= self.renorm_min <= 1:
            raise InputError(f"renorm_min must lie in [0, 1], not {self.renorm_min}")
        if not (math.isfinite(self.reuse) and self.reuse >= 0):
            raise InputError(f"reuse must be 0 (off) or more, not {self.reuse}")
        if self.reuse_order not in REUSE_ORDERS:
            raise InputError(f"reuse_order must be 0 or 1, not {self.reuse_order}")


@dataclass(frozen=True)
class TextConfig:
    """How words are drawn. temperature 0 is greedy; the rest then has no effect but the penalty.

    lookup: above 0, up to so many words are guessed from what was said before and checked in one forward; the
        words are the same, and come faster where the answer repeats things.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    lookup: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InputError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must lie in (0, 1], not {self.top_p}")
        if self.top_k < 0:
            raise InputError(f"top_k must be 0 (off) or more, not {self.top_k}")
        if self.lookup < 0:
            raise InputError(f"lookup must be 0 (off) or more, not {self.lookup}")
        if not self.repetition_penalty > 0:
            raise InputError(f"repetition_penalty must be above 0, not {self.repetition_penalty}")


@dataclass(frozen=True)
class Sizes:
    """Default sizes of a checkpoint: bucket resolutions in pixels, frames, frames a second."""

    image: int = 768
    video: int = 480
    vit_image: int = 672
    vit_video: int = 448
    frames: int = 50
    fps: float = 12.0
    max_seconds: float = 6.0


@dataclass(frozen=True)
class ModelConfig:
    """Everything that a checkpoint fixes, weights aside."""

    name: str = "lance_3b"
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    mape: MaPEConfig = field(default_factory=MaPEConfig)
    tokens: SpecialTokens = field(default_factory=SpecialTokens)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    sizes: Sizes = field(default_factory=Sizes)
    system_prompts: dict[str, str] = field(default_factory=dict)  # by task, over the released ones
    max_latent_side: int = 64  # rows and columns of the latent position table
    max_frames: int = 121

    @property
    def max_latent_frames(self) -> int:
        return (self.max_frames - 1) // self.vae.temporal_stride + 1


def lance_3b() -> ModelConfig:
    """The released 3B-active model."""
    return ModelConfig()


def nano() -> ModelConfig:
    """The bundled model: trained by this project on its own world of shapes, on CPU."""
    base = lance_3b()
    return replace(
        base,
        name="nano",
        backbone=replace(
            base.backbone,
            hidden=256, layers=6, heads=4, kv_heads=2, mlp=512, vocab=512, rope_sections=(8, 12, 12),
        ),
        vision=replace(
            base.vision,
            depth=4, hidden=128, heads=4, mlp=352, out_hidden=256, window=112, full_attention_layers=(1, 3),
        ),
        vae=replace(base.vae, base=16, decoder_base=16, residual_blocks=1, mean=(0.0,) * 48, std=(1.0,) * 48),
        mape=replace(base.mape, shift_understanding=True),
        sampling=replace(base.sampling, steps=20, shift=3.0, guidance=2.5),
        sizes=Sizes(
            image=96, video=96, vit_image=112, vit_video=112, frames=9, fps=8.0, max_seconds=2.0
        ),
        max_latent_side=16,
        max_frames=33,
    )  # fmt: skip


PRESETS = {"lance_3b": lance_3b, "nano": nano}


def preset(name: str) -> ModelConfig:
    """A named preset. Raises InputError for an unknown name."""
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]()


def to_dict(config: object) -> dict:
    """A configuration as plain dictionaries, for JSON."""
    return dataclasses.asdict(config)  # type: ignore[call-overload]
