"""Building blocks of the UNet. Parameter names are those of diffusers' UNet2DConditionModel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmseg_fast.kernels.group_norm_silu import group_norm_silu
from ldmseg_fast.models.attention import attention


def timestep_embedding(timesteps: Tensor, channels: int) -> Tensor:
    """Sinusoids of `timesteps` [B]: [B, channels], cosines first (Vaswani et al. 2017, section 3.5; SD's order)."""
    half = channels // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=timesteps.device) * (-math.log(10_000.0) / half)
    )
    angles = timesteps[:, None].float() * frequencies  # [B, channels / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class GroupNormSiLU(nn.GroupNorm):
    """GroupNorm, then SiLU in the same pass."""

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w]
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)


class TimestepMLP(nn.Module):
    def __init__(self, channels: int, embed_channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, embed_channels)
        self.linear_2 = nn.Linear(embed_channels, embed_channels)

    def forward(self, x: Tensor) -> Tensor:  # [B, C] -> [B, E]
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """Two convolutions around the time embedding, with a shortcut (He et al. 2016; Ho et al. 2020, appendix B)."""

    def __init__(self, in_channels: int, out_channels: int, embed_channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(embed_channels, out_channels) if embed_channels else None
        self.time_slice: slice | None = None  # of all blocks' projections; set by UNet.fuse_time for inference
        self.norm2 = GroupNormSiLU(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x [B, C, h, w], time [B, E] (SiLU applied by the caller, once for all blocks), or the projections of all
        blocks side by side where `time_slice` tells which are this one's."""
        hidden = self.conv1(self.norm1(x))
        if self.time_slice is not None and time is not None:
            hidden = hidden + time[:, self.time_slice, None, None]
        elif self.time_emb_proj is not None and time is not None:
            hidden = hidden + self.time_emb_proj(time)[:, :, None, None]
        hidden = self.conv2(self.norm2(hidden))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + hidden


class Attention(nn.Module):
    """Multi-head attention; keys and values from `context` where it is given."""

    def __init__(self, channels: int, num_heads: int, context_channels: int = 0, backend: str = "auto") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend = backend
        context_channels = context_channels or channels
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.fused_qkv: Tensor | None = None  # [3 C, C]; set by UNet.fuse_qkv for inference

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        batch, tokens, channels = x.shape  # [B, N, C]
        if self.fused_qkv is not None and context is None:
            q, k, v = self.project_qkv(x).view(batch, tokens, 3, self.num_heads, -1).unbind(2)
        else:
            source = x if context is None else context
            q = self.to_q(x).view(batch, tokens, self.num_heads, -1)
            k = self.to_k(source).view(batch, source.shape[1], self.num_heads, -1)
            v = self.to_v(source).view(batch, source.shape[1], self.num_heads, -1)
        out = attention(q, k, v, self.backend)  # [B, N, heads, d]
        return self.to_out[0](out.reshape(batch, tokens, channels))

    def project_qkv(self, x: Tensor) -> Tensor:
        """q, k and v of x [B, N, C] in one product, [B, N, 3 C]; only where `fused_qkv` is set."""
        assert self.fused_qkv is not None
        return F.linear(x, self.fused_qkv)


class GEGLU(nn.Module):
    """x W1 * gelu(x W2) (Shazeer 2020, equation 6)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, hidden * 2)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        # index 1 is diffusers' dropout, which has no parameters
        self.net = nn.ModuleList([GEGLU(channels, channels * 4), nn.Identity(), nn.Linear(channels * 4, channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    def __init__(self, channels: int, num_heads: int, context_channels: int, backend: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, num_heads, backend=backend)
        self.norm2 = nn.LayerNorm(channels) if context_channels else None
        self.attn2 = Attention(channels, num_heads, context_channels, backend) if context_channels else None
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:  # [B, N, C], [B, M, D]
        x = x + self.attn1(self.norm1(x))
        if self.attn2 is not None and self.norm2 is not None:
            x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer over the h*w cells of a feature map (Rombach et al. 2022, appendix E.2.1)."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        groups: int,
        num_layers: int = 1,
        context_channels: int = 0,
        linear_projection: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, num_heads, context_channels, backend) for _ in range(num_layers)
        )
        self.proj_out = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        batch, channels, height, width = x.shape
        hidden = self.norm(x)
        if not self.linear_projection:
            hidden = self.proj_in(hidden)
        hidden = hidden.permute(0, 2, 3, 1).reshape(batch, height * width, channels)  # [B, N, C]
        if self.linear_projection:
            hidden = self.proj_in(hidden)
        for block in self.transformer_blocks:
            hidden = block(hidden, context)
        if self.linear_projection:
            hidden = self.proj_out(hidden)
        hidden = hidden.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        if not self.linear_projection:
            hidden = self.proj_out(hidden)
        return x + hidden


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w] -> [B, C, h/2, w/2]
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w] -> [B, C, 2h, 2w]
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def numbered_tensors(state: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """Lists the tensors called `name` with 0, 1, 2, ... in the place of {}, up to the first that is missing."""
    names = map(name.format, itertools.count())
    return [state[found] for found in itertools.takewhile(state.__contains__, names)]
