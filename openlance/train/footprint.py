"""Bytes that training needs on one device, from shapes alone.

Weights, their updates and their average are float32, the computation is bfloat16, attention is of the flash
kind (it keeps no scores), and the network is spread as `openlance.train.parallel.spread` does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from openlance.config import BackboneConfig, ModelConfig
from openlance.errors import InputError
from openlance.model.experts import EXPERTS

MASTER, COMPUTE = 4, 2  # bytes of a value: float32, bfloat16
LOGIT = 12  # bytes: log-probability and two gradients, float32
STAGE = 11  # feature maps of the VAE's first stage alive at once, measured on the released shapes


@dataclass(frozen=True)
class Job:
    """What is trained, on what.

    parts: parameters by part, as `openlance.model.checkpoint.count_parameters` gives them.
    tokens: of one rank and step; longest: of one sample; sample: of a usual one, which sets attention's cost.
    gen_share: of the tokens, those of the gen expert; the rest is what the vision tower sees, but for
    `answers`, the tokens of a rank and step that carry cross-entropy.
    lora_rank: above 0, adapters of `trains` learn instead. encoded: latents and ViT features are computed
    beforehand, so neither encoder is on the device.
    Raises InputError for what cannot be.
    """

    config: ModelConfig
    parts: Mapping[str, int]
    tokens: int
    longest: int
    sample: int
    gen_share: float = 0.8
    answers: int = 1024
    trains: tuple[str, ...] = EXPERTS
    lora_rank: int = 0
    ema: bool = True
    encoded: bool = False

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("longest", 1), ("sample", 1), ("answers", 0), ("lora_rank", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not 0 <= self.gen_share <= 1:
            raise InputError(f"gen_share must lie in [0, 1], not {self.gen_share}")
        if not self.trains or set(self.trains) - set(EXPERTS):
            raise InputError(
                f"trains takes {' and '.join(EXPERTS)}, not {', '.join(self.trains) or 'nothing'}"
            )

    @property
    def on_device(self) -> dict[str, int]:
        """Parameters by part, without encoders where the data is encoded."""
        return {part: size for part, size in self.parts.items() if part in EXPERTS or not self.encoded}

    @property
    def learns(self) -> dict[str, int]:
        """How many values learn: of each trained part, or of its adapters."""
        if not self.lora_rank:
            return {part: self.parts[part] for part in self.trains}
        return dict.fromkeys(self.trains, lora_parameters(self.config.backbone, self.lora_rank))


@dataclass(frozen=True)
class Layout:
    """How a job lies on its devices.

    shards: devices that hold one copy of the states together; replicas: copies. context: devices that share
    every sample. recompute: whether layers run again in the backward pass (activation checkpointing).
    """

    shards: int
    replicas: int = 1
    context: int = 1
    recompute: bool = False

    def tokens(self, job: Job) -> int:
        """Of one device: the budget, or more where its share of the longest sample is more."""
        return max(job.tokens, -(-job.longest // self.context))


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    gathered: weights and gradients of layers in use, whole. encoder: weights of the VAE. encoding: what the
    encoders work with; they are done before activations arise, so the larger of the two counts.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    gathered: int
    activations: int
    logits: int
    encoder: int
    encoding: int

    @property
    def total(self) -> int:
        states = self.weights + self.gradients + self.optimizer + self.ema + self.gathered + self.encoder
        return states + max(self.activations + self.logits, self.encoding)


def memory(job: Job, layout: Layout) -> Memory:
    """Of one device, at the moment of the step that needs most.

    States as in ZeRO (arXiv 1910.02054): 4 bytes each for a weight, its gradient and its average, 8 for
    AdamW's two moments, over the shards. What does not learn has its weight alone.
    """
    learning = sum(job.learns.values())
    held = sum(size for part, size in job.on_device.items() if part != "vae")
    if job.lora_rank:
        held += learning  # adapters are no part of a part
    tokens = layout.tokens(job)
    whole = tokens * layout.context  # heads and vision tower run on the whole group's tokens
    return Memory(
        weights=_share(MASTER * held, layout),
        gradients=_share(MASTER * learning, layout),
        optimizer=_share(2 * MASTER * learning, layout),
        ema=_share(MASTER * learning, layout) if job.ema else 0,
        gathered=_gathered(job),
        activations=_of_step(job, layout, tokens),
        logits=LOGIT * job.config.backbone.vocab * min(job.answers * layout.context, whole),
        encoder=COMPUTE * job.on_device.get("vae", 0),
        encoding=0
        if job.encoded
        else max(vae_encode_bytes(job.config), vision_bytes(job, tokens * layout.context)),
    )


def lora_parameters(body: BackboneConfig, rank: int) -> int:
    """Of one expert: two matrices for each of q, k, v, o, gate, up and down (arXiv 2106.09685)."""
    kv = body.kv_heads * body.head_dim
    return body.layers * rank * (9 * body.hidden + 2 * kv + 3 * body.mlp)


def _share(size: int, layout: Layout) -> int:
    return -(-size // layout.shards)


def _gathered(job: Job) -> int:
    """FSDP2's whole weights: two layers (one ahead) and, all step long, what is in no layer; their gradients,
    with a float32 copy of a layer's on its way to the shards."""
    body = job.config.backbone
    outside = 2 * body.hidden * body.vocab  # embedding and head; the latents' ends are small
    layer = (job.parts["und"] + job.parts["gen"] - outside) // body.layers
    outside_learning = outside if "und" in job.trains and not job.lora_rank else 0
    weights = COMPUTE * (2 * layer + outside + job.on_device.get("vision", 0))
    gradients = (COMPUTE + MASTER) * (sum(job.learns.values()) - outside_learning) // body.layers
    return weights + gradients + COMPUTE * outside_learning


def _of_step(job: Job, layout: Layout, tokens: int) -> int:
    """All activations of a step, and in the layer whose turn it is, the gradients on their way through it."""
    body = job.config.backbone
    gen = round(tokens * job.gen_share)
    kept = activations(
        job.config, tokens - gen, gen, trains=job.trains, lora_rank=job.lora_rank, recompute=layout.recompute
    )
    passing = COMPUTE * tokens * (2 * body.hidden + 3 * body.mlp)
    foreign = (layout.context - 1) * tokens  # keys and values that the other devices of the group lend
    return kept + passing + COMPUTE * 2 * foreign * body.kv_heads * body.head_dim


def activations(
    config: ModelConfig,
    und: int,
    gen: int,
    *,
    trains: tuple[str, ...] = EXPERTS,
    lora_rank: int = 0,
    recompute: bool = False,
    width: int = COMPUTE,
) -> int:
    """Bytes kept for the backward pass of the network, at its fullest.

    The counting of "Reducing Activation Recomputation in Large Transformer Models" (Korthikanti et al., arXiv
    2205.05198, section 4.1) for this layer: no dropout, gated MLP, shared keys and values, flash attention. A
    layer keeps its inputs alone where it runs again later, and then all of one layer is there at a time.
    width: bytes of a value.
    """
    body = config.backbone
    tokens = und + gen
    layer = sum(
        count * layer_activations(body, learns=name in trains, lora_rank=lora_rank, width=width)
        for name, count in (("und", und), ("gen", gen))
    )
    layers = layer + width * tokens * body.hidden * (body.layers - 1) if recompute else layer * body.layers
    # Outside the layers: the last output, its norm, what the heads read and one gradient; the rotary table;
    # in float32, latents, noise, their mix, the velocity, its target and the error.
    ends = width * tokens * (4 * body.hidden + 2 * body.head_dim)
    return layers + ends + 4 * 6 * gen * config.vae.channels


def layer_activations(
    body: BackboneConfig, *, learns: bool = True, lora_rank: int = 0, width: int = COMPUTE
) -> int:
    """Bytes that one token leaves in one layer.

    Inputs of both norms, of the q and k norms, of attention (q, k, v, its result), and of the MLP's gating;
    where the matrices learn also what they read: the normed tokens, and the gated values.
    """
    hidden, kv, mlp = body.hidden, body.kv_heads * body.head_dim, body.mlp
    values = 5 * hidden + 3 * kv + 3 * mlp
    if learns:
        values += 2 * hidden + mlp + 7 * lora_rank
    statistics = 2 + 2 * body.heads + body.kv_heads  # of norms and attention, float32
    return width * values + 4 * statistics


def vision_bytes(job: Job, tokens: int) -> int:
    """The vision tower's working memory, all of a pack at once: pixels, the residual, its norm, and the wider
    of q, k, v with their turned copies, and the MLP."""
    vision = job.config.vision
    patches = round(tokens * (1 - job.gen_share)) * vision.merge**2
    values = 3 * vision.temporal_patch * vision.patch**2
    return COMPUTE * patches * (values + 2 * vision.hidden + max(6 * vision.hidden, 3 * vision.mlp))


def vae_encode_bytes(config: ModelConfig, width: int = COMPUTE) -> int:
    """The VAE encoder's working memory for a clip of the model's default size, latent frame by latent frame.

    At the first stage, before anything is made smaller: `STAGE` feature maps (residuals, padded copies,
    frames that convolutions keep for the next), and the clip, whole and cut into patches.
    """
    vae, sizes = config.vae, config.sizes
    side = sizes.video // vae.spatial_stride * vae.spatial_stride
    frames = min(vae.temporal_stride, sizes.frames)
    return width * (STAGE * vae.base * frames * (side // 2) ** 2 + 2 * 3 * sizes.frames * side**2)
