"""Weights in oneDNN's own layout: PyTorch's eager convolutions and products in bfloat16 rearrange theirs at every call.

For inference on a CPU. The results are those of the plain layers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

OPERATORS = (
    "_reorder_convolution_weight",
    "_convolution_pointwise",
    "_reorder_linear_weight",
    "_linear_pointwise",
    "_is_mkldnn_bf16_supported",
)
SIZES = 2  # of pictures, for which a convolution keeps its weights
ROWS = 256  # of a product, for which its weight's layout is chosen; it is right for any number

Forward = Callable[[Tensor], Tensor]


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch, on this processor, has packed layers of `dtype`: bfloat16 only."""
    if device.type != "cpu" or dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    operators = torch.ops.mkldnn
    return all(hasattr(operators, name) for name in OPERATORS) and operators._is_mkldnn_bf16_supported()


@torch.no_grad()
def pack_weights(module: nn.Module) -> int:
    """Packs every bfloat16 convolution, linear layer and fused projection in `module`, on the CPU.

    Parameters and names stay what they are, and so does whatever needs gradients or has another dtype: there the plain
    layers run. The weights must not change after. Convolutions are packed by their first call for pictures of a size.
    See `can_pack`.

    Returns:
        How many were packed.
    """
    packed = 0
    layer: Any
    for layer in module.modules():
        fused = getattr(layer, "fused_qkv", None)
        if fused is not None and fused.dtype == torch.bfloat16:
            layer.project_qkv = _for_inference(_packed_product(fused, None), layer.project_qkv)
        elif getattr(layer, "fused_time", None) is not None and layer.fused_time[0].dtype == torch.bfloat16:
            layer.project_time = _for_inference(_packed_product(*layer.fused_time), layer.project_time)
        elif _can_pack_layer(layer):
            convolution = type(layer) is nn.Conv2d
            run = _packed_convolution(layer) if convolution else _packed_product(layer.weight, layer.bias)
            layer.forward = _for_inference(run, layer.forward)
        else:
            continue
        packed += 1
    return packed


def _can_pack_layer(layer: Any) -> bool:
    if type(layer) is nn.Conv2d and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        return False
    return type(layer) in (nn.Conv2d, nn.Linear) and layer.weight.dtype == torch.bfloat16


def _packed_convolution(layer: nn.Conv2d) -> Forward:
    """The layout goes by the size of the pictures: in that of another size a call can take 300 times as long."""
    operators = torch.ops.mkldnn
    geometry = (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)
    weight, bias = layer.weight.detach(), layer.bias
    run = operators._convolution_pointwise.default
    packed: dict[tuple[int, int], Tensor] = {}  # by height and width

    def forward(x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        size = (x.shape[2], x.shape[3])
        own = packed.get(size)
        if own is None:
            if len(packed) == SIZES:
                packed.clear()
            own = packed[size] = operators._reorder_convolution_weight(weight, *geometry, list(x.shape))
        return run(x, own, bias, *geometry, "none", [], "")

    return forward


def _packed_product(weight: Tensor, bias: Tensor | None) -> Forward:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
    run = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: run(x, packed, bias, "none", [], "")


def _for_inference(packed: Forward, plain: Forward) -> Forward:
    def forward(x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.dtype != torch.bfloat16 or not x.numel():
            return plain(x)
        return packed(x)

    return forward


def compile_frozen(module: nn.Module) -> Callable[..., Any]:
    """`torch.compile` with the weights as constants, which inductor packs; without it they are packed at every call.

    Compiled when first called, and again for other shapes. For inference on a CPU; the weights must not change after.
    """
    compiled = torch.compile(module)

    def run(*args: Any) -> Any:
        from torch._inductor import config  # an import of seconds, which only this needs

        with config.patch(freezing=True):  # read while compiling, which any call may do
            return compiled(*args)

    return run
