"""Products and convolutions of e4m3 numbers, for inference: weights in one byte, accumulated in float32.

Each output channel of a weight has a scale of its own, each picture's input one that its largest value sets
(Micikevicius et al. 2022, arXiv 2209.05433, section 4), so a picture's result does not depend on the others in its
batch.

GPUs of sm_89 and newer have such products: `torch._scaled_mm`, and `kernels.convolution` for 3x3 cells. Another
convolution, and a 3x3 one without that kernel, is a product over the windows of its input, which are copied in one byte
a value. Elsewhere the same numbers are multiplied in float32, which shows what the precision costs in quality and is
slow.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmseg_fast.kernels.attention import why_not_fp8
from ldmseg_fast.kernels.backend import runs_reference
from ldmseg_fast.kernels.convolution import convolution
from ldmseg_fast.models.layers import Attention
from ldmseg_fast.models.unet import UNet

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
TINY = 1e-12  # least scale: what is all zero stays so
MULTIPLE = 16  # of both sides of a weight, which the products ask for
MAX_WINDOWS = 2**28  # bytes of the windows of one product; more pictures go through one after the other


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds x, float [N, ...], to e4m3 numbers of the same shape times a scale, float32 [N]."""
    largest = torch.linalg.vector_norm(x.flatten(1), ord=torch.inf, dim=1).float()
    scale = (largest / LARGEST).clamp(min=TINY)
    return (x.float() / scale.view(-1, *[1] * (x.ndim - 1))).to(E4M3), scale


def scaled_product(
    x: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, *, emulated: bool
) -> Tensor:
    """Multiplies e4m3 x [M, K], scaled by float32 [M], and the transpose of e4m3 weight [N, K], scaled by float32 [N].

    Returns:
        [M, N] with the bias, [N]: bfloat16, or float32 where it is `emulated`.
    """
    if emulated:
        product = (x.float() @ weight.float().t()) * scale[:, None] * weight_scale
        return product if bias is None else product + bias.float()
    return torch._scaled_mm(
        x,
        weight.t(),
        scale_a=scale[:, None].contiguous(),
        scale_b=weight_scale[None],
        bias=None if bias is None else bias.bfloat16(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


class FP8Linear(nn.Module):
    """Does what a linear layer does, with e4m3 numbers.

    Args:
        weight: float [N, K], both multiples of 16.
        bias: float [N].
    """

    weight: Tensor  # e4m3 [N, K]
    scale: Tensor  # float32 [N]
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        codes, scale = quantise(weight.detach())
        self.emulated = bool(why_not_fp8_products(codes.device))
        self.register_buffer("weight", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Maps float [B, ..., K] to [B, ..., N] of the same dtype."""
        codes, scale = quantise(x)
        rows = codes.reshape(-1, codes.shape[-1]).contiguous()
        scale = scale.repeat_interleave(len(rows) // max(len(x), 1), output_size=len(rows))
        out = scaled_product(rows, scale, self.weight, self.scale, self.bias, emulated=self.emulated)
        return out.to(x.dtype).view(*x.shape[:-1], len(self.scale))


class FP8Conv2d(nn.Module):
    """Does what a square convolution without groups or dilation does, with e4m3 numbers.

    Args:
        layer: whose channels are multiples of 16.
    """

    weight: Tensor  # e4m3 [C_out, k k C_in]
    scale: Tensor  # float32 [C_out]
    bias: Tensor | None

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
        self.is_ours = (self.kernel, self.padding) == (3, 1) and self.stride in (1, 2)  # of `kernels.convolution`
        codes, scale = quantise(layer.weight.detach().permute(0, 2, 3, 1).reshape(layer.out_channels, -1))
        self.emulated = bool(why_not_fp8_products(codes.device))
        self.register_buffer("weight", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Maps float [B, C_in, h, w] to [B, C_out, h', w'] of the same dtype, channels_last."""
        codes, scale = quantise(x)
        if self.is_ours and not self.emulated and not runs_reference("convolution", x):
            cells = self.weight.view(-1, 3, 3, x.shape[1]).permute(0, 3, 1, 2)  # channels_last [C_out, C_in, 3, 3]
            dtype = torch.bfloat16 if x.dtype == torch.float32 else x.dtype
            scales = scale, self.scale
            out, _ = convolution(codes, cells, self.bias, scales=scales, stride=self.stride, dtype=dtype)
            return out.to(x.dtype)
        places = codes.view(torch.uint8).permute(0, 2, 3, 1).contiguous()  # [B, h, w, C_in]; a byte 0 is the number 0
        if self.padding:
            places = F.pad(places, (0, 0, *[self.padding] * 4))
        height, width = ((side - self.kernel) // self.stride + 1 for side in places.shape[1:3])
        at_once = max(1, MAX_WINDOWS // max(1, height * width * self.weight.shape[1]))
        parts = [
            self._product(part, part_scale, height * width)
            for part, part_scale in zip(places.split(at_once), scale.split(at_once))
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.to(x.dtype).view(len(x), height, width, len(self.scale)).permute(0, 3, 1, 2)

    def _product(self, places: Tensor, scale: Tensor, cells: int) -> Tensor:
        """Convolves padded codes, uint8 [B, h, w, C_in], to [B h' w', C_out]."""
        if self.kernel > 1 or self.stride > 1:
            windows = places.unfold(1, self.kernel, self.stride).unfold(2, self.kernel, self.stride)
            places = windows.permute(0, 1, 2, 4, 5, 3)  # [B, h', w', k, k, C_in]
        rows = places.reshape(-1, self.weight.shape[1]).contiguous().view(E4M3)
        scale = scale.repeat_interleave(cells, output_size=len(rows))
        return scaled_product(rows, scale, self.weight, self.scale, self.bias, emulated=self.emulated)


def why_not_fp8_products(device: torch.device) -> str:
    """Says why a device has no fast products of e4m3 numbers; empty where it has."""
    return why_not_fp8(device, torch.bfloat16)


@torch.no_grad()
def use_fp8(unet: UNet) -> int:
    """Replaces the UNet's layers, between its first and its last, by such of e4m3 numbers, for inference.

    The input and output convolutions, everything of the time and layers whose sides are no multiples of 16 stay, as do
    norms. After `fuse_qkv` and `fuse_time`, the weights that these joined are freed.

    Returns:
        How many products and convolutions were replaced.
    """
    replaced = 0
    layer: Any
    parent: Any
    for blocks in (unet.down_blocks, unet.mid_block, unet.up_blocks):
        for parent in list(blocks.modules()):
            for name, layer in list(parent.named_children()):
                quick = None if name == "time_emb_proj" else _fp8_layer(layer)
                if quick is not None and not (_is_fused(parent) and name in ("to_q", "to_k", "to_v")):
                    setattr(parent, name, quick)
                    replaced += 1
            if _is_fused(parent) and _fits(parent.fused_qkv):
                product = FP8Linear(parent.fused_qkv)
                parent.fused_qkv = product.weight  # tells that q, k and v are one product; the plain weights are freed
                parent.project_qkv = product.forward  # into the instance: a sub-module would hide behind the method
                parent.to_q = parent.to_k = parent.to_v = nn.Identity()
                replaced += 1
    return replaced


def _is_fused(module: Any) -> bool:
    return isinstance(module, Attention) and module.fused_qkv is not None


def _fits(weight: Tensor) -> bool:
    return weight.shape[0] % MULTIPLE == 0 and weight.shape[1] % MULTIPLE == 0


def _fp8_layer(layer: Any) -> nn.Module | None:
    if type(layer) is nn.Linear and _fits(layer.weight):
        return FP8Linear(layer.weight, layer.bias)
    if type(layer) is not nn.Conv2d or not _fits(layer.weight):
        return None
    square = len(set(layer.kernel_size)) == len(set(layer.stride)) == 1 and not isinstance(layer.padding, str)
    plain = layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
    return FP8Conv2d(layer) if square and plain and len(set(layer.padding)) == 1 else None
