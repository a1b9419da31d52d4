"""The two experts: each owns every weight of its half of the tokens; attention is where they meet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openlance.config import BackboneConfig
from openlance.model.attention import Pattern, attention
from openlance.model.cache import KVCache, Workspace
from openlance.model.norm import RMSNorm
from openlance.model.rope import rotate

EXPERTS = ("und", "gen")


class ExpertLayer(nn.Module):
    """One expert's share of one layer: pre-norms, q/k/v/o, QK norms if wanted, and a SiLU-gated MLP."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        hidden, size, eps = config.hidden, config.head_dim, config.norm_eps
        self.head_dim = size
        self.attn_norm = RMSNorm(hidden, eps)
        self.q = nn.Linear(hidden, config.heads * size)
        self.k = nn.Linear(hidden, config.kv_heads * size)
        self.v = nn.Linear(hidden, config.kv_heads * size)
        self.q_norm = RMSNorm(size, eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(size, eps) if config.qk_norm else nn.Identity()
        self.o = nn.Linear(config.heads * size, hidden, bias=False)
        self.mlp_norm = RMSNorm(hidden, eps)
        self.gate = nn.Linear(hidden, config.mlp, bias=False)
        self.up = nn.Linear(hidden, config.mlp, bias=False)
        self.down = nn.Linear(config.mlp, hidden, bias=False)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [n, hidden] → q [n, heads, d], k and v [n, kv_heads, d], normed, not yet rotated."""
        x = self.attn_norm(x)
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.q, self.k, self.v))
        return self.q_norm(q), self.k_norm(k), v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual x [n, hidden] and attention output [n, heads, d] → the layer's output [n, hidden]."""
        x = x + self.o(attended.flatten(-2))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class DualLayer(nn.ModuleDict):
    """One layer of both experts over tokens sorted as [und | gen]."""

    def __init__(self, config: BackboneConfig, experts: tuple[str, ...]):
        super().__init__({name: ExpertLayer(config) for name in experts})

    def forward(
        self,
        halves: dict[str, Tensor],
        table: tuple[Tensor, Tensor],
        pattern: Pattern,
        cache: KVCache | Workspace | None,
        layer: int,
    ) -> dict[str, Tensor]:
        """halves: each present expert's tokens [n, hidden]; table: rotary (cos, sin) of all tokens."""
        experts: dict[str, ExpertLayer] = {name: self[name] for name in halves}  # type: ignore[misc]
        q, k, v = (
            parts[0] if len(parts) == 1 else torch.cat(parts)
            for parts in zip(*(experts[name].qkv(x) for name, x in halves.items()), strict=True)
        )
        q, k = rotate(q, table), rotate(k, table)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        attended = attention(q, k, v, pattern).split([len(x) for x in halves.values()])
        return {
            name: experts[name].finish(x, part)
            for (name, x), part in zip(halves.items(), attended, strict=True)
        }
