"""The Qwen2.5-VL vision tower (ViT): patches of pictures and clips to features for the backbone.

The network is transformers' `Qwen2_5_VisionTransformerPretrainedModel`; its parameter names are the released
ones of `vit.safetensors` (in `model.safetensors` they carry the prefix `vit_model.`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLVisionRotaryEmbedding,
)

from openlance.config import VisionConfig
from openlance.errors import InputError

PATCHES_AT_ONCE = 8192
"""Of a long clip. Attention never leaves a pair of frames, so runs of them give what the whole gives."""


class Vision(nn.Module):
    """The vision tower. It can be built under `torch.device("meta")` and given its weights later."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        settings = Qwen2_5_VLVisionConfig(
            depth=config.depth,
            hidden_size=config.hidden,
            hidden_act="silu",
            intermediate_size=config.mlp,
            num_heads=config.heads,
            in_channels=3,
            patch_size=config.patch,
            spatial_merge_size=config.merge,
            temporal_patch_size=config.temporal_patch,
            window_size=config.window,
            out_hidden_size=config.out_hidden,
            fullatt_block_indexes=list(config.full_attention_layers),
            attn_implementation="sdpa",
        )
        self.tower = Qwen2_5_VisionTransformerPretrainedModel(settings)
        with torch.device("cpu"):
            self.tower.rotary_pos_emb = Rotary(settings)

    def forward(self, patches: Tensor, grid: Tensor) -> Tensor:
        """patches [N, 3 * 2 * 14 * 14], grid [n, 3] of (t, h, w) in patches -> features [N / 4, out_hidden].

        The patches of the n pictures or clips follow each other, each in the order in which 2 by 2 patches
        are merged. Raises InputError where the grids do not add up to N.
        """
        wanted = int(grid.prod(dim=1).sum())
        if wanted != patches.shape[0]:
            raise InputError(f"{patches.shape[0]} patches, but the grids {grid.tolist()} hold {wanted}")
        if wanted <= PATCHES_AT_ONCE:
            return self.tower(patches, grid).pooler_output
        runs = torch.tensor([run for clip in grid.tolist() for run in _runs(*clip)], device=grid.device)
        parts = patches.split(runs.prod(dim=1).tolist())
        return torch.cat(
            [self.tower(part, run).pooler_output for part, run in zip(parts, runs.split(1), strict=True)]
        )


def _runs(frames: int, rows: int, columns: int) -> list[list[int]]:
    """The grid of a clip, (t, h, w) in patches, as grids of runs of its frames."""
    most = max(1, PATCHES_AT_ONCE // (rows * columns))
    return [[min(most, frames - start), rows, columns] for start in range(0, frames, most)]


class Rotary(Qwen2_5_VLVisionRotaryEmbedding):
    """The tower's rotary frequencies, which stay float32 and are right after any move of the module.

    They are computed, not loaded: `to_empty` would leave them undefined and `to(bfloat16)` would round them.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        super()._apply(fn, recurse)
        device = self.get_buffer("inv_freq").device
        frequencies, _ = self.compute_axial_rope_parameters(self.config, device=device)
        self.inv_freq = frequencies
        self.original_inv_freq = frequencies.clone()
        return self


def released_names(config: VisionConfig) -> dict[str, str]:
    """Every name of `vit.safetensors` -> its name in `Vision(config).state_dict()`; one to one."""
    with torch.device("meta"):
        names = list(Vision(config).state_dict())
    return {name.removeprefix("tower."): name for name in names}
