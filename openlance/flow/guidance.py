"""Classifier-free guidance with renormalisation, on velocities."""

from __future__ import annotations

from torch import Tensor

from openlance.config import SamplingConfig


def guided_now(config: SamplingConfig, t: float) -> bool:
    """Whether guidance acts at (shifted) time t: low < t <= high."""
    low, high = config.guidance_interval
    acts = config.guidance != 1.0 or config.visual_guidance is not None
    return acts and low < t <= high


def guide(
    cond: Tensor, uncond: Tensor, config: SamplingConfig, visual_uncond: Tensor | None = None
) -> Tensor:
    """Guided velocity from the branches, all [n, C] over the denoised tokens.

    One scale: u + g (c - u). With `visual_guidance` w and `visual_uncond` (neither words nor visual
    condition): vu + w (u - vu) + g (c - u), so that g pulls towards the words and w towards the
    reference (the two-scale form of InstructPix2Pix, arXiv 2211.09800). Then renormalised.
    """
    velocity = uncond + config.guidance * (cond - uncond)
    if visual_uncond is not None:
        assert config.visual_guidance is not None
        velocity = velocity + (config.visual_guidance - 1) * (uncond - visual_uncond)
    return _renormalise(velocity, cond, config)


def _renormalise(velocity: Tensor, cond: Tensor, config: SamplingConfig) -> Tensor:
    """Scale back to the conditional norm: over all tokens ("global") or each token ("channel")."""
    if config.renorm == "none":
        return velocity
    if config.renorm == "global":
        ratio = cond.norm() / (velocity.norm() + 1e-8)
    else:
        ratio = cond.norm(dim=-1, keepdim=True) / (velocity.norm(dim=-1, keepdim=True) + 1e-8)
    return velocity * ratio.clamp(config.renorm_min, 1.0)
