"""The UNet as a GPU runs it with few launches: the same weights and, within rounding, the same results.

A convolution's bias costs PyTorch a launch of its own, and so do additions. Here a bias is not added where it arises:
it travels beside the features as a vector that is still to be added, until an operation takes it in passing. Group and
layer normalisation add it before their statistics, a 1x1 convolution or product turns it into a bias of its own, and
the next sum goes on with both. Sums of features are products that accumulate in place. All these vectors are constants
of the weights, so they are computed once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmseg_fast.config import UNetConfig
from ldmseg_fast.kernels.added_layer_norm import added_layer_norm
from ldmseg_fast.kernels.geglu import geglu
from ldmseg_fast.models.attention import attention
from ldmseg_fast.models.layers import ResnetBlock, SpatialTransformer, TransformerBlock
from ldmseg_fast.models.unet import FeatureCache, UNet

Pending = Tensor | None  # float32 [C]: what is still to be added to every cell of some features


def why_not_fused(config: UNetConfig) -> str:
    """Says what of a configuration `FusedUNet` does not have; empty where it has all."""
    if config.cross_attention_dim:
        return f"unet.conditioning={config.conditioning}: it has no cross-attention"
    return "unet.separate_image_encoder=true: it has one down path" if config.separate_image_encoder else ""


class FusedResnet:
    """Runs a `ResnetBlock` whose input lacks `pending`; `pending` of it is what its output lacks."""

    def __init__(self, block: ResnetBlock, pending: Pending) -> None:
        self.block = block
        self.added = pending
        self.pending: Pending
        self.shortcut: Tensor | None = None  # [C_in, C_out]
        if block.conv_shortcut is not None:
            weight = block.conv_shortcut.weight.flatten(1)  # [C_out, C_in]
            self.shortcut = weight.t()
            pending = _sum(block.conv_shortcut.bias, _through(weight, pending))
        self.pending = _sum(block.conv2.bias, pending)

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        """Maps x float [B, C, h, w] to [B, C_out, h, w], a new tensor; time: all blocks' projections, with biases."""
        block = self.block
        hidden = F.conv2d(_norm(block.norm1, x, self.added), block.conv1.weight, padding=1)
        assert block.time_slice is not None
        hidden = block.norm2(hidden, time[:, block.time_slice])
        hidden = F.conv2d(hidden, block.conv2.weight, padding=1)
        if self.shortcut is None:
            return hidden.add_(x)
        _rows(hidden).addmm_(_rows(x), self.shortcut)
        return hidden


class FusedTransformer:
    """Runs a `SpatialTransformer` in place; names as in `FusedResnet`."""

    def __init__(self, module: SpatialTransformer, pending: Pending) -> None:
        self.module = module
        self.added = pending
        self.into, self.out = (layer.weight.flatten(1) for layer in (module.proj_in, module.proj_out))
        self.blocks: list[tuple[TransformerBlock, Pending, Pending]] = []
        carried: Pending = None
        block: Any
        for block in module.transformer_blocks:
            attended = _sum(block.attn1.to_out[0].bias, carried)
            self.blocks.append((block, carried, attended))
            carried = _sum(block.ff.net[2].bias, attended)
        self.pending: Pending = _sum(_sum(module.proj_out.bias, _through(self.out, carried)), pending)

    def __call__(self, x: Tensor) -> Tensor:
        """Changes x, float [B, C, h, w], and returns it."""
        batch, channels, height, width = x.shape
        hidden = F.linear(_rows(_norm(self.module.norm, x, self.added)), self.into, self.module.proj_in.bias)
        block: Any
        for block, before, attended in self.blocks:
            tokens = _layer_norm(block.norm1, hidden, before)
            qkv = F.linear(tokens, block.attn1.fused_qkv)
            q, k, v = qkv.view(batch, height * width, 3, block.attn1.num_heads, -1).unbind(2)
            out = attention(q, k, v, block.attn1.backend).reshape(-1, channels)
            hidden.addmm_(out, block.attn1.to_out[0].weight.t())
            gate, last = block.ff.net[0].proj, block.ff.net[2]
            tokens = _layer_norm(block.norm3, hidden, attended)
            hidden.addmm_(geglu(F.linear(tokens, gate.weight, gate.bias)), last.weight.t())
        _rows(x).addmm_(hidden, self.out.t())
        return x


class FusedUNet:
    """Evaluates a `UNet` for inference. The weights must not change after.

    Args:
        unet: prepared by `fuse_qkv` and `fuse_time`, and of a configuration for which `why_not_fused` is empty.
    """

    resnet: type[FusedResnet] = FusedResnet
    transformer: type[FusedTransformer] = FusedTransformer

    @torch.no_grad()
    def __init__(self, unet: UNet) -> None:
        self.unet = unet
        conv_in: Any = unet.conv_in
        pending: Pending = None
        self.bare_input = isinstance(conv_in, nn.Conv2d)  # `SeparateConvIn` adds its own biases
        if self.bare_input:
            pending = self._bias_of(conv_in)
        skips = [pending]
        block: Any
        self.down: list[tuple[list[Any], Pending, nn.Conv2d | None]] = []
        for block in unet.down_blocks:
            layers = []
            for index in range(len(block.resnets)):
                layers.append(self._fuse_layer(block, index, skips[-1]))
                skips.append(layers[-1][-1].pending)
            downsample = block.downsamplers[0].conv if block.has_downsample else None
            due = None
            if downsample is not None:  # its zeros at the border are to be zeros: nothing may be pending there
                due, skips[-1] = skips[-1], None
                skips.append(self._bias_of(downsample))
            self.down.append((layers, due, downsample))

        mid: Any = unet.mid_block
        self.mid: list[Any] = [self.resnet(mid.resnets[0], skips[-1])]
        if mid.has_attention:
            self.mid.append(self.transformer(mid.attentions[0], self.mid[-1].pending))
        self.mid.append(self.resnet(mid.resnets[1], self.mid[-1].pending))
        pending = self.mid[-1].pending

        self.up: list[tuple[list[Any], Pending, nn.Conv2d | None]] = []
        for block in unet.up_blocks:
            layers = []
            for index in range(len(block.resnets)):
                joined = _join(pending, skips.pop(), block.resnets[index].norm1.num_channels)
                layers.append(self._fuse_layer(block, index, joined))
                pending = layers[-1][-1].pending
            upsample = block.upsamplers[0].conv if block.has_upsample else None
            self.up.append((layers, pending if upsample is not None else None, upsample))
            pending = pending if upsample is None else self._bias_of(upsample)
        self.pending = pending
        blocks: list[Any] = [module for module in unet.modules() if isinstance(module, ResnetBlock)]
        self.time_bias = torch.cat([block.conv1.bias for block in blocks]).float()  # in the order of `fuse_time`

    def _fuse_layer(self, block: Any, index: int, pending: Pending) -> list[Any]:
        layer: list[Any] = [self.resnet(block.resnets[index], pending)]
        if block.has_attention:
            layer.append(self.transformer(block.attentions[index], layer[0].pending))
        return layer

    def _bias_of(self, convolution: Any) -> Pending:
        """Says what is pending of features that a convolution outside the blocks makes."""
        return convolution.bias.float()

    @torch.no_grad()
    def __call__(
        self, sample: Tensor, timesteps: Tensor, context: Tensor | None = None, cache: FeatureCache | None = None
    ) -> Tensor:
        """See `UNet.forward`: [B, in_channels, h, w] to [B, out_channels, h, w]. A cache is left to the plain UNet."""
        if cache is not None:
            return self.unet(sample, timesteps, context, cache)
        return self.denoise(sample, self.embed_time(timesteps, sample.dtype))

    @torch.no_grad()
    def embed_time(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """Computes all blocks' projections of timesteps, integer [B], with the first convolutions' biases.

        Returns:
            float32 [B, sum of C].
        """
        return self.unet.embed_time(timesteps, dtype).float() + self.time_bias

    @torch.no_grad()
    def denoise(self, sample: Tensor, time: Tensor) -> Tensor:
        """Evaluates from the time on that `embed_time` returned; float [B, C, h, w] as `UNet.denoise`."""
        unet = self.unet
        conv_in: Any = unet.conv_in
        skips = [F.conv2d(sample, conv_in.weight, padding=1) if self.bare_input else conv_in(sample)]
        for layers, due, downsample in self.down:
            for layer in layers:
                skips.append(_run(layer, skips[-1], time))
            if downsample is not None:
                _settle(skips[-1], due)
                skips.append(F.conv2d(skips[-1], downsample.weight, stride=2, padding=1))
        x = _run(self.mid, skips[-1], time)
        for layers, due, upsample in self.up:
            for layer in layers:
                x = _run(layer, torch.cat([x, skips.pop()], dim=1), time)
            if upsample is not None:
                _settle(x, due)
                x = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), upsample.weight, padding=1)
        return unet.conv_out(_norm(unet.conv_norm_out, x, self.pending))


def _run(layer: list[Any], x: Tensor, time: Tensor) -> Tensor:
    for part in layer:
        x = part(x, time) if isinstance(part, FusedResnet) else part(x)
    return x


def _settle(x: Tensor, pending: Pending) -> None:
    if pending is not None:
        x.add_(pending[:, None, None])


def _rows(x: Tensor) -> Tensor:
    """Views channels_last [B, C, h, w] as [B h w, C]; the view shares its memory."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def _norm(norm: Any, x: Tensor, pending: Pending) -> Tensor:
    return norm(x, None if pending is None else pending.expand(x.shape[0], -1))


def _layer_norm(norm: nn.LayerNorm, x: Tensor, pending: Pending) -> Tensor:
    return added_layer_norm(x, pending, norm.weight, norm.bias, norm.eps)


def _sum(bias: Tensor | None, other: Pending) -> Tensor:
    """Adds a layer's bias to a pending vector."""
    assert bias is not None
    return bias.float() if other is None else bias.float() + other


def _through(weight: Tensor, pending: Pending) -> Pending:
    """What a product by `weight`, [C_out, C_in], makes of a pending vector."""
    return None if pending is None else weight.float() @ pending


def _join(first: Pending, second: Pending, channels: int) -> Pending:
    """What is pending of features beside each other, of `channels` in all."""
    if first is None and second is not None:
        first = second.new_zeros(channels - len(second))
    if second is None and first is not None:
        second = first.new_zeros(channels - len(first))
    return None if first is None or second is None else torch.cat([first, second])
