"""Defines the image encoder of a few convolutions, alone and as a part of others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldmseg_fast.config import ImageEncoderConfig
from ldmseg_fast.models.layers import GroupNormSiLU, ResnetBlock


def normalize(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scales uint8 or float [B, 3, H, W] from [0, 255] to [-1, 1] in `dtype`.

    Stable Diffusion's VAE takes pictures so (Rombach et al. 2022).
    """
    return (images.float() * (2.0 / 255.0) - 1.0).to(dtype)


def scaled(latents: Tensor, config: ImageEncoderConfig) -> Tensor:
    """Multiplies latents, float [B, C, h, w], by `scaling_factor` in float32: half would round it.

    It brings them to unit variance (Rombach et al. 2022).
    """
    if config.scaling_factor == 1:
        return latents
    return (latents.float() * config.scaling_factor).to(latents.dtype)


class ConvEncoder(nn.Module):
    """Encodes pictures by a few convolutions, which are trained jointly with the UNet: this project's own design."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        widths, groups = config.widths, config.norm_groups
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1)]
        for level, width in enumerate(widths):
            if level:
                layers.append(nn.Conv2d(widths[level - 1], width, 3, stride=2, padding=1))
            layers += [ResnetBlock(width, width, 0, groups, 1e-6) for _ in range(config.blocks[level])]
        layers += [GroupNormSiLU(groups, widths[-1], eps=1e-6), nn.Identity()]  # as many as in released weights
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        """Encodes uint8 or float [B, 3, H, W] in [0, 255] as float [B, C, H/f, W/f]."""
        return scaled(self.layers(normalize(images, next(self.parameters()).dtype)), self.config)
