"""Turns the features of a pre-trained network at several strides into `image_latents`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmseg_fast.config import ImageEncoderConfig
from ldmseg_fast.models.conv_encoder import ConvEncoder, scaled
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
    averaged to it, or with `fine_features="patches"` a convolution over each patch keeps what lies where in it. With
    "convolutions" a `ConvEncoder`, which sees the pictures at the masks' size, is added to that. All but the network's
    weights start at random: they are trained with the UNet.
    """

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.network = PYRAMIDS[config.kind](config)
        stride = config.downsampling * config.picture_scale
        self.projections = nn.ModuleList()
        for level, (own, channels) in enumerate(zip(self.network.strides, self.network.channels)):
            side = 1 if config.fine_features == "mean" else max(1, stride // own)
            self.projections.append(nn.Conv2d(channels, config.latent_channels, side, side, bias=level == 0))
        if config.fine_features == "convolutions":
            self.convolutions = ConvEncoder(replace(config, scaling_factor=1.0))

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
        if self.config.fine_features == "convolutions":
            latents = latents + self.convolutions(F.avg_pool2d(images.float(), self.config.picture_scale))
        return scaled(latents, self.config)


def as_patches(state: Mapping[str, Tensor], config: ImageEncoderConfig) -> dict[str, Tensor]:
    """Turns the weights of an encoder that averages finer features into those of one that sees patches or more.

    It computes the same until it is trained on: the mean over a patch of r x r places is a convolution whose weights
    are those of the 1x1 convolution over r^2 (Dosovitskiy et al., arXiv 2010.11929, embed patches so), and added
    convolutions end in zeros (Zhang et al. 2023, arXiv 2302.05543, start ControlNet's so).

    Args:
        state: tensors of a `PyramidEncoder`, of any dtype; projections [C, c, 1, 1] become [C, c, r, r]. What sees
            patches already stays, and so do its convolutions.
        config: of the encoder whose `fine_features` are more than means.
    """
    with torch.device("meta"):
        own = PyramidEncoder(config).state_dict()
    changed: dict[str, Tensor] = {}
    if config.fine_features == "convolutions" and not any(name.startswith("convolutions.") for name in state):
        added = ConvEncoder(config)
        changed = {f"convolutions.{name}": value for name, value in added.state_dict().items()}
        last = f"convolutions.layers.{len(added.layers) - 1}."
        changed |= {name: torch.zeros_like(value) for name, value in changed.items() if name.startswith(last)}
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
