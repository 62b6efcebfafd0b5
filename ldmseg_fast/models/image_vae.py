"""Defines the image encoders: uint8 pictures -> `image_latents`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmseg_fast.config import ImageEncoderConfig
from ldmseg_fast.config.values import shown
from ldmseg_fast.errors import ArgumentError, CheckpointError
from ldmseg_fast.models.attention import attention
from ldmseg_fast.models.conv_encoder import ConvEncoder, normalize, scaled
from ldmseg_fast.models.layers import GroupNorm, GroupNormSiLU, ResnetBlock, numbered_tensors
from ldmseg_fast.models.pyramids import PyramidEncoder


class _TaesdBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        convs = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class TaesdEncoder(nn.Module):
    """Encodes pictures as Stable Diffusion's VAE does, by a distilled network: TAESD.

    It takes pictures in [0, 1] (https://github.com/madebyollin/taesd, MIT). Its latents are used as they are:
    `scaling_factor` is 1.
    """

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = 64
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), _TaesdBlock(width)]
        for _ in range(3):
            layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False))
            layers += [_TaesdBlock(width) for _ in range(3)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, config.latent_channels, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        """Encodes uint8 [B, 3, H, W] as float [B, 4, H/8, W/8]."""
        return scaled(self.layers((images.float() / 255.0).to(next(self.parameters()).dtype)), self.config)


class _KLAttention(nn.Module):
    """One head over all cells, with its own norm and shortcut."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w]
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, N, C]
        q, k, v = (layer(tokens)[:, :, None] for layer in (self.to_q, self.to_k, self.to_v))  # [B, N, 1, C]
        out = self.to_out[0](attention(q, k, v)[:, :, 0])
        return x + out.transpose(1, 2).reshape(x.shape)


class _KLDownsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as Esser et al. 2021 trained it


class _KLDownBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, downsample: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * layers
        self.resnets = nn.ModuleList(ResnetBlock(a, b, 0, groups, 1e-6) for a, b in itertools.pairwise(widths))
        if downsample:
            self.downsamplers = nn.ModuleList([_KLDownsample(out_channels)])
        self.has_downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return self.downsamplers[0](x) if self.has_downsample else x


class _KLMidBlock(nn.Module):
    def __init__(self, channels: int, groups: int, has_attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, 0, groups, 1e-6) for _ in range(2))
        if has_attention:
            self.attentions = nn.ModuleList([_KLAttention(channels, groups)])
        self.has_attention = has_attention

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        return self.resnets[1](self.attentions[0](x) if self.has_attention else x)


class _KLEncoderNetwork(nn.Module):
    """[B, 3, H, W] -> moments [B, 2 C, H/f, W/f]. Parameter names are those of diffusers' `Encoder`."""

    def __init__(self, vae: dict) -> None:
        super().__init__()
        widths, groups = vae["block_out_channels"], vae["norm_num_groups"]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(vae["in_channels"], widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            _KLDownBlock(widths[max(level - 1, 0)], width, vae["layers_per_block"], groups, level < last)
            for level, width in enumerate(widths)
        )
        self.mid_block = _KLMidBlock(widths[-1], groups, vae["mid_block_add_attention"])
        self.conv_norm_out = GroupNormSiLU(groups, widths[-1], 1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * vae["latent_channels"], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x)))


class KLEncoder(nn.Module):
    """Encodes pictures by the encoder of diffusers' `AutoencoderKL` (Rombach et al. 2022, appendix G).

    Args:
        config: `scaling_factor` multiplies the latents.
        vae_config: diffusers' `config.json`; default Stable Diffusion's.

    Raises:
        ArgumentError: settings that this encoder does not have; the message names them.
    """

    def __init__(self, config: ImageEncoderConfig, vae_config: dict | None = None) -> None:
        super().__init__()
        self.config = config
        self.vae_config = dict(vae_config or SD_VAE_CONFIG)
        vae = KL_DEFAULTS | self.vae_config
        vae["down_block_types"] = sorted(set(vae["down_block_types"]))
        wrong = [f"{key}={shown(vae[key])}" for key, value in KL_REQUIRED.items() if vae.get(key, value) != value]
        if wrong:
            raise ArgumentError(f"image VAE: {', '.join(wrong)}: only Stable Diffusion's AutoencoderKL is known")
        self.encoder = _KLEncoderNetwork(vae)
        channels = 2 * vae["latent_channels"]
        self.quant_conv = nn.Conv2d(channels, channels, 1) if vae["use_quant_conv"] else None

    def forward(self, images: Tensor) -> Tensor:
        """Encodes uint8 [B, 3, H, W] as the posterior's mean times `scaling_factor`, float [B, C, H/f, W/f]."""
        moments = self.encoder(normalize(images, self.encoder.conv_in.weight.dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return scaled(moments.chunk(2, dim=1)[0], self.config)


# diffusers' defaults of AutoencoderKL, and what its encoder must be
KL_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
}
KL_REQUIRED: dict[str, Any] = {
    "in_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}

# AutoencoderKL of Stable Diffusion 1.x and 2.x
SD_VAE_CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
}


def kl_config(found: Mapping[str, Any]) -> dict[str, Any]:
    """Completes what `structure_from_state` found to diffusers' configuration of an AutoencoderKL."""
    levels = len(found["block_out_channels"])
    types = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    return SD_VAE_CONFIG | dict(found) | types


def build_image_encoder(config: ImageEncoderConfig, vae_config: dict | None = None) -> nn.Module:
    """Builds the encoder that `config.kind` names, with fresh weights.

    Args:
        config: of the encoder.
        vae_config: "autoencoder_kl" only, diffusers' config.json; default Stable Diffusion's.

    Raises:
        ArgumentError: a `vae_config` that is not Stable Diffusion's kind.
    """
    if config.kind == "conv":
        return ConvEncoder(config)
    if config.kind == "taesd":
        return TaesdEncoder(config)
    if config.is_pyramid:
        return PyramidEncoder(config)
    return KLEncoder(config, vae_config)


OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def modern_attention_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gives the tensors of a diffusers AutoencoderKL today's names; any shape and dtype.

    Stable Diffusion 1.x's files call the attention's layers query, key, value and proj_attn.
    """
    renamed = {}
    for key, value in state.items():
        parts = key.split(".")
        if "attentions" in parts and parts[-2] in OLD_ATTENTION_NAMES:
            key = ".".join([*parts[:-2], OLD_ATTENTION_NAMES[parts[-2]], parts[-1]])
        if "attentions" in parts and value.ndim == 4 and value.shape[2:] == (1, 1):
            value = value[:, :, 0, 0]  # older still: 1x1 convolutions
        renamed[key] = value
    return renamed


def structure_from_state(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Reads the settings of diffusers' `AutoencoderKL` off its tensors, any shape and dtype, under today's names.

    Norm groups are not in the tensors.

    Raises:
        CheckpointError: tensors that make no AutoencoderKL.
    """
    convolutions = numbered_tensors(state, "encoder.down_blocks.{}.resnets.0.conv1.weight")
    widths = [weight.shape[0] for weight in convolutions if weight.ndim == 4]
    moments = state.get("encoder.conv_out.weight")
    if not widths or moments is None or moments.ndim != 4:
        raise CheckpointError("no AutoencoderKL: encoder.down_blocks.* and encoder.conv_out.weight expected")
    return {
        "block_out_channels": widths,
        "layers_per_block": len(numbered_tensors(state, "encoder.down_blocks.0.resnets.{}.conv1.weight")),
        "latent_channels": moments.shape[0] // 2,
    }
