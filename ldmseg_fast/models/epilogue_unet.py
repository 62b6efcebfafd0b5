"""The UNet of few launches in which what makes features also makes their moments, so that no norm reads them twice.

A transformer's layers are `kernels.linear`: each normalises the rows that it reads, and adds bias and residual to the
tile that it holds. Its 3x3 convolutions are `kernels.convolution`: each adds bias, time and residual, and reads a map
that is to be doubled where it lies. Joined features leave their moments as they are stored. So nothing is left pending.
What it computes is diffusers' `UNet2DConditionModel`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldmseg_fast.kernels.convolution import convolution
from ldmseg_fast.kernels.group_norm_silu.moments import gather_moments, normalise
from ldmseg_fast.kernels.linear import linear
from ldmseg_fast.models.attention import attention
from ldmseg_fast.models.fused_unet import FusedResnet, FusedTransformer, FusedUNet, Pending
from ldmseg_fast.models.layers import ResnetBlock, SpatialTransformer


class Features(NamedTuple):
    """Holds features with their moments, where what made them left those."""

    x: Tensor  # [B, C, h, w], channels_last
    moments: Tensor | None = None  # float32 [B, 2, chunks, G]


class EpilogueResnet(FusedResnet):
    """Runs a `ResnetBlock`; nothing of its input or output is pending."""

    def __init__(self, block: ResnetBlock, pending: Pending) -> None:
        assert pending is None
        super().__init__(block, None)
        self.bias, self.pending = self.pending, None  # of the second convolution, with the shortcut's

    def __call__(self, features: Features, time: Tensor, wanted: bool) -> Features:  # type: ignore[override]
        """Maps float features [B, C, h, w] to [B, C_out, h, w], with moments where wanted; time as `FusedResnet`."""
        block, x, num_groups = self.block, features.x, self.block.norm2.num_groups
        assert block.time_slice is not None
        hidden, moments = convolution(
            *(_norm(block.norm1, features), block.conv1.weight),
            added=time[:, block.time_slice],
            num_groups=num_groups,
        )
        hidden = _norm(block.norm2, Features(hidden, moments))
        num_groups = num_groups if wanted else 0
        if self.shortcut is None:
            out, moments = convolution(hidden, block.conv2.weight, self.bias, residual=x, num_groups=num_groups)
            return Features(out, moments if wanted else None)
        hidden, _ = convolution(hidden, block.conv2.weight)
        tokens, moments = linear(
            *(_tokens(x), self.shortcut.t(), self.bias),
            residual=_tokens(hidden),
            num_groups=num_groups,
        )
        return Features(_as_map(tokens, x), moments if wanted else None)


class EpilogueTransformer(FusedTransformer):
    """Runs a `SpatialTransformer`; nothing of its input or output is pending.

    Nothing stands between the last feed-forward product and `proj_out` but a sum, so the two are one product of the
    hidden values beside the gate's.
    """

    def __init__(self, module: SpatialTransformer, pending: Pending) -> None:
        assert pending is None
        super().__init__(module, None)
        self.pending = None
        last: Any = module.transformer_blocks[-1]
        into, out = (weight.float() for weight in (last.ff.net[2].weight, self.out))
        bias: Any = module.proj_out.bias
        self.last_weight = torch.cat([out, out @ into], 1).to(self.out.dtype)  # [C, 5 C]
        self.last_bias = bias.float() + out @ last.ff.net[2].bias.float()

    def __call__(self, features: Features, time: Tensor, wanted: bool) -> Features:  # type: ignore[override]
        """Maps float features [B, C, h, w], with moments, to the same shape, with moments where they are wanted."""
        module, x = self.module, features.x
        tokens = _tokens(x)
        batch, length, channels = tokens.shape
        norm = (module.norm.weight, module.norm.bias, module.norm.eps)
        hidden, _ = linear(tokens, self.into, module.proj_in.bias, norm=norm, moments=features.moments)
        for index, (block, _, _) in enumerate(self.blocks):
            layer: Any = block
            norm = (layer.norm1.weight, layer.norm1.bias, layer.norm1.eps)
            qkv, _ = linear(hidden, layer.attn1.fused_qkv, norm=norm)
            q, k, v = qkv.view(batch, length, 3, layer.attn1.num_heads, -1).unbind(2)
            out = attention(q, k, v, layer.attn1.backend).reshape(batch, length, channels)
            hidden, _ = linear(out, layer.attn1.to_out[0].weight, layer.attn1.to_out[0].bias, residual=hidden)
            norm = (layer.norm3.weight, layer.norm3.bias, layer.norm3.eps)
            gate, _ = linear(hidden, layer.ff.net[0].proj.weight, layer.ff.net[0].proj.bias, norm=norm, gated=True)
            if index + 1 < len(self.blocks):
                last = layer.ff.net[2]
                hidden, _ = linear(gate, last.weight, last.bias, residual=hidden)
        out, moments = linear(
            *(hidden, self.last_weight, self.last_bias),
            beside=gate,
            residual=tokens,
            num_groups=module.norm.num_groups if wanted else 0,
        )
        return Features(_as_map(out, x), moments if wanted else None)


class EpilogueUNet(FusedUNet):
    """Evaluates a `UNet` for inference with fewer launches than `FusedUNet`, whose arguments it takes."""

    resnet = EpilogueResnet
    transformer = EpilogueTransformer

    def _bias_of(self, convolution: Any) -> Pending:
        """Says that nothing is pending: each convolution adds its bias itself."""
        return None

    @torch.no_grad()
    def denoise(self, sample: Tensor, time: Tensor) -> Tensor:
        """Evaluates from the time on that `embed_time` returned; float [B, C, h, w] as `UNet.denoise`."""
        unet, groups = self.unet, self.unet.config.norm_groups
        conv_in, conv_out = unet.conv_in, unet.conv_out
        skips = [_convolve(conv_in, sample, num_groups=groups) if self.bare_input else Features(conv_in(sample))]
        for layers, _, downsample in self.down:
            for index, layer in enumerate(layers):
                wanted = downsample is None or index + 1 < len(layers)  # a downsampling wants none
                skips.append(_run(layer, skips[-1], time, wanted))
            if downsample is not None:
                skips.append(_convolve(downsample, skips[-1].x, stride=2, num_groups=groups))
        features = _run(self.mid, skips[-1], time, False)
        for level, (layers, _, upsample) in enumerate(self.up):
            for index, layer in enumerate(layers):
                features = Features(*gather_moments(features.x, skips.pop().x, True, groups))
                is_last = level + 1 == len(self.up) and index + 1 == len(layers)
                features = _run(layer, features, time, is_last)
            if upsample is not None:
                features = _convolve(upsample, features.x, upsample=True)
        return _convolve(conv_out, _norm(unet.conv_norm_out, features)).x


def _run(layer: list[Any], features: Features, time: Tensor, wanted: bool) -> Features:
    """Runs a layer's parts; each but the last is followed by a norm, and the last where its moments are wanted."""
    for part in layer:
        features = part(features, time, wanted or part is not layer[-1])
    return features


def _convolve(layer: Any, x: Tensor, **what: Any) -> Features:
    """Runs a convolution with its bias; moments are there where groups are named."""
    out, moments = convolution(x, layer.weight, layer.bias, **what)
    return Features(out, moments if "num_groups" in what else None)


def _norm(norm: Any, features: Features) -> Tensor:
    if features.moments is None:
        return norm(features.x)
    return normalise(features.x, features.moments, norm.weight, norm.bias, norm.eps, norm.silu)


def _tokens(x: Tensor) -> Tensor:
    """Views channels_last [B, C, h, w] as [B, h w, C]."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _as_map(tokens: Tensor, like: Tensor) -> Tensor:
    """Views [B, h w, C] as channels_last [B, C, h, w], of the height and width of `like`."""
    return tokens.view(like.shape[0], *like.shape[2:], -1).permute(0, 3, 1, 2)
