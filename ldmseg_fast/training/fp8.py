"""Trains linear layers of the UNet in eight bits: torchao's, e4m3 forward and e5m2 for gradients, with dynamic scales.

Weights, their gradients and the optimiser stay what they are; only the three products of a layer change. Source:
Micikevicius et al. 2022, "FP8 formats for deep learning", arXiv 2209.05433.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from ldmseg_fast import distributed
from ldmseg_fast.errors import ConfigError
from ldmseg_fast.models.fp8_layers import MULTIPLE, why_not_fp8_products


def check_fp8(device: torch.device, precision: str) -> None:
    """Checks that all ranks can train in eight bits; all of them call it.

    Args:
        device: of this rank.
        precision: of the run, as `resolve_precision` has it.

    Raises:
        ConfigError: another precision than bf16, or a rank without a GPU that has such products, or without torchao.
    """
    if precision != "bf16":
        raise ConfigError(f"train.fp8=true goes with train.precision=bf16, not with {precision}; set one of the two")
    lacking = why_not_fp8_products(device)
    reason = f"train.fp8=true {lacking}; set train.fp8=false" if lacking else ""
    if not reason and importlib.util.find_spec("torchao") is None:
        reason = "train.fp8=true: pip install 'ldmseg_fast[fp8]', or set train.fp8=false"
    if reasons := list(filter(None, distributed.gather_objects(reason))):
        raise ConfigError(reasons[0])


def train_in_fp8(unet: nn.Module | None) -> str:
    """Lets the linear layers of a UNet's transformers multiply in eight bits, in place, and tells what it did.

    Those of the timestep, which see one row a picture, stay, and so do layers whose sides no product of eight bits
    takes. On a CPU the products are emulated. Names of parameters stay.

    Args:
        unet: None in a stage without one, where nothing changes.

    Raises:
        ConfigError: a UNet without such layers.
    """
    if unet is None:
        return "train.fp8 changes nothing, the auto-encoder has no linear layers"
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # an import of seconds

    count = 0

    def chosen(module: nn.Module, name: str) -> bool:
        nonlocal count
        assert isinstance(module, nn.Linear)
        fits = ".attentions." in name and module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0
        count += fits
        return fits

    # gradients of weights sum over the rows, of which there are any number: padded to what a product takes
    emulated = next(unet.parameters()).device.type != "cuda"
    config = Float8LinearConfig(emulate=emulated, pad_inner_dim=True)
    convert_to_float8_training(unet, module_filter_fn=chosen, config=config)
    if not count:
        raise ConfigError(
            f"train.fp8=true: no linear layer of this UNet's transformers has sides of multiples of {MULTIPLE}; set "
            f"train.fp8=false"
        )
    return f"{count} linear layers of the UNet in eight bits"
