"""Turns the features of a pre-trained network at several strides into `image_latents`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from ldmseg_fast.config import ImageEncoderConfig
from ldmseg_fast.models.efficientnet_lite import ConvNorm, EfficientNetLite


class Pyramid(Protocol):
    """Describes a network of features: a module whose forward maps uint8 [B, 3, H, W] to one float map a stride.

    Attributes:
        name: of the network, for messages.
        strides: rising powers of two. H and W are multiples of the last.
        channels: of each stride's features.
    """

    name: str
    strides: tuple[int, ...]
    channels: tuple[int, ...]


PYRAMIDS: dict[str, Callable[[ImageEncoderConfig], Any]] = {
    "efficientnet_lite": lambda config: EfficientNetLite(config.variant),
}


class PyramidEncoder(nn.Module):
    """Encodes pictures by a pyramid: a 1x1 convolution each to one width, summed at the latents' stride.

    Finer features are averaged to that stride, coarser ones are resized to it bilinearly (Lin et al. 2017, FPN, without
    its way down). The sums' weights start at random: they are trained with the UNet.
    """

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.network = PYRAMIDS[config.kind](config)
        self.projections = nn.ModuleList(
            nn.Conv2d(channels, config.latent_channels, 1, bias=level == 0)
            for level, channels in enumerate(self.network.channels)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Encodes uint8 [B, 3, H, W] as float [B, C, H/f, W/f], f = downsampling * picture_scale."""
        stride = self.config.downsampling * self.config.picture_scale
        size = (images.shape[-2] // stride, images.shape[-1] // stride)
        latents: Any = 0.0
        for own, features, project in zip(self.network.strides, self.network(images), self.projections):
            if own <= stride:
                latents = latents + project(F.avg_pool2d(features, stride // own) if own < stride else features)
            else:
                latents = latents + F.interpolate(project(features), size, mode="bilinear", align_corners=False)
        return latents * self.config.scaling_factor


def fold_norms(module: Any) -> Any:
    """Returns `module` itself, with its frozen batch norms in the convolutions before them where it has any.

    For inference, before it gets another dtype.
    """
    for part in module.modules() if isinstance(module, PyramidEncoder) else ():
        if isinstance(part, ConvNorm):
            part.fold_norm()
    return module
