"""Defines the building blocks of the UNet. Parameter names are those of diffusers' UNet2DConditionModel."""

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
    """Embeds timesteps [B] as sinusoids float32 [B, channels], cosines first (Vaswani et al. 2017, section 3.5)."""
    half = channels // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=timesteps.device) * (-math.log(10_000.0) / half)
    )
    angles = timesteps[:, None].float() * frequencies  # [B, channels / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class GroupNorm(nn.GroupNorm):
    """Normalises groups of channels (Wu & He 2018) by our kernel, which keeps channels_last."""

    silu = False

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Maps float [B, C, h, w] to the same shape; `added`, [B, C], is added to all cells first."""
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, silu=self.silu, added=added)


class GroupNormSiLU(GroupNorm):
    """Normalises as `GroupNorm`, and applies SiLU in the same pass."""

    silu = True


class TimestepMLP(nn.Module):
    """Maps a timestep's sinusoids to the embedding that all residual blocks see (Ho et al. 2020, appendix B)."""

    def __init__(self, channels: int, embed_channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, embed_channels)
        self.linear_2 = nn.Linear(embed_channels, embed_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps float [B, C] to [B, E]."""
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """Runs two convolutions around the time embedding, with a shortcut (He et al. 2016; Ho et al. 2020, appendix B)."""

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
        """Maps x float [B, C, h, w] to [B, C_out, h, w].

        The caller has applied SiLU to time [B, E], once for all blocks. Where `time_slice` is set, time holds the
        projections of all blocks side by side, and the slice is this one's.
        """
        hidden = self.conv1(self.norm1(x))
        added = None
        if self.time_slice is not None and time is not None:
            added = time[:, self.time_slice]
        elif self.time_emb_proj is not None and time is not None:
            added = self.time_emb_proj(time)
        hidden = self.conv2(self.norm2(hidden, added))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + hidden


class Attention(nn.Module):
    """Attends with several heads (Vaswani et al. 2017, section 3.2.2), to `context` where it is given."""

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
        """Maps tokens float [B, N, C] to the same shape; context: [B, M, D]."""
        batch, tokens, channels = x.shape  # [B, N, C]
        if self.fused_qkv is not None and context is None:
            parts = self.project_qkv(x).chunk(3, dim=-1)  # as a graph quantises them: each of its own range
            q, k, v = (part.view(batch, tokens, self.num_heads, -1) for part in parts)
        else:
            source = x if context is None else context
            q = self.to_q(x).view(batch, tokens, self.num_heads, -1)
            k = self.to_k(source).view(batch, source.shape[1], self.num_heads, -1)
            v = self.to_v(source).view(batch, source.shape[1], self.num_heads, -1)
        out = attention(q, k, v, self.backend)  # [B, N, heads, d]
        return self.to_out[0](out.reshape(batch, tokens, channels))

    def project_qkv(self, x: Tensor) -> Tensor:
        """Projects x float [B, N, C] to q, k and v in one product, [B, N, 3 C]; only where `fused_qkv` is set."""
        assert self.fused_qkv is not None
        return F.linear(x, self.fused_qkv)


class GEGLU(nn.Module):
    """Computes x W1 * gelu(x W2) (Shazeer 2020, equation 6)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, hidden * 2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps float [..., C] to [..., hidden]."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Maps each token through a hidden layer of four times its width, gated by `GEGLU`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # index 1 is diffusers' dropout, which has no parameters
        self.net = nn.ModuleList([GEGLU(channels, channels * 4), nn.Identity(), nn.Linear(channels * 4, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Maps float [B, N, C] to the same shape."""
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Chains self-attention, cross-attention where there is a context, and a feed-forward layer, with shortcuts."""

    def __init__(self, channels: int, num_heads: int, context_channels: int, backend: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, num_heads, backend=backend)
        self.norm2 = nn.LayerNorm(channels) if context_channels else None
        self.attn2 = Attention(channels, num_heads, context_channels, backend) if context_channels else None
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Maps tokens float [B, N, C] to the same shape; context: [B, M, D] or None."""
        x = x + self.attn1(self.norm1(x))
        if self.attn2 is not None and self.norm2 is not None:
            x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Runs transformer blocks over the h*w cells of a feature map (Rombach et al. 2022, appendix E.2.1)."""

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
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, num_heads, context_channels, backend) for _ in range(num_layers)
        )
        self.proj_out = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Maps float [B, C, h, w] to the same shape; context: [B, M, D] or None."""
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
    """Halves height and width by a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps float [B, C, h, w] to [B, C, h/2, w/2]."""
        return self.conv(x)


class Upsample(nn.Module):
    """Doubles height and width by repetition, and convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps float [B, C, h, w] to [B, C, 2h, 2w]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def numbered_tensors(state: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """Lists the tensors, any shape and dtype, called `name` with 0, 1, ... for {}, up to the first that is missing."""
    names = map(name.format, itertools.count())
    return [state[found] for found in itertools.takewhile(state.__contains__, names)]
