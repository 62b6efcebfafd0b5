"""Components of a model folder as objects of diffusers' classes, which compute what ours do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from ldmseg_fast.checkpoints.diffusers_classes import diffusers_component
from ldmseg_fast.checkpoints.diffusers_folder import diffusers_unet, unet_settings
from ldmseg_fast.checkpoints.model_folder import save_component, save_index
from ldmseg_fast.config import ImageEncoderConfig, UNetConfig
from ldmseg_fast.errors import ArgumentError, CheckpointError
from ldmseg_fast.models.image_vae import KLEncoder, TaesdEncoder
from ldmseg_fast.models.unet import UNet

UNETS = {
    "attn1": {"attention": (False, True), "linear_projection": True, "transformer_layers": 2},
    "attn2": {"attention": (True, True), "conditioning": "learned", "cross_attention_dim": 24},
    "widened": {"attention": (True, False), "in_channels": 12, "layers_per_block": 2},
}
KL = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
}


def save(folder: Path, name: str, network: torch.nn.Module, extra: dict | None = None) -> Path:
    save_component(folder, name, network.config, network.state_dict(), extra)
    save_index(folder, [name], {})
    return folder


def narrow(**settings: object) -> UNetConfig:
    return UNetConfig(
        **{"block_out_channels": (16, 32), "num_heads": (2, 4), "norm_groups": 8, "sample_size": 8} | settings
    )


@pytest.mark.parametrize("kind", UNETS)
def test_the_unet_of_diffusers_predicts_as_ours(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = narrow(**UNETS[kind])
    ours = UNet(config).eval()
    theirs = diffusers_component(save(tmp_path, "unet", ours), "unet")
    assert type(theirs).__name__ == "UNet2DConditionModel" and not theirs.training
    sample, time = torch.randn(2, config.in_channels, 8, 8), torch.tensor([3, 700])
    context = torch.randn(2, 5, 24) if config.cross_attention_dim else None
    found = theirs(sample, time, encoder_hidden_states=context).sample
    torch.testing.assert_close(found, ours(sample, time, context), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())


def test_what_is_written_is_read_as_the_same_unet() -> None:
    config = narrow(attention=(False, True), layers_per_block=3, linear_projection=True)
    found = unet_settings(diffusers_unet(config, "unet"), "unet")
    assert all(getattr(config, key) == value for key, value in found.items())


@pytest.mark.parametrize("kind", ["autoencoder_kl", "taesd"])
def test_the_image_vae_of_diffusers_encodes_as_ours(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if kind == "taesd":
        ours, extra = TaesdEncoder(ImageEncoderConfig(kind=kind, scaling_factor=1.0)).eval(), None
    else:
        ours, extra = KLEncoder(ImageEncoderConfig(kind=kind, downsampling=2), KL).eval(), {"_vae_config": KL}
    theirs = diffusers_component(save(tmp_path, "image_vae", ours, extra), "image_vae")
    pictures = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    encoded = theirs.encode(pictures.float() / 127.5 - 1.0)
    latents = encoded.latents if kind == "taesd" else encoded.latent_dist.mode()
    torch.testing.assert_close(latents * theirs.config.scaling_factor, ours(pictures), rtol=1e-4, atol=1e-5)
    with pytest.raises(ArgumentError, match="image_vae: the encoder alone; decode with the image VAE"):
        theirs.decode(latents)


def test_the_scheduler_and_a_shipped_model() -> None:
    assert type(diffusers_component("tiny", "scheduler")).__name__ == "DDIMScheduler"
    assert diffusers_component("tiny", "unet").conv_in.in_channels == 64
    with pytest.raises(CheckpointError, match=r"image_encoder\.kind=efficientnet_lite is no network of diffusers"):
        diffusers_component("tiny", "image_vae")
    with pytest.raises(ArgumentError, match="mask_vae: diffusers has no class for it; there are unet, image_vae"):
        diffusers_component("tiny", "mask_vae")


def test_parts_that_diffusers_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = narrow(attention=(False, True), in_channels=8, separate_conv_in=True)
    save(tmp_path, "unet", UNet(config))
    with pytest.raises(CheckpointError, match=r"unet: diffusers' UNet2DConditionModel has no unet\.separate_conv_in"):
        diffusers_component(tmp_path, "unet")
    with pytest.raises(CheckpointError, match="a model folder without scheduler"):
        diffusers_component(tmp_path, "scheduler")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ArgumentError, match="pip install diffusers"):
        diffusers_component(tmp_path, "unet")
