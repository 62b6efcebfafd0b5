"""Runs Triton on CUDA in half precision and the reference elsewhere; opaque to torch.compile. There is no gradient."""

from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.kernels.attention import why_not_fp8
from ldmseg_fast.kernels.backend import (
    in_format,
    require,
    require_floats,
    require_groups,
    require_no_gradient,
    require_same_device,
    runs_reference,
)
from ldmseg_fast.kernels.convolution import reference
from ldmseg_fast.kernels.convolution.reference import result_shape
from ldmseg_fast.kernels.group_norm_silu.reference import count_chunks

HALVES = (torch.float16, torch.bfloat16)
E4M3 = torch.float8_e4m3fn
Scales = tuple[Tensor, Tensor]  # [B], [N]


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    added: Tensor | None = None,
    residual: Tensor | None = None,
    scales: Scales | None = None,
    stride: int = 1,
    upsample: bool = False,
    num_groups: int = 0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes conv(x, weight) + bias + added + residual, of 3x3 cells and padding 1, and its moments. For inference.

    Args:
        x: float or e4m3 [B, C, h, w]; another dtype than float16, bfloat16 and e4m3 always goes to torch's own
            operations, and e4m3 does on GPUs older than sm_89. The kernel works in channels_last and copies another
            layout first, as it does weight and residual.
        weight: of x's dtype [N, C, 3, 3].
        bias: float [N], or None.
        added: float [B, N], such as a time embedding, or None.
        residual: of the result's dtype [B, N, h', w'], or None.
        scales: what a 1 of x and of weight stands for where they are e4m3: float32 [B], one of each image, and [N], one
            of each output. Products are accumulated in float32.
        stride: 1 or 2.
        upsample: doubles height and width of x by repetition first.
        num_groups: of the result, whose moments are wanted, see `group_norm_silu.moments`; 0: none.
        dtype: float16, bfloat16 or float32, of the result of e4m3 numbers; of others it is x's.

    Returns:
        [B, N, h', w'] of x's dtype or `dtype`, channels_last on CUDA, and float32 moments [B, 2, chunks, num_groups],
        an empty tensor where none are wanted.

    Raises:
        ValueError: wrong shape, dtype, device or stride, or a gradient is wanted.
    """
    scale, weight_scale = (None, None) if scales is None else scales
    require_no_gradient(x=x, weight=weight, bias=bias, added=added, residual=residual)
    require_no_gradient(scale=scale, weight_scale=weight_scale)
    made = x.dtype if dtype is None else dtype
    args = (x, weight, bias, added, residual, scale, weight_scale, stride, upsample, num_groups, made)
    if runs_reference("convolution", x) or made not in HALVES or x.dtype not in (*HALVES, E4M3):
        check(*args)
        return reference.convolution(*args)
    return convolution_op(*args)


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    weight_scale: Tensor | None,
    stride: int,
    upsample: bool,
    num_groups: int,
    dtype: torch.dtype,
) -> None:
    """Refuses what `convolution_op` does not take: x is float or e4m3 [B, C, h, w], arguments as in `convolution`.

    Raises:
        ValueError: wrong shape, dtype, device or stride; the message starts with the argument's name.
    """
    require(x.ndim == 4 and x.shape[1] > 0, "x: expected [B, C, h, w], C at least 1, got shape {}", x.shape)
    require_floats(x=x, bias=bias, added=added)
    fits = weight.ndim == 4 and weight.shape[1] == x.shape[1] and tuple(weight.shape[2:]) == (3, 3)
    require(fits, "weight: expected [N, {}, 3, 3], got shape {}", x.shape[1], weight.shape)
    require(weight.dtype == x.dtype, "weight: dtype {} differs from x's {}", weight.dtype, x.dtype)
    require(stride in (1, 2), "stride: expected 1 or 2, got {}", stride)
    shape = result_shape(x, weight, stride, upsample)
    if bias is not None:
        require(bias.shape == weight.shape[:1], "bias: expected [{}], got shape {}", shape[1], bias.shape)
    if added is not None:
        fits = added.ndim == 2 and added.shape[0] == shape[0] and added.shape[1] == shape[1]
        require(fits, "added: expected [{}, {}], got shape {}", shape[0], shape[1], added.shape)
    if residual is not None:
        fits = residual.ndim == 4 and all(one == other for one, other in zip(residual.shape, shape))
        require(fits, "residual: expected {}, got shape {}", shape, residual.shape)
        require(residual.dtype == dtype, "residual: expected {}, got {}", dtype, residual.dtype)
    for name, tensor, size in (("scale", scale, shape[0]), ("weight_scale", weight_scale, shape[1])):
        require((tensor is not None) == (x.dtype == E4M3), "{}: comes with e4m3 numbers, and x is {}", name, x.dtype)
        if tensor is not None:
            fits = tensor.ndim == 1 and tensor.shape[0] == size and tensor.dtype == torch.float32
            require(fits, "{}: expected float32 [{}], got {} {}", name, size, tensor.dtype, tensor.shape)
    known = (*HALVES, torch.float32) if x.dtype == E4M3 else (x.dtype,)
    require(dtype in known, "dtype: {} is not one of {}", dtype, known)
    if num_groups:
        require_groups(num_groups, shape[1])
    others: dict[str, Any] = {"weight": weight, "bias": bias, "added": added, "residual": residual}
    require_same_device(x, **others, scale=scale, weight_scale=weight_scale)


@torch.library.custom_op("ldmseg_fast::convolution", mutates_args=())
def convolution_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    weight_scale: Tensor | None,
    stride: int,
    upsample: bool,
    num_groups: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Runs `convolution`: x is float or e4m3 [B, C, h, w]; the result, of `dtype`, is channels_last.

    Raises:
        ValueError: see `check`.
    """
    args = (x, weight, bias, added, residual, scale, weight_scale, stride, upsample, num_groups, dtype)
    check(*args)
    return _run_reference(*args)


def _run_reference(*args: Any) -> tuple[Tensor, Tensor]:
    out, made = reference.convolution(*args)
    return in_format(out, torch.channels_last), made


@convolution_op.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    from ldmseg_fast.kernels.convolution import host  # Triton is imported on CUDA only

    check(*args)
    is_fp8 = args[0].dtype == E4M3
    return _run_reference(*args) if is_fp8 and why_not_fp8(args[0].device, args[-1]) else host.convolution(*args)


@convolution_op.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    check(*args)
    x, weight, stride, upsample, num_groups, dtype = *args[:2], *args[7:]
    shape = result_shape(x, weight, stride, upsample)
    out = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    wanted = (x.shape[0], 2, count_chunks(shape[2] * shape[3]), num_groups) if num_groups else (0,)
    return out, x.new_empty(wanted, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
