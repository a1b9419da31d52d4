"""The network: one forward for understanding, generation and editing, training and inference."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openlance.config import ModelConfig
from openlance.model.attention import Pattern, Rows, Shared
from openlance.model.cache import KVCache, Workspace
from openlance.model.context_parallel import Share
from openlance.model.embed import TimeEmbed, place_features
from openlance.model.experts import EXPERTS, DualLayer
from openlance.model.norm import RMSNorm
from openlance.model.rope import rotary_table
from openlance.model.vision import Vision
from openlance.sequence.pack import PackedBatch

PARTS = frozenset({"und", "gen", "vision"})


@dataclass(frozen=True, eq=False)
class Output:
    """hidden: und tokens after the final norm [und, hidden]; velocity: of every gen token [g, channels]."""

    hidden: Tensor
    velocity: Tensor


@dataclass(frozen=True, eq=False)
class Prepared:
    """What of a denoising step does not depend on the step: see `Lance.prepare`."""

    und: Tensor  # [und, hidden] embedded und tokens
    places: Tensor  # [g, hidden] features of the latent places
    table: tuple[Tensor, Tensor]


Halves = dict[str, Tensor]
"""Each present expert's tokens, [n, hidden]."""


@dataclass(frozen=True, eq=False)
class Stack:
    """The layers of one forward, with what all of them take."""

    layers: nn.ModuleList
    table: tuple[Tensor, Tensor]
    pattern: Pattern
    cache: KVCache | Workspace | None

    def run(self, halves: Halves, begin: int = 0, end: int | None = None) -> Halves:
        """The layers from number `begin` up to `end`, default all, one after the other."""
        for number in range(len(self.layers))[begin:end]:
            halves = self.layers[number](halves, self.table, self.pattern, self.cache, number)
        return halves


Through = Callable[[Stack, Halves], Halves]
"""Another way through the layers than all of them; see `openlance.infer.step_cache`."""


class Lance(nn.Module):
    """The dual-expert backbone with its embeddings and, where wanted, the vision tower.

    parts: which of "und", "gen" and "vision" to build; "und" is always needed. The latent position table
    is computed, never stored. runs_on: the device that it computes on, where weights wait elsewhere (see
    `openlance.model.offload`).
    """

    def __init__(self, config: ModelConfig, parts: Iterable[str] = PARTS):
        super().__init__()
        self.config = config
        self.parts = frozenset(parts)
        self.runs_on: torch.device | None = None
        shape = config.backbone
        experts = tuple(name for name in EXPERTS if name in self.parts)
        self.embed = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(DualLayer(shape, experts) for _ in range(shape.layers))
        self.norm = nn.ModuleDict({name: RMSNorm(shape.hidden, shape.norm_eps) for name in experts})
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        if "gen" in self.parts:
            self.latent_in = nn.Linear(config.vae.channels, shape.hidden)
            self.latent_out = nn.Linear(shape.hidden, config.vae.channels)
            self.time_embed = TimeEmbed(shape.hidden)
        if "vision" in self.parts:
            self.vision = Vision(config.vision)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device if self.runs_on is None else self.runs_on

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def see(self, batch: PackedBatch) -> Tensor | None:
        """Features [v, hidden] of the batch's ViT inputs; None where there are none."""
        return batch.features if batch.patches is None else self.vision(batch.patches, batch.vit_grid)

    def prepare(self, batch: PackedBatch) -> Prepared:
        """Embed what does not depend on latents or time: text, vision, latent places, rotary table."""
        text = self.embed(batch.text_ids)
        und = text.new_empty(batch.und, text.shape[1]).index_copy(0, batch.text_index, text)
        features = self.see(batch)
        if features is not None:
            und = und.index_copy(0, batch.vit_index, features.to(und.dtype))
        places = place_features(batch.latent_grid, self.config.backbone.hidden).to(self.dtype)
        return Prepared(und, places, rotary_table(batch.positions, self.config.backbone, self.dtype))

    def forward(
        self,
        batch: PackedBatch,
        cache: KVCache | Workspace | None = None,
        *,
        pattern: Pattern | None = None,
        prepared: Prepared | None = None,
        latents: Tensor | None = None,
        times: Tensor | None = None,
        through: Through = Stack.run,
    ) -> Output:
        """Run the tokens of a batch, after the context in `cache` if there is one.

        pattern: who sees whom; default the batch's dense rows. Where it is `Shared`, the layers run on this
        process's share of the tokens, and what comes out is of all. A denoising loop gives `prepared` once
        computed, and each step's latents [g, C] and times [g] instead of the batch's. through: how the layers
        are run.
        """
        if pattern is None:
            assert batch.rows, "pack(dense=True) or give a pattern"
            pattern = Rows(batch.rows, batch.masks)
        if prepared is None:
            prepared = self.prepare(batch)
        share = pattern.share if isinstance(pattern, Shared) else Share(batch.tokens)
        halves = {"und": share.own(prepared.und)}
        latents = batch.latents if latents is None else latents
        if len(latents):
            times = batch.times if times is None else times
            own, own_times, places = (share.own(x, batch.und) for x in (latents, times, prepared.places))
            halves["gen"] = self.latent_in(own) + self.time_embed(own_times) + places
        cos, sin = (share.own(x) for x in prepared.table)
        halves = through(Stack(self.layers, (cos, sin), pattern, cache), halves)
        hidden = share.whole(self.norm["und"](halves["und"]), 0, batch.und)
        if "gen" not in halves:
            return Output(hidden, latents)
        velocity = self.latent_out(self.norm["gen"](halves["gen"]))
        return Output(hidden, share.whole(velocity, batch.und, batch.tokens))
