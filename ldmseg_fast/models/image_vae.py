"""Image encoders: uint8 pictures -> `image_latents`."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from ldmseg_fast.config import ImageEncoderConfig
from ldmseg_fast.models.layers import ResnetBlock


def normalize(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] to float in [-1, 1]."""
    return images.float() * (2.0 / 255.0) - 1.0


class ConvEncoder(nn.Module):
    """A small convolutional encoder, trained jointly with the UNet."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        widths, groups = config.widths, config.norm_groups
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1)]
        for width, next_width in itertools.pairwise(widths):
            layers += [ResnetBlock(width, width, 0, groups, 1e-6) for _ in range(config.blocks)]
            layers.append(nn.Conv2d(width, next_width, 3, stride=2, padding=1))
        layers += [ResnetBlock(widths[-1], widths[-1], 0, groups, 1e-6) for _ in range(config.blocks)]
        layers += [nn.GroupNorm(groups, widths[-1], eps=1e-6), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> [B, C, H/f, W/f]."""
        return self.layers(normalize(images)) * self.config.scaling_factor


class _TaesdBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        convs = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class TaesdEncoder(nn.Module):
    """TAESD: a distilled encoder into Stable Diffusion's latent space (github.com/madebyollin/taesd, MIT).

    Takes pictures in [0, 1]; its latents are used as they are, `scaling_factor` is 1.
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
        """uint8 [B, 3, H, W] -> [B, 4, H/8, W/8]."""
        return self.layers(images.float() / 255.0) * self.config.scaling_factor


class KLEncoder(nn.Module):
    """The encoder half of diffusers' `AutoencoderKL`; its decoder is dropped."""

    def __init__(self, config: ImageEncoderConfig, vae_config: dict | None = None) -> None:
        super().__init__()
        from diffusers import AutoencoderKL

        self.config = config
        self.vae_config = vae_config or SD_VAE_CONFIG
        vae = AutoencoderKL.from_config(self.vae_config)
        self.encoder = vae.encoder
        self.quant_conv = vae.quant_conv

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> the posterior's mean times `scaling_factor`, [B, 4, H/8, W/8]."""
        dtype = next(self.encoder.parameters()).dtype
        moments = self.encoder(normalize(images).to(dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return moments.chunk(2, dim=1)[0] * self.config.scaling_factor


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


def build_image_encoder(config: ImageEncoderConfig, vae_config: dict | None = None) -> nn.Module:
    """The encoder that `config.kind` names, with fresh weights.

    Raises:
        ImportError: `autoencoder_kl` without diffusers.
    """
    if config.kind == "conv":
        return ConvEncoder(config)
    if config.kind == "taesd":
        return TaesdEncoder(config)
    return KLEncoder(config, vae_config)


def load_pretrained(encoder: nn.Module, path: str | Path) -> nn.Module:
    """Weights that others made: a TAESD `.safetensors` file, or the `vae/` folder of a Stable Diffusion model.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: tensors that do not fit the encoder; the message lists them.
    """
    from safetensors.torch import load_file

    path = Path(path)
    if isinstance(encoder, TaesdEncoder):
        if not path.is_file():
            raise FileNotFoundError(
                f"image_encoder.path={path}: no such file; a TAESD encoder in safetensors is expected"
            )
        state = {f"layers.{key}": value for key, value in load_file(path).items()}
    else:
        folder = path / "vae" if (path / "vae").is_dir() else path
        files = sorted(folder.glob("diffusion_pytorch_model*.safetensors")) or sorted(folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"image_encoder.path={path}: no vae folder with a .safetensors file in it")
        state = load_file(files[0])
        state = {key: value for key, value in state.items() if key.startswith(("encoder.", "quant_conv."))}
    missing, unexpected = encoder.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ValueError(f"{path}: missing tensors {missing[:5]}, unexpected tensors {unexpected[:5]}")
    return encoder


def read_vae_config(folder: Path) -> dict:
    """`config.json` of a diffusers AutoencoderKL folder."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing; a diffusers AutoencoderKL folder has one")
    return json.loads(file.read_text(encoding="utf-8"))
