"""Defines EfficientNet-Lite's feature layers (Tan & Le 2019, arXiv 1905.11946; Lite: no squeeze-and-excite, ReLU6).

Widths, depths and the numbers that Lite changes are TensorFlow's
(https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MULTIPLIERS = ((1.0, 1.0), (1.0, 1.1), (1.1, 1.1), (1.2, 1.4), (1.4, 1.8))  # of width and depth, Lite0 to Lite4
# blocks, kernel, stride, expansion, channels of EfficientNet-B0's seven stages (Tan & Le 2019, table 1)
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM = 32  # channels; Lite scales neither the stem nor the depth of the first and the last stage
EPS = 1e-3  # of batch norm


class FrozenBatchNorm(nn.Module):
    """Holds the numbers of a batch norm that never change: a scale and a shift a channel, which go into a convolution.

    They are buffers, so that no optimizer sees them.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def fold(self, kernel: Tensor) -> tuple[Tensor, Tensor]:
        """Folds the norm into the convolution before it.

        Args:
            kernel: float [C, I, k, k], of a convolution without a bias.

        Returns:
            Its weight, of the same shape, and its bias, [C].
        """
        scale = self.weight * torch.rsqrt(self.running_var + EPS)  # [C]
        return kernel * scale.view(-1, 1, 1, 1), self.bias - self.running_mean * scale


class ConvNorm(nn.Module):
    """Convolves with a frozen batch norm and, where `activates`, ReLU6. Padding is TensorFlow's "same".

    At stride 2 that is one more pixel at the right and bottom than at the left and top, as sides are even.
    """

    def __init__(
        self, in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1, activates: bool = True
    ) -> None:
        super().__init__()
        padding = 0 if stride == 2 else kernel // 2
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, padding, groups=groups, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu" if activates else "linear")
        self.norm: FrozenBatchNorm | None = FrozenBatchNorm(channels)
        self.padding = (*((kernel - 2) // 2, (kernel - 1) // 2) * 2,) if stride == 2 else None
        self.activates = activates

    def forward(self, x: Tensor) -> Tensor:
        """Maps float [B, I, H, W] to [B, C, H / stride, W / stride]."""
        if self.padding is not None:
            x = F.pad(x, self.padding)
        if self.norm is None:
            x = self.conv(x)
        else:
            x = self._convolve(x, *self.norm.fold(self.conv.weight))
        return F.relu6(x, inplace=not x.requires_grad) if self.activates else x

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        conv = self.conv
        trained = torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad)
        if conv.groups == 1 or not trained or x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return F.conv2d(x, weight, bias, conv.stride, conv.padding, groups=conv.groups)
        # a CPU takes several times as long for a depthwise convolution's gradients in bfloat16
        dtype = torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", enabled=False):
            wide, kernel, shift = x.float(), weight.float(), bias.float()
            return F.conv2d(wide, kernel, shift, conv.stride, conv.padding, groups=conv.groups).to(dtype)

    @torch.no_grad()
    def fold_norm(self) -> None:
        """Puts the norm into the convolution for good; for inference."""
        if self.norm is not None:
            weight, bias = self.norm.fold(self.conv.weight)
            self.conv.weight, self.conv.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
            self.norm = None


class MBConv(nn.Module):
    """Expands, filters each channel and projects, with a shortcut where shapes allow it (Sandler et al. 2018)."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        self.expand = ConvNorm(in_channels, width, 1) if expansion > 1 else None
        self.depthwise = ConvNorm(width, width, kernel, stride, groups=width)
        self.project = ConvNorm(width, channels, 1, activates=False)
        self.has_shortcut = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """Maps float [B, I, H, W] to [B, C, H / stride, W / stride]."""
        hidden = x if self.expand is None else self.expand(x)
        hidden = self.project(self.depthwise(hidden))
        return x + hidden if self.has_shortcut else hidden


class EfficientNetLite(nn.Module):
    """Computes the features of EfficientNet-Lite at strides 4, 8, 16 and 32; a `models.pyramids.Pyramid`.

    Args:
        variant: 0 to 4, Lite0 (3.0 M parameters without its head) to Lite4.
    """

    strides = (4, 8, 16, 32)

    def __init__(self, variant: int = 0) -> None:
        super().__init__()
        width, depth = MULTIPLIERS[variant]
        self.name = f"EfficientNet-Lite{variant}"
        self.stem = ConvNorm(3, STEM, 3, 2)
        blocks: list[MBConv] = []
        before, self.ends = STEM, []  # the last block before each further stride-2 block, and the last of all
        for number, (count, kernel, stride, expansion, base) in enumerate(STAGES):
            channels = _rounded(base * width)
            if stride == 2 and number > 1:
                self.ends.append(len(blocks) - 1)
            for place in range(count if number in (0, len(STAGES) - 1) else math.ceil(count * depth)):
                blocks.append(MBConv(before, channels, kernel, stride if place == 0 else 1, expansion))
                before = channels
        self.ends.append(len(blocks) - 1)
        self.blocks = nn.ModuleList(blocks)
        self.channels = tuple(blocks[end].project.conv.out_channels for end in self.ends)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Encodes uint8 [B, 3, H, W], whose sides are multiples of 32.

        Returns:
            Float features [B, channels[i], H / strides[i], W / strides[i]].
        """
        x = self.stem(((images.float() - 127.0) / 128.0).to(self.stem.conv.weight.dtype))
        features = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in self.ends:
                features.append(x)
        return features


def _rounded(channels: float) -> int:
    """Rounds to a multiple of 8, but not to less than nine tenths (Tan & Le 2019's code)."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


LAYERS = {"expand_conv": "expand.conv", "depthwise_conv": "depthwise.conv", "project_conv": "project.conv"}
NORMS = {"bn0": "expand.norm", "bn1": "depthwise.norm", "bn2": "project.norm"}


def efficientnet_lite_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives the tensors of a state dict of PyPI's `efficientnet-lite-pytorch` our names; any shape and dtype.

    The classifier and the counters of batch norm fall away. Names that are ours already stay.
    """
    renamed = {}
    for key, value in state.items():
        if key.startswith(("_conv_head.", "_bn1.", "_fc.")) or key.endswith("num_batches_tracked"):
            continue
        key = {"_conv_stem.weight": "stem.conv.weight"}.get(key, re.sub(r"^_bn0\.", "stem.norm.", key))
        block = re.fullmatch(r"_blocks\.(\d+)\._(\w+)\.(\w+)", key)
        if block is not None:
            number, layer, leaf = block.groups()
            key = f"blocks.{number}.{(LAYERS | NORMS).get(layer, layer)}.{leaf}"
        renamed[key] = value
    return renamed
