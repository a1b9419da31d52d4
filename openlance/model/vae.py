"""The Wan2.2 causal 3D VAE: pixels to latents and back, 16 times smaller in space and 4 times in time.

The network is diffusers' `AutoencoderKLWan`; here are its configuration, the normalisation of the latents,
and the table between the released parameter names and ours.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from torch import Tensor, nn
from torch.nn import functional as F

from openlance.config import VAEConfig
from openlance.errors import InputError
from openlance.model import tiles
from openlance.model.tiles import Tiles, memory

PIXEL_PATCH = 2  # the network sees 2 by 2 pixels as 12 channels

# Released module prefix -> our module prefix. {stage} counts the resolutions, {block} the residual blocks of
# a stage; the released layout counts a stage's resampler as one block more ({last}).
RELEASED_TO_DIFFUSERS = (
    ("conv1", "quant_conv"),
    ("conv2", "post_quant_conv"),
    ("encoder.conv1", "encoder.conv_in"),
    ("encoder.downsamples.{stage}.downsamples.{block}", "encoder.down_blocks.{stage}.resnets.{block}"),
    ("encoder.downsamples.{stage}.downsamples.{last}", "encoder.down_blocks.{stage}.downsampler"),
    ("decoder.conv1", "decoder.conv_in"),
    ("decoder.upsamples.{stage}.upsamples.{block}", "decoder.up_blocks.{stage}.resnets.{block}"),
    ("decoder.upsamples.{stage}.upsamples.{last}", "decoder.up_blocks.{stage}.upsampler"),
    ("{half}.middle.0", "{half}.mid_block.resnets.0"),
    ("{half}.middle.1", "{half}.mid_block.attentions.0"),
    ("{half}.middle.2", "{half}.mid_block.resnets.1"),
    ("{half}.head.0", "{half}.norm_out"),
    ("{half}.head.2", "{half}.conv_out"),
)
# The same for the parts of a residual block; parts not listed have one name in both.
RESIDUAL_PARTS = (
    ("residual.0", "norm1"),
    ("residual.2", "conv1"),
    ("residual.3", "norm2"),
    ("residual.6", "conv2"),
    ("shortcut", "conv_shortcut"),
)


class VAE(nn.Module):
    """Pictures and clips to normalised latents and back; computes in the dtype of its weights.

    tiles: run the widest stages in pieces, for less memory; None is all at once, and fastest.
    runs_on: the device that it computes on, where weights wait elsewhere (see `openlance.model.offload`).
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.tiles: Tiles | None = None
        self.runs_on: torch.device | None = None
        self.net = AutoencoderKLWan(
            base_dim=config.base,
            decoder_base_dim=config.decoder_base,
            z_dim=config.channels,
            dim_mult=list(config.multipliers),
            num_res_blocks=config.residual_blocks,
            temperal_downsample=list(config.temporal_downsample),
            latents_mean=list(config.mean),
            latents_std=list(config.std),
            is_residual=True,
            in_channels=3 * PIXEL_PATCH**2,
            out_channels=3 * PIXEL_PATCH**2,
            patch_size=PIXEL_PATCH,
            scale_factor_temporal=config.temporal_stride,
            scale_factor_spatial=config.spatial_stride,
        )
        for module in self.net.modules():
            if isinstance(module, WanCausalConv3d):
                module.__class__ = CausalConv

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device if self.runs_on is None else self.runs_on

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def encode(self, pixels: Tensor, sample: torch.Generator | None = None) -> Tensor:
        """pixels [B, 3, T, H, W] in [-1, 1] -> normalised latents [B, (T-1)/4 + 1, H/16, W/16, channels].

        The mean of the posterior, or a draw from it where a generator is given. Pixels may be on the host:
        those of one latent frame at a time go to the device.
        Raises InputError where T, H or W does not fit the strides.
        """
        latents, logvar = self.posterior(pixels)
        if sample is not None:
            noise = torch.randn(latents.shape, generator=sample, device=sample.device, dtype=latents.dtype)
            latents = latents + noise.to(latents.device) * torch.exp(0.5 * logvar.clamp(-30, 20))
        latents = latents.permute(0, 2, 3, 4, 1)
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        """Normalised latents [B, T, H, W, channels] -> pixels [B, 3, 4(T-1)+1, 16H, 16W], clamped to [-1, 1].

        `clamp=False` gives the network's own values, for losses and comparisons.
        """
        pixels = torch.cat(list(self._decoded(self._unnormalised(latents))), dim=2)
        return pixels.clamp(-1, 1) if clamp else pixels

    def stream(self, latents: Tensor) -> Iterator[Tensor]:
        """What `decode` gives, in pieces as they come: the first frame, then four at a time."""
        for pixels in self._decoded(self._unnormalised(latents)):
            yield pixels.clamp(-1, 1)

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, not normalised, each [B, channels, T', H', W'], of pixels as in `encode`."""
        self._check(pixels)
        pieces = [pixels[:, :, :1], *pixels[:, :, 1:].split(self.config.temporal_stride, dim=2)]
        chunks = (patchify(piece.to(self.device), PIXEL_PATCH) for piece in pieces if piece.shape[2])
        encoded: Iterator[Tensor]
        if self.tiles is None:
            cache = memory(self.net.encoder, more=len(pixels[0, 0]) > 1)
            encoded = (self.net.encoder(chunk, feat_cache=cache, feat_idx=[0]) for chunk in chunks)
        else:
            encoded = tiles.encode(self.net, chunks, self.config, self.tiles, more=len(pixels[0, 0]) > 1)
        mean, logvar = self.net.quant_conv(torch.cat(list(encoded), dim=2)).chunk(2, dim=1)
        return mean, logvar

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Latents that are not normalised [B, channels, T, H, W] -> pixels as in `decode`, not clamped."""
        return torch.cat(list(self._decoded(latents)), dim=2)

    def _decoded(self, latents: Tensor) -> Iterator[Tensor]:
        """The same, latent frame by latent frame."""
        latents = self.net.post_quant_conv(latents)
        decoded: Iterator[Tensor]
        if self.tiles is None:
            cache = memory(self.net.decoder, more=latents.shape[2] > 1)
            decoded = (
                self.net.decoder(chunk, feat_cache=cache, feat_idx=[0], first_chunk=index == 0)
                for index, chunk in enumerate(latents.split(1, dim=2))
            )
        else:
            decoded = tiles.decode(self.net, latents, self.config, self.tiles)
        for pixels in decoded:
            yield unpatchify(pixels, PIXEL_PATCH)

    def _unnormalised(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, T, H, W, channels] as the network has them, [B, channels, T, H, W]."""
        latents = latents.to(self.device)
        mean, std = self._statistics(latents)
        return (latents * std + mean).permute(0, 4, 1, 2, 3)

    def _check(self, pixels: Tensor) -> None:
        if pixels.dim() != 5 or pixels.shape[1] != 3:
            raise InputError(f"pixels must have the shape [B, 3, T, H, W], not {list(pixels.shape)}")
        frames, height, width = pixels.shape[2:]
        time, space = self.config.temporal_stride, self.config.spatial_stride
        if (frames - 1) % time:
            raise InputError(f"{frames} frames: their number must be one more than a multiple of {time}")
        if height % space or width % space:
            raise InputError(f"{height}x{width} pixels: both must be multiples of {space}")

    def _statistics(self, like: Tensor) -> Tensor:
        """The latents' mean and std [2, channels], in the dtype and on the device of `like`."""
        return torch.tensor((self.config.mean, self.config.std), device=like.device, dtype=like.dtype)


class CausalConv(WanCausalConv3d):
    """The causal 3D convolution; for one frame with nothing before it, the 2D one of its last time slice.

    The two are equal there (all earlier frames are zero padding) and the second costs a third.
    """

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        if cache_x is not None or x.shape[2] != 1 or self._padding[4] != self.kernel_size[0] - 1:
            return super().forward(x, cache_x)
        padding = (self._padding[2], self._padding[0])
        return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=padding).unsqueeze(2)


def released_names(config: VAEConfig) -> dict[str, str]:
    """Every parameter name of the released layout -> its name in `VAE(config).state_dict()`; one to one."""
    with torch.device("meta"):
        names = list(VAE(config).state_dict())
    to_released = {ours: released for released, ours in _modules(config)}
    table = {}
    for name in names:
        module, leaf = name.removeprefix("net.").rsplit(".", 1)
        table[f"{to_released[module]}.{leaf}"] = name
    return table


def _modules(config: VAEConfig) -> Iterator[tuple[str, str]]:
    """(released, ours) for every module that may own parameters: the two tables above, written out."""
    for stage in range(len(config.multipliers)):
        for half, blocks in (("encoder", config.residual_blocks), ("decoder", config.residual_blocks + 1)):
            for block in range(blocks):
                for released, ours in RELEASED_TO_DIFFUSERS:
                    place = {"half": half, "stage": stage, "block": block, "last": blocks}
                    if released.startswith(("encoder", "decoder")) and not released.startswith(half):
                        continue
                    yield from _parts(released.format(**place), ours.format(**place))


def _parts(released: str, ours: str) -> Iterator[tuple[str, str]]:
    yield released, ours
    for released_part, our_part in RESIDUAL_PARTS:
        yield f"{released}.{released_part}", f"{ours}.{our_part}"
    for part in ("norm", "to_qkv", "proj", "resample.1", "time_conv"):
        yield f"{released}.{part}", f"{ours}.{part}"
