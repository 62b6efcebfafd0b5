"""Measures the scales of a quantised UNet over real sampling in PyTorch, and rounds as its graph does."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldmseg_fast.backends.model_info import ModelInfo
from ldmseg_fast.backends.torch_backend import TorchBackend
from ldmseg_fast.diffusion.sampler import ddim, image_noise
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.distributed import is_main
from ldmseg_fast.models.conditioning import with_context
from ldmseg_fast.models.layers import Attention

# floats in graphs for TensorRT: few FLOPs, and errors there reach every step
SENSITIVE = re.compile(r"(conv_in|image_conv_in|conv_out|time_embedding)(\.|$)")
SENSITIVE_ON_CPU = re.compile(r"(conv_out|time_embedding)(\.|$)")  # the first convolution takes 4 % of a step there
PARTS = ("to_q", "to_k", "to_v")  # of an attention
CALIBRATION_STEPS = 4
CELLS_AT_ONCE = 16 * 28 * 28  # latents that are denoised together: 3 of 64x64, which take 5 GiB at full size
OUTLIERS = 3e-5  # the share of values that int8 cuts off at each end
LARGEST = {"fp8": 448.0, "int8": 127.0}  # the values that the largest magnitudes become
# In 16 bits, by which CPUs without VNNI add, two products of such a weight and an unsigned byte do not overflow.
LARGEST_ON_CPU = 64.0
ROW = 128  # values of which the largest is looked at first
LEAST_STEP = 1e-6  # of what is zero throughout
# of an attention in int8 that TensorRT keeps in one kernel; TensorRT for RTX does the same, by its builder's log
# https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/transformers-fused-attention.html
HEAD_SIZES, MAX_TOKENS = (16, 32, 64), 512


@dataclass(frozen=True)
class Scale:
    """Maps a float x to x / `step` + `zero`, rounded.

    Attributes:
        step: what one integer, or 1.0 in E4M3, stands for.
        zero: the integer that 0.0 becomes.
        unsigned: whether integers go from 0 to 255, instead of -128 to 127.
    """

    step: float
    zero: int = 0
    unsigned: bool = False


@dataclass(frozen=True)
class LayerScales:
    """Holds the scales of one quantised layer, their steps rounded as its graph holds them.

    Attributes:
        inputs: of what flows in.
        weight: steps, float32: one for all, [], or [C, 1, ...], one per output channel.
        outputs: of what flows out; None: it stays a float.
        softmax: of an attention's values, "to_v": of what they are multiplied by; None: it stays a float.
    """

    inputs: Scale
    weight: Tensor
    outputs: Scale | None = None
    softmax: Scale | None = None


def calibrate(
    info: ModelInfo, precision: str, dtype: torch.dtype, pictures: Tensor, attention: bool = True
) -> dict[str, LayerScales]:
    """Measures the scales of every convolution and linear layer of the UNet but the sensitive ones.

    In int8 for TensorRT also those of an attention's own two products, where it keeps them in one kernel.

    Args:
        info: of the model.
        precision: "fp8" (E4M3, one scale per weight) or "int8" (one per output channel).
        dtype: of the graph's floats. Beside float32 integers are what ONNX Runtime takes on a CPU: unsigned,
            and 3x3 convolutions return them too. Integers beside halves are what TensorRT takes: signed.
        pictures: uint8 [B, 3, S, S]; scales come from sampling their maps.
        attention: whether the graph shows attention's products, and always has as many tokens as with `pictures`.

    Returns:
        The scales by the layer's name.
    """
    backend = TorchBackend(info, "cpu", torch.float32)
    unet: Any = backend.unet
    unet.unfuse()  # fused products would pass the layers by
    for_cpu = precision == "int8" and dtype == torch.float32
    floats = SENSITIVE_ON_CPU if for_cpu else SENSITIVE
    layers = {
        name: layer
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and not floats.match(name)
    }
    spans: dict[tuple[str, str], tuple[float, float]] = {}
    share = OUTLIERS if precision == "int8" else 0.0

    def see(name: str, _: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        for end, values in (("inputs", args[0]), ("outputs", output)):
            least, most = spans.get((name, end), (0.0, 0.0))
            low, high = _ends(values, share)
            spans[name, end] = min(least, low), max(most, high)

    tokens: dict[str, int] = {}

    def count(name: str, _: Any, args: tuple[Tensor, ...]) -> None:
        tokens[name] = max(values.shape[1] for values in args if values is not None)

    for name, layer in layers.items():
        layer.register_forward_hook(partial(see, name))
    attentions = {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}
    for name, module in attentions.items():
        module.register_forward_pre_hook(partial(count, name))
    scheduler = Scheduler(info.scheduler)
    noise = image_noise(0, list(range(len(pictures))), info.latent_shape, info.scheduler.init_noise_sigma)
    size = max(1, CELLS_AT_ONCE // noise[0, 0].numel())
    quiet = None if is_main() else True  # None: silent where there is no terminal
    with torch.no_grad(), tqdm(total=len(pictures), desc="calibration", unit="image", disable=quiet) as bar:
        for some, own_noise in zip(pictures.split(size), noise.split(size)):
            denoise = unet if backend.conditioning is None else with_context(unet, backend.conditioning, some)
            latents = backend.encode_image(some)
            ddim(denoise, own_noise, latents, scheduler, CALIBRATION_STEPS, info.self_condition)
            bar.update(len(some))

    def scale(name: str, end: str) -> Scale:
        low, high = spans[name, end]
        if for_cpu:
            step = _rounded(max((high - low) / 255, LEAST_STEP), dtype)
            return Scale(step, round(-low / step), unsigned=True)
        return Scale(_rounded(max(-low / LARGEST[precision], high / LARGEST[precision], LEAST_STEP), dtype))

    most = LARGEST_ON_CPU if for_cpu else LARGEST[precision]
    steps = {name: _weight_steps(layer.weight.detach(), precision, most, dtype) for name, layer in layers.items()}
    returned = {name for name, layer in layers.items() if for_cpu and _is_wide(layer)}
    softmax = {}
    for name, module in attentions.items():
        parts = [f"{name}.{part}" for part in PARTS]
        if precision == "fp8":  # one product makes the three
            steps |= dict.fromkeys(parts, torch.stack([steps[part] for part in parts]).max())
        elif not for_cpu:
            # with no quantised result, TensorRT restores the weights of the one product, and multiplies halves
            returned.add(parts[-1])
            head_size = module.to_q.out_features // module.num_heads
            if attention and head_size in HEAD_SIZES and tokens[name] <= MAX_TOKENS:
                returned.update(parts)
                softmax[parts[-1]] = Scale(_rounded(1 / LARGEST[precision], dtype))  # at most 1
    return {
        name: LayerScales(
            scale(name, "inputs"),
            steps[name],
            scale(name, "outputs") if name in returned else None,
            softmax.get(name),
        )
        for name in layers
    }


def _is_wide(layer: nn.Module) -> bool:
    """Tells a convolution that sees its neighbours; the graph for the CPU makes products of 1x1 convolutions."""
    return isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)


def _ends(values: Tensor, share: float) -> tuple[float, float]:
    """Returns what a share of the values, float of any shape, lies below, and what as many lie above."""
    count = int(share * values.numel()) + 1
    return -_largest(-values.flatten(), count), _largest(values.flatten(), count)


def _largest(values: Tensor, count: int) -> float:
    """Returns the `count`-th largest of values, float [N]; it lies in one of the `count` rows of the largest maxima."""
    rows = len(values) // ROW
    if rows > count:
        table = values[: rows * ROW].view(rows, ROW)
        found = table[table.amax(1).topk(count).indices]
        values = torch.cat([found.flatten(), values[rows * ROW :]])
    return values.topk(count).values[-1].item()


def _rounded(step: float, dtype: torch.dtype) -> float:
    return torch.tensor(step).to(dtype).item()


def _weight_steps(weight: Tensor, precision: str, most: float, dtype: torch.dtype) -> Tensor:
    largest = weight.abs().max() if precision == "fp8" else weight.abs().flatten(1).amax(1)
    steps = (largest / most).clamp(min=LEAST_STEP).to(dtype).float()
    return steps if precision == "fp8" else steps.reshape(-1, *[1] * (weight.ndim - 1))


def to_eight_bits(
    values: Tensor, step: Tensor | float, precision: str, zero: int = 0, unsigned: bool = False
) -> Tensor:
    """Rounds values, float32 of any shape, as ONNX's QuantizeLinear does: to uint8, int8 or float8_e4m3fn."""
    scaled = values / step
    if precision == "int8":
        least, most, kind = (0, 255, torch.uint8) if unsigned else (-128, 127, torch.int8)
        return (scaled.round() + zero).clamp(least, most).to(kind)
    return scaled.clamp(-LARGEST["fp8"], LARGEST["fp8"]).to(torch.float8_e4m3fn)


def fake_quantize(values: Tensor, scale: Scale, precision: str) -> Tensor:
    """Rounds values, float32 of any shape, as QuantizeLinear and DequantizeLinear do one after the other."""
    stored = to_eight_bits(values, scale.step, precision, scale.zero, scale.unsigned)
    return (stored.float() - scale.zero) * scale.step
