"""Turns the features of a pre-trained network at several strides into `image_latents`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
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
    """Encodes pictures by a pyramid: a convolution each to one width, summed at the latents' stride.

    Coarser features are resized to that stride bilinearly (Lin et al. 2017, FPN, without its way down). Finer ones are
    averaged to it, or with `fine_features="patches"` a convolution over each patch keeps what lies where in it. The
    sums' weights start at random: they are trained with the UNet.
    """

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.network = PYRAMIDS[config.kind](config)
        stride = config.downsampling * config.picture_scale
        self.projections = nn.ModuleList()
        for level, (own, channels) in enumerate(zip(self.network.strides, self.network.channels)):
            side = max(1, stride // own) if config.fine_features == "patches" else 1
            self.projections.append(nn.Conv2d(channels, config.latent_channels, side, side, bias=level == 0))

    def forward(self, images: Tensor) -> Tensor:
        """Encodes uint8 [B, 3, H, W] as float [B, C, H/f, W/f], f = downsampling * picture_scale."""
        stride = self.config.downsampling * self.config.picture_scale
        size = (images.shape[-2] // stride, images.shape[-1] // stride)
        latents: Any = 0.0
        for own, features, project in zip(self.network.strides, self.network(images), self.projections):
            if own <= stride:
                averages = own < stride and self.config.fine_features == "mean"
                latents = latents + project(F.avg_pool2d(features, stride // own) if averages else features)
            else:
                latents = latents + F.interpolate(project(features), size, mode="bilinear", align_corners=False)
        return latents * self.config.scaling_factor


def as_patches(state: Mapping[str, Tensor], config: ImageEncoderConfig) -> dict[str, Tensor]:
    """Turns the weights of an encoder that averages finer features into those of one that sees patches.

    It computes the same until it is trained on: the mean over a patch of r x r places is a convolution whose weights
    are those of the 1x1 convolution over r^2 (Dosovitskiy et al., arXiv 2010.11929, embed patches so).

    Args:
        state: tensors of a `PyramidEncoder`, of any dtype; projections [C, c, 1, 1] become [C, c, r, r]. Those that see
            patches already stay.
        config: of the encoder that sees patches.
    """
    with torch.device("meta"):
        own = PyramidEncoder(config).state_dict()
    changed = {}
    for name, value in state.items():
        if name.startswith("projections.") and value.ndim == 4 and value.shape[2:] == (1, 1) and name in own:
            side = own[name].shape[-1]
            changed[name] = value.expand(*value.shape[:2], side, side) / side**2
    return {**state, **changed}


def fold_norms(module: Any) -> Any:
    """Returns `module` itself, with its frozen batch norms in the convolutions before them where it has any.

    For inference, before it gets another dtype.
    """
    for part in module.modules() if isinstance(module, PyramidEncoder) else ():
        if isinstance(part, ConvNorm):
            part.fold_norm()
    return module
