"""Counts the operations of training a picture, for the share of the machine's peak that a run reaches."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ldmseg_fast.config import Config, DataConfig
from ldmseg_fast.training.estimate import network_parts

# operations a second in bfloat16 and float16, dense, by a part of the name that torch gives; from the data sheets
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "A10": 125e12,
}


def picture_operations(stage_name: str, config: Config) -> float:
    """Counts multiplications and additions of one picture's share of a training step.

    A backward pass is two forward passes; what is recomputed does not count (Chowdhery et al. 2022, arXiv 2204.02311,
    appendix B). Matrix products, convolutions and attention count.
    """
    found = _networks(stage_name == "autoencoder", replace(Config(), **_sizes(config)))
    if stage_name == "autoencoder":
        return 3.0 * (found["encode"] + found["decode"])
    see = 0.0 if config.data.latent_cache else found["see"] * (3.0 if config.image_encoder.is_trained else 1.0)
    few, condition = config.few_step, config.diffusion.self_condition
    if stage_name == "diffusion":
        passes = 3.0 + condition + config.diffusion.own_estimate * (1.0 + condition)
        return see + found["encode"] + passes * found["unet"]
    if stage_name == "one_step":
        depth = (1 + few.steps) / 2 if few.depth == "any" else few.steps
        return see + (depth + 2.0) * found["unet"] + 3.0 * found["decode"]
    taught = (few.teacher_steps or 2 * few.steps) / few.steps
    return see + found["encode"] + (taught + 3.0 + condition) * found["unet"]


def operation_rates(stage_name: str, config: Config, images_per_s: float) -> dict[str, float]:
    """Gives what the log says of a rank: tflops, 10^12 operations a second, and mfu, their share of its GPU's peak.

    A GPU that is not listed has no mfu.
    """
    operations = picture_operations(stage_name, config) * images_per_s
    rates = {"tflops": operations / 1e12}
    if peak := peak_operations():
        rates["mfu"] = operations / peak
    return rates


def _sizes(config: Config) -> dict[str, Any]:
    """The settings that a forward pass depends on, so that runs in other folders need not count again."""
    data = DataConfig(image_size=config.data.image_size)
    names = ("mask_vae", "image_encoder", "unet", "conditioning")
    return {"data": data} | {name: getattr(config, name) for name in names}


@lru_cache
def _networks(autoencoder: bool, config: Config) -> dict[str, float]:
    """Counts a forward pass of each network for one picture, on the meta device."""
    parts = network_parts("autoencoder" if autoencoder else "diffusion", config)
    vae, side = config.mask_vae, config.data.image_size
    small = side // vae.downsampling
    planes = torch.empty(1, (vae.num_slots if vae.codes == "hadamard" else vae.num_bits) + vae.category_bits, side, side, device="meta")
    latents = torch.empty(1, vae.latent_channels, small, small, device="meta")
    found = {
        "encode": _count(parts["mask_vae"], "encode", planes),
        "decode": _count(parts["mask_vae"], "decode", latents),
    }
    if autoencoder:
        return found
    pictures = torch.empty(1, 3, *[side * config.image_encoder.picture_scale] * 2, dtype=torch.uint8, device="meta")
    sample = torch.empty(1, config.unet.in_channels, small, small, device="meta")
    context = None
    if config.unet.cross_attention_dim:
        context = torch.empty(1, config.conditioning.num_queries, config.unet.cross_attention_dim, device="meta")
    found["see"] = _count(parts["image_vae"], "forward", pictures)
    found["unet"] = _count(parts["unet"], "forward", sample, torch.zeros(1, device="meta"), context)
    return found


def _count(module: nn.Module, method: str, *inputs: Any) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        getattr(module, method)(*inputs)
    return float(counter.get_total_flops())


def peak_operations() -> float:
    """Gives the data sheet's operations a second of this rank's GPU; 0 without a GPU or for one that is not listed."""
    if not torch.cuda.is_available():
        return 0.0
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if all(word in name for word in part.split())), 0.0)
