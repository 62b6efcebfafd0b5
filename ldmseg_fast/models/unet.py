"""Defines the denoiser: Stable Diffusion's UNet without (or with) cross-attention.

Parameter names and arithmetic are those of diffusers' `UNet2DConditionModel`, so its checkpoints load. It is written to
be compiled and exported: nothing in `forward` depends on data, and attention stands behind one function.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldmseg_fast.config import UNetConfig
from ldmseg_fast.errors import ArgumentError, CheckpointError
from ldmseg_fast.models.layers import (
    Attention,
    Downsample,
    GroupNormSiLU,
    ResnetBlock,
    SpatialTransformer,
    TimestepMLP,
    Upsample,
    numbered_tensors,
    timestep_embedding,
)


class Block(nn.Module):
    """Holds one resolution: residual blocks, each with its transformer where the level has attention."""

    def __init__(self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.has_attention = bool(attentions)

    def layer(self, index: int, x: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
        """Runs the residual block and transformer at `index`: x float [B, C, h, w] to [B, C_out, h, w].

        time: [B, E], see `ResnetBlock.forward`; context: [B, M, D] or None.
        """
        x = self.resnets[index](x, time)
        return self.attentions[index](x, context) if self.has_attention else x


class DownBlock(Block):
    """Holds one resolution of the down path, and the step to the next."""

    def __init__(
        self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module], downsample: Downsample | None
    ) -> None:
        super().__init__(resnets, attentions)
        if downsample is not None:
            self.downsamplers = nn.ModuleList([downsample])
        self.has_downsample = downsample is not None


class UpBlock(Block):
    """Holds one resolution of the up path, and the step to the next."""

    def __init__(
        self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module], upsample: Upsample | None
    ) -> None:
        super().__init__(resnets, attentions)
        if upsample is not None:
            self.upsamplers = nn.ModuleList([upsample])
        self.has_upsample = upsample is not None


class MidBlock(nn.Module):
    """Holds the lowest resolution: residual block, transformer where there is one, residual block."""

    def __init__(self, first: ResnetBlock, attention: SpatialTransformer | None, second: ResnetBlock) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([first, second])
        if attention is not None:
            self.attentions = nn.ModuleList([attention])
        self.has_attention = attention is not None

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
        """Maps float [B, C, h, w] to the same shape; time: [B, E], context: [B, M, D] or None."""
        x = self.resnets[0](x, time)
        if self.has_attention:
            x = self.attentions[0](x, context)
        return self.resnets[1](x, time)


class SeparateConvIn(nn.Module):
    """Convolves each part of the input by itself and adds up: noisy latents, image latents (, condition)."""

    def __init__(self, channels: list[int], out_channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.parts = nn.ModuleList(nn.Conv2d(part, out_channels, 3, padding=1) for part in channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps float [B, C_in, h, w] to [B, C_out, h, w]."""
        parts = x.split(self.channels, dim=1)
        out = self.parts[0](parts[0])
        for conv, part in zip(self.parts[1:], parts[1:]):
            out = out + conv(part)
        return out


class FeatureCache:
    """Keeps what evaluations of one sampling loop share.

    That is the features that come up from below the `branch`-th skip connection, counted from the outermost (DeepCache:
    Ma et al. 2023, section 3.2). An evaluation that finds `features`, float [B, C, h, w], computes what lies above them
    alone; one that finds None leaves them here.
    """

    def __init__(self, branch: int) -> None:
        self.branch = branch
        self.features: Tensor | None = None


class UNet(nn.Module):
    """Predicts noise, sample or velocity of `mask_latents` from the noisy latents, the image and its own estimate.

    Args:
        config: widths, heads, attention levels; the defaults are SD 1.4's.
        attention: backend of every attention layer (`models.attention.BACKENDS`).
    """

    def __init__(self, config: UNetConfig, attention: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.fused_time: tuple[Tensor, Tensor] | None = None  # weight and bias; set by `fuse_time` for inference
        widths, groups, eps = config.block_out_channels, config.norm_groups, config.norm_eps
        embed = widths[0] * 4

        def resnet(in_channels: int, out_channels: int) -> ResnetBlock:
            return ResnetBlock(in_channels, out_channels, embed, groups, eps)

        def transformer(level: int) -> SpatialTransformer:
            return SpatialTransformer(
                widths[level],
                config.num_heads[level],
                groups,
                config.transformer_layers,
                config.cross_attention_dim,
                config.linear_projection,
                attention,
            )

        if config.separate_conv_in:
            self.conv_in: nn.Module = SeparateConvIn(input_parts(config), widths[0])
        else:
            self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepMLP(widths[0], embed)

        last = len(widths) - 1

        def down_path() -> tuple[nn.ModuleList, list[int]]:
            """Blocks, and the channels of what they hand to the up path."""
            blocks, channels, skips = nn.ModuleList(), widths[0], [widths[0]]
            for level, width in enumerate(widths):
                resnets, transformers = [], []
                for _ in range(config.layers_per_block):
                    resnets.append(resnet(channels, width))
                    transformers += [transformer(level)] if config.attention[level] else []
                    channels = width
                    skips.append(channels)
                skips += [channels] if level < last else []
                blocks.append(DownBlock(resnets, transformers, Downsample(width) if level < last else None))
            return blocks, skips

        self.down_blocks, skips = down_path()
        self.num_skips = len(skips)
        channels = widths[-1]
        if config.separate_image_encoder:
            self.image_conv_in = nn.Conv2d(config.image_channels, widths[0], 3, padding=1)
            self.image_down_blocks, _ = down_path()
            # zero at the start, so that a pre-trained UNet begins undisturbed (Zhang et al. 2023, section 3.1)
            self.image_projections = nn.ModuleList(nn.Conv2d(width, width, 1) for width in skips)
            for parameter in self.image_projections.parameters():
                nn.init.zeros_(parameter)

        mid_transformer = transformer(last) if config.mid_attention else None
        self.mid_block = MidBlock(resnet(channels, channels), mid_transformer, resnet(channels, channels))

        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            resnets, transformers = [], []
            for _ in range(config.layers_per_block + 1):
                resnets.append(resnet(channels + skips.pop(), widths[level]))
                transformers += [transformer(level)] if config.attention[level] else []
                channels = widths[level]
            self.up_blocks.append(UpBlock(resnets, transformers, Upsample(channels) if level else None))

        self.conv_norm_out = GroupNormSiLU(groups, channels, eps)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)

    def forward(
        self, sample: Tensor, timesteps: Tensor, context: Tensor | None = None, cache: FeatureCache | None = None
    ) -> Tensor:
        """Evaluates the denoiser once.

        Args:
            sample: float [B, in_channels, h, w]: noisy mask latents, image latents (, condition), in that order.
            timesteps: integer [B], from 0 to num_train_timesteps - 1.
            context: float [B, M, cross_attention_dim] where the configuration has cross-attention.
            cache: for sampling only.

        Returns:
            float [B, out_channels, h, w], in the type of `sample`.

        Raises:
            ArgumentError: no `context` where the configuration has cross-attention.
        """
        if self.config.cross_attention_dim and context is None:
            raise ArgumentError(f"unet.conditioning={self.config.conditioning}: the UNet needs `context` for it")
        return self.denoise(sample, self.embed_time(timesteps, sample.dtype), context, cache)

    def embed_time(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """Computes what the blocks see of the timesteps, integer [B]: `dtype` [B, E], or `fuse_time`'s projections.

        It depends on nothing else, so that a sampler computes it once for all steps.
        """
        time = timestep_embedding(timesteps, self.config.block_out_channels[0]).to(dtype)
        time = F.silu(self.time_embedding(time))
        return time if self.fused_time is None else self.project_time(time)

    def denoise(
        self, sample: Tensor, time: Tensor, context: Tensor | None = None, cache: FeatureCache | None = None
    ) -> Tensor:
        """Evaluates from the time on that `embed_time` returned, float [B, E].

        The other arguments and the result are `forward`'s: [B, in_channels, h, w] to [B, out_channels, h, w].
        """
        branch = -1 if cache is None else cache.branch
        features = None if cache is None else cache.features
        needed = None if features is None else branch + 1
        skips = self._down(self.conv_in(sample), self.down_blocks, time, context, needed)
        if self.config.separate_image_encoder:
            image_latents = sample.split(input_parts(self.config), dim=1)[1]
            image_features = self._down(
                self.image_conv_in(image_latents), self.image_down_blocks, time, context, needed
            )
            projected = [layer(feature) for layer, feature in zip(self.image_projections, image_features)]
            skips = [skip + feature for skip, feature in zip(skips, projected)]

        x = self.mid_block(skips[-1], time, context) if features is None else features

        block: Any
        place = self.num_skips
        for block in self.up_blocks:
            for index in range(len(block.resnets)):
                place -= 1  # of the skip connection that ends in this layer
                if features is not None and place > branch:
                    continue
                if cache is not None and place == branch:
                    cache.features = x
                x = self._layer(block, index, torch.cat([x, skips.pop()], dim=1), time, context)
            if block.has_upsample and (features is None or place <= branch):
                x = block.upsamplers[0](x)
        return self.conv_out(self.conv_norm_out(x))

    def _down(
        self, x: Tensor, blocks: Iterable[Any], time: Tensor, context: Tensor | None, needed: int | None = None
    ) -> list[Tensor]:
        """What the up path needs of a down path, from x [B, C, h, w] itself to the deepest features, or to the
        `needed`-th."""
        skips = [x]
        for block in blocks:
            for index in range(len(block.resnets)):
                if len(skips) == needed:
                    return skips
                skips.append(self._layer(block, index, skips[-1], time, context))
            if block.has_downsample and len(skips) != needed:
                skips.append(block.downsamplers[0](skips[-1]))
        return skips

    def _layer(self, block: Block, index: int, x: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
        if self.checkpointing and self.training:
            return checkpoint(block.layer, index, x, time, context, use_reentrant=False)
        return block.layer(index, x, time, context)

    def fuse_qkv(self) -> None:
        """Prepares for inference: one product makes q, k and v of each self-attention.

        The weights must not change after.
        """
        for module in self.modules():
            if isinstance(module, Attention) and module.to_k.in_features == module.to_q.in_features:
                weights = [module.to_q.weight, module.to_k.weight, module.to_v.weight]
                module.fused_qkv = torch.cat([weight.detach() for weight in weights])

    def fuse_time(self) -> None:
        """Prepares for inference: one product projects the time embedding for every block.

        The weights must not change after.
        """
        blocks: list[Any] = [module for module in self.modules() if isinstance(module, ResnetBlock)]
        projections = [block.time_emb_proj for block in blocks]
        start = 0
        for block, projection in zip(blocks, projections):
            block.time_slice = slice(start, start + projection.out_features)
            start += projection.out_features
        weight = torch.cat([projection.weight.detach() for projection in projections])
        self.fused_time = weight, torch.cat([projection.bias.detach() for projection in projections])

    def unfuse(self) -> None:
        """Undoes `fuse_qkv` and `fuse_time`."""
        self.fused_time = None
        for module in self.modules():
            if isinstance(module, Attention):
                module.fused_qkv = None
            elif isinstance(module, ResnetBlock):
                module.time_slice = None

    def project_time(self, time: Tensor) -> Tensor:
        """Projects time float [B, E] for all blocks, side by side: [B, sum of C]; only where `fused_time` is set."""
        assert self.fused_time is not None
        return F.linear(time, *self.fused_time)


def input_parts(config: UNetConfig) -> list[int]:
    """Lists the channels of the input's parts: noisy latents, image latents (, condition)."""
    condition = config.in_channels - config.out_channels - config.image_channels
    return [config.out_channels, config.image_channels] + ([condition] if condition else [])


def structure_from_state(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Reads the fields of `UNetConfig` off the tensors, any shape and dtype, of a UNet without cross-attention.

    Head counts, norm groups and norm_eps are not in the tensors.

    Raises:
        CheckpointError: tensors that make no UNet.
    """
    convolutions = numbered_tensors(state, "down_blocks.{}.resnets.0.conv1.weight")
    widths = [weight.shape[0] for weight in convolutions if weight.ndim == 4]
    ends = [state[name] for name in ("conv_in.weight", "conv_out.weight") if name in state]
    if not widths or [weight.ndim for weight in ends] != [4, 4]:
        raise CheckpointError("no UNet: conv_in.weight, conv_out.weight and down_blocks.* expected")
    projections = [value for key, value in state.items() if key.endswith("proj_in.weight")]
    blocks = {key.split("transformer_blocks.")[1].split(".")[0] for key in state if "transformer_blocks." in key}
    return {
        "block_out_channels": tuple(widths),
        "attention": tuple(f"down_blocks.{level}.attentions.0.norm.weight" in state for level in range(len(widths))),
        "layers_per_block": len(numbered_tensors(state, "down_blocks.0.resnets.{}.conv1.weight")),
        "transformer_layers": len(blocks) or 1,
        "linear_projection": bool(projections) and projections[0].ndim == 2,
        "mid_attention": any(key.startswith("mid_block.attentions.") for key in state),
        "in_channels": ends[0].shape[1],
        "out_channels": ends[1].shape[0],
    }
