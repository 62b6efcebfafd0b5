"""Defines the mask auto-encoder: bit planes -> latents -> slot logits (LDMSeg, arXiv 2401.10227, section 3.1).

Positions in the two Sequentials, and so parameter names, are those of the published checkpoints.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmseg_fast.config import MaskVAEConfig
from ldmseg_fast.errors import CheckpointError
from ldmseg_fast.models import posterior
from ldmseg_fast.models.layers import GroupNormSiLU, ResnetBlock
from ldmseg_fast.models.posterior import Posterior


class ChannelLayerNorm(nn.Module):
    """Normalises over the channels of [B, C, h, w] (Ba et al. 2016, LayerNorm)."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Maps float [B, C, h, w] to the same shape."""
        normed = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return normed.permute(0, 3, 1, 2)


class MidBlock(nn.Module):
    """Chains two residual blocks without time embedding and attention: diffusers' `UNetMidBlock2D`."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, 0, groups, 1e-6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Maps float [B, C, h, w] to the same shape."""
        for resnet in self.resnets:
            x = resnet(x)
        return x


class DecoderWithCategories(nn.Sequential):
    """Decodes latents to slot logits as the plain decoder does, and to category logits from its features.

    What a segment is needs fewer pixels than where it ends: categories branch off before the upscalers.

    Args:
        layers: of the plain decoder.
        branch: the place of the layer that sees what the category head sees.
        category_head: from features to category logits.
    """

    def __init__(self, layers: list[nn.Module], branch: int, category_head: nn.Sequential) -> None:
        super().__init__(*layers)
        self.branch = branch
        self.category_head = category_head

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Maps float [B, C, h, w] to logits [B, Q, h 2^u, w 2^u] and [B, categories + 1, h, w]."""
        *layers, category_head = self.children()
        for layer in layers[: self.branch]:
            latents = layer(latents)
        category_logits = category_head(latents)
        for layer in layers[self.branch :]:
            latents = layer(latents)
        return latents, category_logits


def _encoder(config: MaskVAEConfig, out_channels: int) -> nn.Sequential:
    coded = config.num_slots if config.codes == "hadamard" else config.num_bits
    widths, planes = config.widths, coded + config.category_bits
    layers: list[nn.Module] = [nn.Conv2d(planes, widths[0], 3, padding=1), nn.SiLU()]
    for width, next_width in itertools.pairwise(widths):
        # the first convolution of a pair has no activation after it
        layers += [
            nn.Conv2d(width, width, 3, padding=1),
            nn.Conv2d(width, next_width, 3, stride=2, padding=1),
            nn.SiLU(),
        ]
    width = config.middle_width or widths[-1]
    layers.append(nn.Conv2d(widths[-1], width, 3, padding=1))
    layers += [MidBlock(width, config.norm_groups) for _ in range(config.num_mid_blocks)] or [nn.Identity()]
    layers += [GroupNormSiLU(config.norm_groups, width, eps=1e-6), nn.Identity()]  # two places, as in released weights
    return nn.Sequential(*layers, nn.Conv2d(width, out_channels, 3, padding=1))


def _decoder(config: MaskVAEConfig) -> nn.Sequential:
    width = config.decoder_width
    layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, width, 3, padding=1)]
    layers.append(MidBlock(width, config.norm_groups) if config.num_mid_blocks else nn.Identity())
    branch = len(layers)
    for _ in range(config.num_upscalers):
        wide = config.upscale_width or config.decoder_width
        layers += [nn.ConvTranspose2d(width, wide, 2, stride=2), ChannelLayerNorm(wide), nn.SiLU()]
        width = wide
    layers += [GroupNormSiLU(config.norm_groups, width, eps=1e-5), nn.Identity()]
    layers.append(nn.Conv2d(width, config.num_slots, 3, padding=1))
    if not config.num_categories:
        return nn.Sequential(*layers)
    # 3x3 as the slots' head: one of 1x1 learned far more slowly, at equal steps, on scenes of version 2
    head = nn.Conv2d(config.decoder_width, config.num_categories + 1, 3, padding=1)
    norm = GroupNormSiLU(config.norm_groups, config.decoder_width, eps=1e-5)
    return DecoderWithCategories(layers, branch, nn.Sequential(norm, head))


class MaskVAE(nn.Module):
    """Encodes segment maps as latents, and decodes these to slot logits.

    Args:
        config: bits, slots, widths, bottleneck. The defaults are the released size.
    """

    def __init__(self, config: MaskVAEConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        encoder_channels = {"gaussian": 2 * channels, "gumbel": config.codebook_size}
        self.encoder = _encoder(config, encoder_channels.get(config.parametrization, channels))
        self.decoder = _decoder(config)
        if config.parametrization in ("discrete", "gumbel"):
            codebook = posterior.Codebook if config.parametrization == "discrete" else posterior.GumbelCodebook
            self.codebook = codebook(config.codebook_size, channels)

    def encode(self, bits: Tensor) -> Posterior:
        """Encodes bit planes float [B, K, H, W], -1 or +1 and 0 where void; K counts those of the categories too.

        Returns:
            The posterior of the unscaled latents [B, C, H/f, W/f]; f is `config.downsampling`.
        """
        moments = self.encoder(bits)
        if self.config.parametrization == "gaussian":
            return posterior.gaussian(moments)
        if self.config.parametrization == "auto":
            return posterior.point(moments, self.config.bottleneck)
        return self.codebook(moments)

    def encode_latents(self, bits: Tensor) -> Tensor:
        """Encodes bit planes float [B, K, H, W] as what diffusion sees, float [B, C, H/f, W/f].

        That is the posterior's mode times `scaling_factor` (Rombach et al. 2022, appendix G).
        """
        return self.encode(bits).mode() * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes unscaled latents float [B, C, h, w] to slot logits [B, Q, h 2^u, w 2^u], u being `num_upscalers`."""
        return self.decode_both(latents)[0]

    def decode_latents(self, mask_latents: Tensor) -> Tensor:
        """Decodes scaled latents float [B, C, h, w], as the sampler returns them; see `decode`."""
        return self.decode_latents_both(mask_latents)[0]

    def decode_both(self, latents: Tensor) -> tuple[Tensor, Tensor | None]:
        """Decodes unscaled latents float [B, C, h, w] to slot logits, as `decode` does, and category logits.

        Category logits are [B, categories + 1, h, w], 0 being void; None where the model has no categories.
        """
        logits = self.decoder(latents)
        if self.config.codes == "colours" and not torch.is_grad_enabled() and not logits.is_meta:
            logits = clusters(logits.float(), self.config.num_slots)
        return logits if self.config.num_categories else (logits, None)

    def decode_latents_both(self, mask_latents: Tensor) -> tuple[Tensor, Tensor | None]:
        """Decodes scaled latents float [B, C, h, w], as the sampler returns them; see `decode_both`.

        They get the decoder's dtype after the division: no half type need hold the factor.
        """
        latents = mask_latents / self.config.scaling_factor
        return self.decode_both(latents.to(next(self.decoder.parameters()).dtype))

    def upsample(self, logits: Tensor) -> Tensor:
        """Resizes `decode`'s logits to the network's size, bilinear without aligned corners.

        Maps float [B, Q, h * 2^u, w * 2^u] to [B, Q, h * f, w * f]; f is `config.downsampling`.
        """
        factor = self.config.downsampling / 2**self.config.num_upscalers
        return F.interpolate(logits, scale_factor=factor, mode="bilinear", align_corners=False)


def structure_from_state(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Reads the fields of `MaskVAEConfig` off the tensors of an auto-encoder, any shape and dtype.

    Norm groups, the bottleneck's activation and the latents' scale are not in the tensors. Codebooks are not known.

    Raises:
        CheckpointError: tensors that make no auto-encoder of this kind.
    """
    encoder, decoder = _convolutions(state, "encoder"), _convolutions(state, "decoder")
    if len(encoder) < 3 or len(encoder) % 2 == 0 or len(decoder) < 2:
        raise CheckpointError(
            f"no mask auto-encoder: {len(encoder)} convolutions in encoder.*, {len(decoder)} in decoder.*, instead of "
            f"3, 5, 7, ... and at least 2"
        )
    moments, latents = encoder[-1].shape[0], decoder[0].shape[1]
    if moments not in (latents, 2 * latents):
        raise CheckpointError(
            f"the encoder ends in {moments} channels and the decoder takes {latents}: neither a gaussian bottleneck "
            f"(twice as many) nor an auto one (as many)"
        )
    upscalers = decoder[1:-1]
    positions = (key.split(".") for key in state if key.startswith("encoder."))
    return {
        "num_bits": encoder[0].shape[1],
        "num_slots": decoder[-1].shape[0],
        "latent_channels": latents,
        "widths": tuple(weight.shape[0] for weight in encoder[0:-2:2]),
        "middle_width": encoder[-2].shape[0],
        "decoder_width": decoder[0].shape[0],
        "upscale_width": upscalers[0].shape[1] if upscalers else 0,
        "num_upscalers": len(upscalers),
        "num_mid_blocks": len({parts[1] for parts in positions if parts[2:3] == ["resnets"]}),
        "parametrization": "gaussian" if moments == 2 * latents else "auto",
    }


def _convolutions(state: Mapping[str, Tensor], part: str) -> list[Tensor]:
    """The weights [_, _, k, k] right under `part`, in the order of their positions."""
    found = {}
    for key, value in state.items():
        match key.split("."):
            case [name, position, "weight"] if name == part and position.isdecimal() and value.ndim == 4:
                found[int(position)] = value
    return [found[position] for position in sorted(found)]


def clusters(colours: Tensor, num_slots: int, radius: float = 1.5) -> Tensor:
    """Groups colours float [B, C, h, w] greedily, from where they change least; slot logits [B, num_slots, h, w]."""
    size, (height, width) = len(colours), colours.shape[-2:]
    logits = torch.full((size, num_slots, height * width), -10.0)
    change = torch.zeros(size, height, width)
    for shift, dim in ((1, 2), (-1, 2), (1, 3), (-1, 3)):
        change += (colours - colours.roll(shift, dim)).norm(dim=1)
    order = change.flatten(1).argsort(1)
    for image in range(size):
        points = colours[image].flatten(1).T  # [N, C]
        free, means = torch.ones(len(points), dtype=torch.bool), []
        for _ in range(num_slots - 1):
            left = order[image][free[order[image]]]
            if len(left) == 0:
                break
            mean = points[left[0]]
            for _ in range(3):
                near = free & ((points - mean).norm(dim=1) < radius)
                if not near.any():
                    break
                mean = points[near].mean(0)
            near = free & ((points - mean).norm(dim=1) < radius)
            near[left[0]] = True
            free &= ~near
            if near.sum() >= 3:
                means.append(mean)
        if means:
            nearest = torch.cdist(points, torch.stack(means)).argmin(1)
            logits[image].scatter_(0, nearest[None] + 1, 10.0)
    return logits.view(size, num_slots, height, width)
