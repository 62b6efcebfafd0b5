"""Trains linear layers of the UNet in eight bits: torchao's, e4m3 forward and e5m2 for gradients, with dynamic scales.

Weights, their gradients and the optimiser stay what they are; only the three products of a layer change. Source:
Micikevicius et al. 2022, "FP8 formats for deep learning", arXiv 2209.05433.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from ldmseg_fast.errors import ConfigError
from ldmseg_fast.models.fp8_layers import why_not_fp8_products

SIDE = 16  # channels in and out of a layer are multiples of it, or it stays as it is


def check_fp8(device: torch.device, precision: str) -> None:
    """Checks that this machine can train in eight bits.

    Args:
        device: of this rank.
        precision: of the run, as `resolve_precision` has it.

    Raises:
        ConfigError: another precision than bf16, no GPU with such products, or no torchao.
    """
    if reason := why_not_fp8_products(device):
        raise ConfigError(f"train.fp8=true {reason}; set train.fp8=false")
    if precision != "bf16":
        raise ConfigError(f"train.fp8=true goes with train.precision=bf16, not with {precision}; set one of the two")
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError("train.fp8=true: pip install 'ldmseg_fast[fp8]', or set train.fp8=false")


def train_in_fp8(unet: nn.Module) -> int:
    """Lets the linear layers of a UNet's transformers multiply in eight bits, in place, and counts them.

    Layers that see one row a picture, those of the timestep, stay, and so do those whose sides no product of eight bits
    takes, and keys and values of a context, whose tokens need not be a multiple of 16. On a CPU the products are
    emulated. Names of parameters stay.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # an import of seconds

    count = 0

    def chosen(module: nn.Module, name: str) -> bool:
        nonlocal count
        assert isinstance(module, nn.Linear)
        fits = ".transformer_blocks." in name and ".attn2.to_" not in name
        fits = fits and module.in_features % SIDE == 0 and module.out_features % SIDE == 0
        count += fits
        return fits

    emulated = next(unet.parameters()).device.type != "cuda"
    convert_to_float8_training(unet, module_filter_fn=chosen, config=Float8LinearConfig(emulate=emulated))
    return count
