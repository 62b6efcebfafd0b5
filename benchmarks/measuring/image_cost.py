"""Forecasts what one image costs at inference: arithmetic from operations and weights, nothing measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring.cost_model import Accelerator
from ldmseg_fast.config import Config
from ldmseg_fast.models.image_vae import build_image_encoder
from ldmseg_fast.models.mask_vae import MaskVAE
from ldmseg_fast.models.unet import UNet

BYTES = {"bf16": 2, "fp8": 1}  # of a weight of the UNet; the other networks stay in bf16
FASTER = {"bf16": 1.0, "fp8": 2.0}  # peak of the UNet's products, in that of bf16


@dataclass(frozen=True)
class NetworkCost:
    """Holds what one call of a network for one image takes: weights, and operations (two a multiplication)."""

    parameters: int
    operations: float

    def seconds(self, gpu: Accelerator, share: float, batch: int, precision: str = "bf16") -> float:
        """Seconds per image at `share` of the peak, or of reading the weights where that takes longer."""
        computing = self.operations / (share * FASTER[precision] * gpu.peak)
        return max(computing, BYTES[precision] * self.parameters / gpu.bandwidth / batch)


def network_costs(config: Config) -> dict[str, NetworkCost]:
    """Counts encoder, UNet and mask decoder of a configuration, on the meta device, for one image."""
    side = config.data.image_size
    cells = side // config.mask_vae.downsampling
    pictures = side * config.image_encoder.picture_scale
    with torch.device("meta"):
        encoder: Any = build_image_encoder(config.image_encoder).eval()
        unet, mask_vae = UNet(config.unet, "sdpa").eval(), MaskVAE(config.mask_vae).eval()
        image = torch.zeros(1, 3, pictures, pictures, dtype=torch.uint8)
        latents = torch.zeros(1, config.mask_vae.latent_channels, cells, cells)
        unet_input = torch.zeros(1, config.unet.in_channels, cells, cells)
        times = torch.zeros(1, dtype=torch.int64)
    decoder = [p for name, p in mask_vae.named_parameters() if not name.startswith("encoder")]
    return {
        "encoder": _cost(lambda: encoder(image), encoder.parameters()),
        "unet": _cost(lambda: unet(unet_input, times), unet.parameters()),
        "decoder": _cost(lambda: mask_vae.decode_latents_both(latents)[0], decoder),
    }


def _cost(call: Callable[[], Tensor], parameters: Any) -> NetworkCost:
    weights: list[nn.Parameter] = list(parameters)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return NetworkCost(sum(weight.numel() for weight in weights), float(counter.get_total_flops()))


def image_lines(name: str, config: Config, gpu: Accelerator, share: float) -> list[str]:
    """Writes what a preset's image costs in the steps that it takes, for batch 1 and 16, as lines of text."""
    costs = network_costs(config)
    sizes = ", ".join(f"{part} {c.parameters / 1e6:.1f} M, {c.operations / 1e9:.0f} GFLOP" for part, c in costs.items())
    lines = [f"{name}: {sizes}"]
    for precision in BYTES:
        for batch in (1, 16):
            times = {part: c.seconds(gpu, share, batch) for part, c in costs.items()}
            steps = config.num_inference_steps
            times["unet"] = steps * costs["unet"].seconds(gpu, share, batch, precision)
            total = sum(times.values())
            case = f"{precision} batch {batch:>2}, {steps} steps"
            lines.append(
                f"  {case}: {1e3 * total:.2f} ms an image, {1 / total:.0f} images/s "
                f"(arithmetic at {share:.0%} of {gpu.name}'s peak; launches and the head left out)"
            )
    return lines
