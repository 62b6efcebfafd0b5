"""Settings and untrained parts of the training runs that are timed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ldmseg_fast.checkpoints.model_folder import save_component, save_index
from ldmseg_fast.checkpoints.tensors import save_weights
from ldmseg_fast.config import Config, ImageEncoderConfig, load_config
from ldmseg_fast.models.image_vae import TaesdEncoder
from ldmseg_fast.models.mask_vae import MaskVAE


def make_parts(folder: Path, config: Config) -> tuple[Path, Path]:
    """Writes an untrained mask auto-encoder's folder and an untrained TAESD file, and returns both paths."""
    torch.manual_seed(0)
    model = folder / "autoencoder"
    untrained = replace(config.mask_vae, scaling_factor=config.mask_vae.scaling_factor or 1.0)  # 0 is a training's
    save_component(model, "mask_vae", untrained, MaskVAE(untrained).state_dict())
    save_index(model, ["mask_vae"], {})
    encoder = TaesdEncoder(ImageEncoderConfig(kind="taesd"))
    taesd = folder / "taesd.safetensors"
    save_weights({key.removeprefix("layers."): value for key, value in encoder.state_dict().items()}, taesd)
    return model, taesd


def settings(preset: str, folder: Path, *overrides: str) -> Config:
    """Returns the settings of a run with a frozen encoder and 8x downsampling, on the scenes in `folder`."""
    size = 64 if preset == "tiny" else 512
    fixed = [f"data.root={folder / 'scenes'}", f"output_dir={folder / 'run'}", f"data.image_size={size}"]
    fixed += ["image_encoder.kind=taesd", "image_encoder.latent_channels=4", "image_encoder.downsampling=8"]
    fixed += [
        "image_encoder.scaling_factor=1",
        f"image_encoder.path={folder / 'taesd.safetensors'}",
        "unet.in_channels=12",
    ]
    if preset == "tiny":
        fixed += ["mask_vae.widths=32,64,128,128", "unet.sample_size=8"]
    fixed += [f"model.mask_vae={folder / 'autoencoder'}", "data.cache=false", "train.threads=1", *overrides]
    return load_config(preset, fixed)
