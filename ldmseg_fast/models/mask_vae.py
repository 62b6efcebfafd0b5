"""Mask auto-encoder: bit planes -> latents -> slot logits (LDMSeg, arXiv 2401.10227, section 3.1).

Positions in the two Sequentials, and so parameter names, are those of the published checkpoints.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmseg_fast.config import MaskVAEConfig
from ldmseg_fast.models import posterior
from ldmseg_fast.models.layers import ResnetBlock
from ldmseg_fast.models.posterior import Posterior


class ChannelLayerNorm(nn.Module):
    """LayerNorm over the channels of [B, C, h, w]."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return normed.permute(0, 3, 1, 2)


class MidBlock(nn.Module):
    """Two residual blocks without time embedding and attention: diffusers' `UNetMidBlock2D`."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, 0, groups, 1e-6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x


def _encoder(config: MaskVAEConfig, out_channels: int) -> nn.Sequential:
    widths = config.widths
    layers: list[nn.Module] = [nn.Conv2d(config.num_bits, widths[0], 3, padding=1), nn.SiLU()]
    for width, next_width in itertools.pairwise(widths):
        # the first convolution of a pair has no activation after it
        layers += [
            nn.Conv2d(width, width, 3, padding=1),
            nn.Conv2d(width, next_width, 3, stride=2, padding=1),
            nn.SiLU(),
        ]
    width = config.middle_width or widths[-1]
    layers.append(nn.Conv2d(widths[-1], width, 3, padding=1))
    layers += [MidBlock(width, config.norm_groups) for _ in range(config.num_mid_blocks)] or [nn.Identity()]
    layers += [nn.GroupNorm(config.norm_groups, width, eps=1e-6), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, out_channels, 3, padding=1))


def _decoder(config: MaskVAEConfig) -> nn.Sequential:
    width = config.decoder_width
    layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, width, 3, padding=1)]
    layers.append(MidBlock(width, config.norm_groups) if config.num_mid_blocks else nn.Identity())
    for _ in range(config.num_upscalers):
        wide = config.upscale_width or config.decoder_width
        layers += [nn.ConvTranspose2d(width, wide, 2, stride=2), ChannelLayerNorm(wide), nn.SiLU()]
        width = wide
    layers += [nn.GroupNorm(config.norm_groups, width, eps=1e-5), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, config.num_slots, 3, padding=1))


class MaskVAE(nn.Module):
    """Auto-encoder of segment maps.

    Args:
        config: bits, slots, widths, bottleneck. The defaults are the released size.
    """

    def __init__(self, config: MaskVAEConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        encoder_channels = {"gaussian": 2 * channels, "gumbel": config.codebook_size}
        self.encoder = _encoder(config, encoder_channels.get(config.parametrization, channels))
        self.decoder = _decoder(config)
        if config.parametrization in ("discrete", "gumbel"):
            codebook = posterior.Codebook if config.parametrization == "discrete" else posterior.GumbelCodebook
            self.codebook = codebook(config.codebook_size, channels)

    def encode(self, bits: Tensor) -> Posterior:
        """Bit planes [B, K, H, W] in {-1, +1}, 0 where void, to the posterior of [B, C, H/f, W/f], unscaled."""
        moments = self.encoder(bits)
        if self.config.parametrization == "gaussian":
            return posterior.gaussian(moments)
        if self.config.parametrization == "auto":
            return posterior.point(moments, self.config.bottleneck)
        return self.codebook(moments)

    def encode_latents(self, bits: Tensor) -> Tensor:
        """The posterior's mode times `scaling_factor`: what diffusion sees, [B, C, H/f, W/f]."""
        return self.encode(bits).mode() * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents [B, C, h, w] to logits [B, Q, h * 2^u, w * 2^u], before the last bilinear resize."""
        return self.decoder(latents)

    def decode_latents(self, mask_latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w], as the sampler returns them, to logits [B, Q, h * 2^u, w * 2^u]."""
        return self.decoder(mask_latents / self.config.scaling_factor)

    def upsample(self, logits: Tensor) -> Tensor:
        """`decode`'s logits at the network's size: bilinear by 8 / 2^u, align_corners false."""
        factor = self.config.downsampling / 2**self.config.num_upscalers
        return F.interpolate(logits, scale_factor=factor, mode="bilinear", align_corners=False)
