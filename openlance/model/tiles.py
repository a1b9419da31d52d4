"""The VAE in little memory: frame by frame through its widest stages, and those in tiles of the picture.

Both are exact. Causal convolutions remember the two frames before, so any cut in time gives the same. In
space, only the stages near the pixels are cut; they are local (convolutions, and norms of single places), so
a tile that is given a margin as wide as they reach is right up to its own border. What sees the whole
picture, the attention in the middle, always runs on the whole; it is small there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise, product

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor, nn

from openlance.config import VAEConfig
from openlance.errors import InputError

MEMORY = 2  # frames that a causal convolution of three remembers
Stage = Callable[..., Tensor]


@dataclass(frozen=True)
class Tiles:
    """How the stages near the pixels run: one frame at a time, in tiles.

    side: rows and columns of a tile at most, in latent cells, without its margin; None is the whole picture.
    margin: cells that a tile is given on each side; None is as wide as the stages reach, which is exact. A
        narrower one is faster, and leaves seams.
    group: processes that share the tiles; each must be given the same. Where `side` makes fewer tiles than
        they are, the picture is cut on, as far as that leaves each of them less to do.
    """

    side: int | None = None
    margin: int | None = None
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.side is not None and self.side < 1:
            raise InputError(f"the side of a tile must be at least 1 latent cell, not {self.side}")
        if self.margin is not None and self.margin < 0:
            raise InputError(f"the margin of a tile must be 0 or more latent cells, not {self.margin}")

    @property
    def processes(self) -> int:
        return 1 if self.group is None else self.group.size()


@dataclass(frozen=True)
class Cut:
    """One piece of an axis, in latent cells: its own cells [start, end), and with margins [low, high)."""

    start: int
    end: int
    low: int
    high: int

    def given(self, scale: int) -> slice:
        """What the tile takes of an axis with `scale` values a cell."""
        return slice(self.low * scale, self.high * scale)

    def own(self, scale: int) -> slice:
        """Where the tile's own cells are on that axis."""
        return slice(self.start * scale, self.end * scale)

    def kept(self, scale: int) -> slice:
        """Where its own cells are in what the tile gives."""
        return slice((self.start - self.low) * scale, (self.end - self.low) * scale)


Tile = tuple[Cut, Cut]
"""Its rows and its columns."""


def cuts(cells: int, count: int, margin: int) -> list[Cut]:
    """An axis in so many pieces, as equal as can be."""
    borders = [cells * number // count for number in range(count + 1)]
    return [
        Cut(start, end, max(0, start - margin), min(cells, end + margin)) for start, end in pairwise(borders)
    ]


def grid_of(cells: Sequence[int], side: int | None, margin: int, processes: int = 1) -> list[Tile]:
    """The tiles of a picture of so many rows and columns of latent cells, see `Tiles`."""
    counts = [1 if side is None else -(-count // side) for count in cells]

    def cut(rows: int, columns: int) -> list[Tile]:
        return list(product(cuts(cells[0], rows, margin), cuts(cells[1], columns, margin)))

    if math.prod(counts) >= processes:
        return cut(*counts)
    finer = (range(least, min(most, processes) + 1) for least, most in zip(counts, cells, strict=True))
    grids = [cut(*both) for both in product(*finer) if math.prod(both) <= processes]
    return min(grids, key=lambda grid: (max(map(_given, grid)), len(grid)))


def _given(tile: Tile) -> int:
    """Cells that a tile is given, its margins included."""
    return math.prod(cut.high - cut.low for cut in tile)


def own_tiles(grid: list[Tile], group: dist.ProcessGroup | None) -> list[Tile]:
    """Those of this process: every n-th of n processes. One that would have none does what another does."""
    return grid if group is None else grid[group.rank() % len(grid) :: group.size()]


def decoder_reach(config: VAEConfig) -> int:
    """Latent cells around a tile that the decoder's stages after the first depend on."""
    convs = 2 * (config.residual_blocks + 1)
    reach = 1 + convs  # the last convolution, and the last stage, where a cell is widest
    for _ in range(len(config.multipliers) - 2):
        reach = -(-(reach + 1) // 2) + convs  # the convolution after doubling; half as many places; a stage
    return -(-reach // 2)


def encoder_reach(config: VAEConfig) -> int:
    """Latent cells around a tile that the encoder's stages before the last depend on."""
    reach, halvings = 0, len(config.multipliers) - 1
    for _ in range(halvings):
        reach = 2 * reach + 2 + 2 * config.residual_blocks
    return -(-(reach + 1) // 2**halvings)


def memory(module: nn.Module, more: bool) -> list[None] | None:
    """The cache between chunks, of what each causal convolution remembers; none for a single frame."""
    count = sum(isinstance(part, WanCausalConv3d) for part in module.modules())
    return [None] * count if more else None


def decode(net: AutoencoderKLWan, latents: Tensor, config: VAEConfig, tiles: Tiles) -> Iterator[Tensor]:
    """Latents [B, channels, T, H, W] after `post_quant_conv` -> what the decoder gives for each of them, as
    they come: [B, 12, 1, 8 H, 8 W] of the first, [B, 12, 4, 8 H, 8 W] of the others."""
    decoder = net.decoder
    more = latents.shape[2] > 1
    conv_in, first_up = _Conv(decoder.conv_in), _Blocks(decoder.up_blocks[0], more)
    middle = _Blocks(decoder.mid_block, more)
    margin = decoder_reach(config) if tiles.margin is None else tiles.margin
    grid = grid_of(latents.shape[-2:], tiles.side, margin, tiles.processes)
    own = own_tiles(grid, tiles.group)
    tails: list[list[Stage]] = [
        [*(_Blocks(up, more) for up in decoder.up_blocks[1:]), _Head(decoder)] for _ in own
    ]
    scale = 2 ** (len(decoder.up_blocks) - 1)
    for number, frame in enumerate(latents.split(1, dim=2)):
        first = {"first_chunk": number == 0}
        wide = first_up(middle(conv_in(frame)), **first)
        pieces = (
            _flow(wide[..., rows.given(2), columns.given(2)], [(stage, 1) for stage in tail], first)
            for tail, (rows, columns) in zip(tails, own, strict=True)
        )
        yield _joined(pieces, grid, scale, tiles.group)


def encode(
    net: AutoencoderKLWan, chunks: Iterable[Tensor], config: VAEConfig, tiles: Tiles, more: bool
) -> Iterator[Tensor]:
    """Chunks [B, 12, 1 or 4, 8 H, 8 W] of pixels in 2 by 2 patches -> [B, 2 channels, 1, H, W] of each,
    before `quant_conv`. more: whether there is more than one, of which then something is remembered."""
    encoder = net.encoder
    *downs, last = encoder.down_blocks
    scale = 2 ** len(downs)
    margin = encoder_reach(config) if tiles.margin is None else tiles.margin
    whole: list[Stage] = [
        _Blocks(last, more), _Blocks(encoder.mid_block, more), _Head(encoder)
    ]  # fmt: skip
    sizes = [2 if halves else 1 for halves in config.temporal_downsample]
    grid: list[Tile] = []
    own: list[Tile] = []
    heads: list[list[tuple[Stage, int]]] = []
    for chunk in chunks:
        if not grid:
            cells = [length // scale for length in chunk.shape[-2:]]
            grid = grid_of(cells, tiles.side, margin, tiles.processes)
            own = own_tiles(grid, tiles.group)
            heads = [
                [
                    (_Conv(encoder.conv_in), 1),
                    *((_Blocks(down, more), size) for down, size in zip(downs, sizes, strict=True)),
                ]
                for _ in own
            ]
        pieces = (
            _flow(chunk[..., rows.given(scale), columns.given(scale)], head, {})
            for head, (rows, columns) in zip(heads, own, strict=True)
        )
        small = _joined(pieces, grid, 1, tiles.group)
        for stage in whole:
            small = stage(small)
        yield small


class _Conv:
    """A causal convolution that remembers the frames before."""

    def __init__(self, conv: WanCausalConv3d) -> None:
        self.conv = conv
        self.before: Tensor | None = None

    def __call__(self, x: Tensor, **_: bool) -> Tensor:
        kept = x[:, :, -MEMORY:].clone()
        if self.before is not None and kept.shape[2] < MEMORY:
            kept = torch.cat([self.before[:, :, -1:], kept], dim=2)
        out = self.conv(x, self.before)
        self.before = kept
        return out


class _Blocks:
    """A module of residual blocks whose convolutions remember the frames before, where more will come."""

    def __init__(self, module: nn.Module, more: bool) -> None:
        self.module, self.cache = module, memory(module, more)

    def __call__(self, x: Tensor, **first: bool) -> Tensor:
        return self.module(x, feat_cache=self.cache, feat_idx=[0], **first)


class _Head:
    """The end of the encoder or the decoder."""

    def __init__(self, half: nn.Module) -> None:
        self.half, self.conv = half, _Conv(half.conv_out)  # type: ignore[arg-type]

    def __call__(self, x: Tensor, **_: bool) -> Tensor:
        return self.conv(self.half.nonlinearity(self.half.norm_out(x)))  # type: ignore[operator]


def _flow(x: Tensor, stages: list[tuple[Stage, int]], first: dict[str, bool]) -> Tensor:
    """x through stages that each take so many frames at once, none further ahead than the next one needs."""
    frames: Iterator[Tensor] = iter(x.split(1, dim=2))
    for stage, size in stages:
        frames = _through(stage, frames, size, first)
    return torch.cat(list(frames), dim=2)


def _through(stage: Stage, frames: Iterator[Tensor], size: int, first: dict[str, bool]) -> Iterator[Tensor]:
    while group := list(islice(frames, size)):
        yield from stage(group[0] if len(group) == 1 else torch.cat(group, dim=2), **first).split(1, dim=2)


def _joined(
    pieces: Iterator[Tensor], grid: list[Tile], scale: int, group: dist.ProcessGroup | None
) -> Tensor:
    """The tiles' own cells side by side; pieces: those of this process, with their margins."""
    if len(grid) == 1:
        return next(pieces)
    height, width = (cut.end * scale for cut in grid[-1])
    canvas: Tensor | None = None
    for piece, (rows, columns) in zip(pieces, own_tiles(grid, group), strict=True):
        if canvas is None:
            canvas = piece.new_empty(*piece.shape[:3], height, width)
        canvas[..., rows.own(scale), columns.own(scale)] = piece[..., rows.kept(scale), columns.kept(scale)]
    assert canvas is not None
    if group is not None:
        for number, (rows, columns) in enumerate(grid):
            part = canvas[..., rows.own(scale), columns.own(scale)].contiguous()
            dist.broadcast(part, group=group, group_src=number % group.size())
            canvas[..., rows.own(scale), columns.own(scale)] = part
    return canvas
