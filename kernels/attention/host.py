"""Triton: FlashAttention-2 (Dao, arXiv 2307.08691), with the head size split into two powers of two.

A head of 40 is one product of 32 columns and one of 16 (8 of them padding), 80 is 64 + 16, 160 is 128 + 32, so the
padding costs 20 %, 0 % and 0 % where rounding up to a power of two would cost 60 %. Forward, a launch configuration may
round up all the same: one product waits less often than two. Rows of q, k, v are read where they
lie, with strides in units of 8 elements: the compiler then knows that every row starts on 16 bytes.
"""

import math
from dataclasses import replace

import torch
import triton
from torch import Tensor

from ldmseg_fast.kernels.attention.backward import (
    attention_backward_kv_kernel,
    attention_backward_q_kernel,
    attention_delta_kernel,
)
from ldmseg_fast.kernels.attention.forward import attention_forward_kernel
from ldmseg_fast.kernels.attention.fp8 import attention_fp8_kernel, fp8_magnitude_kernel, fp8_quantise_kernel
from ldmseg_fast.kernels.configs import find_config
from ldmseg_fast.kernels.launch import UNIT, in_units, launch

LOG2_E = math.log2(math.e)
FEW_PROGRAMS = 132  # of 128 queries: at most one for each SM of an H100
FP8_ROWS = 128  # padded sequences of e4m3 copies are multiples of it; blocks of queries and keys divide it


def split_head(head_size: int, least: int = 16) -> tuple[int, int]:
    """Splits a head into (D1, D2), powers of two from `least` on: D1 alone covers it, or D1 + D2 do with less padding.

    D2 is at least a quarter of D1: a narrower strip beside 128 columns makes the compiler spill on sm_80.
    """
    whole = max(least, triton.next_power_of_2(head_size))
    first = whole // 2
    second = max(least, first // 4, triton.next_power_of_2(max(head_size - first, 1)))
    return (first, second) if first >= least and first + second < whole else (whole, least)


def forward_table(batch: int, heads: int, tokens: int) -> str:
    """Names the launch table of the forward pass: smaller blocks where a GPU has more multiprocessors than programs."""
    return "attention_forward_few" if batch * heads * triton.cdiv(tokens, 128) <= FEW_PROGRAMS else "attention_forward"


def shape_class(head_size: int) -> str:
    """Names the entries of the launch tables that serve a head size of up to 160."""
    return next(f"d{most}" for most in (48, 96, 128, 160) if head_size <= most)


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    image, row, head, _ = tensor.stride()
    return image // UNIT, row // UNIT, head // UNIT


def attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Launches the forward pass; arguments have passed `op.check`.

    Args:
        q: float16 or bfloat16 [B, N, heads, d]; copied only where its rows do not start on 16 bytes, as k and v are.
        k, v: [B, M, heads, d] of q's dtype.
        scale: of the scores.

    Returns:
        out [B, N, heads, d] of q's dtype, and the logsumexp of the scores, float32 [B, heads, N].
    """
    batch, tokens, heads, head_size = q.shape
    q, k, v = in_units(q), in_units(k), in_units(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    logsumexp = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    config = find_config(forward_table(batch, heads, tokens), shape_class(head_size))
    first, second = split_head(head_size)
    if config.constants["PADDED"] and first < head_size:
        first *= 2
    if config.constants["DESCRIBED"] and k.shape[1] == 1:  # a row's stride says nothing then
        config = replace(config, constants=config.constants | {"DESCRIBED": 0})
    launch(
        attention_forward_kernel,
        (triton.cdiv(tokens, config.constants["BLOCK_M"]), batch * heads),
        *(q, k, v, out, logsumexp, scale * LOG2_E, tokens, k.shape[1], heads),
        *(_strides(q), _strides(k), _strides(v)),
        config=config,
        D=head_size,
        D1=first,
        D2=second,
    )
    return out, logsumexp


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the backward pass, three kernels.

    Args:
        grad_out: [B, N, heads, d] of q's dtype, any strides.
        q, k, v, scale: as in `attention_forward`.
        out, logsumexp: what that returned.

    Returns:
        the gradients of q [B, N, heads, d], k and v [B, M, heads, d], of q's dtype.
    """
    batch, tokens, heads, head_size = q.shape
    keys = k.shape[1]
    grad_out, q, k, v, out = in_units(grad_out), in_units(q), in_units(k), in_units(v), out.contiguous()
    grad_q, grad_k, grad_v = (torch.empty(t.shape, dtype=q.dtype, device=q.device) for t in (q, k, v))
    delta = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)

    delta_config = find_config("attention_delta", shape_class(head_size))
    launch(
        attention_delta_kernel,
        (triton.cdiv(tokens, delta_config.constants["BLOCK_M"]), batch * heads),
        *(grad_out, out, delta, tokens, heads, _strides(grad_out)),
        config=delta_config,
        D=head_size,
        D_PADDED=triton.next_power_of_2(head_size),
    )
    first, second = split_head(head_size)
    split = {"D": head_size, "D1": first, "D2": second}
    inputs = (q, k, v, grad_out, logsumexp, delta)
    sizes = (scale, scale * LOG2_E, tokens, keys, heads)
    strides = (_strides(q), _strides(k), _strides(v), _strides(grad_out))
    config = find_config("attention_backward_kv", shape_class(head_size))
    grid = (triton.cdiv(keys, config.constants["BLOCK_N"]), batch * heads)
    launch(attention_backward_kv_kernel, grid, *inputs, grad_k, grad_v, *sizes, *strides, config=config, **split)
    config = find_config("attention_backward_q", shape_class(head_size))
    grid = (triton.cdiv(tokens, config.constants["BLOCK_M"]), batch * heads)
    launch(attention_backward_q_kernel, grid, *inputs, grad_q, *sizes, *strides, config=config, **split)
    return grad_q, grad_k, grad_v


def attention_fp8(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Launches the forward pass with e4m3 products, three kernels; arguments have passed `op.check_fp8`.

    Args:
        q: float16 or bfloat16 [B, N, heads, d].
        k, v: [B, M, heads, d] of q's dtype.
        scale: of the scores.

    Returns:
        [B, N, heads, d] of q's dtype.
    """
    batch, tokens, heads, head_size = q.shape
    q, k, v = in_units(q), in_units(k), in_units(v)
    keys, pairs = k.shape[1], batch * heads
    first, second = split_head(head_size, 32)
    v_first, v_second = split_head(head_size)
    columns = first if first >= head_size else first + second  # of q and k in e4m3
    tokens_padded, keys_padded = (triton.cdiv(rows, FP8_ROWS) * FP8_ROWS for rows in (tokens, keys))

    e4m3 = torch.float8_e4m3fn
    q8 = torch.empty((pairs, tokens_padded, columns), dtype=e4m3, device=q.device)
    k8 = torch.empty((pairs, keys_padded, columns), dtype=e4m3, device=q.device)
    v8 = torch.empty((pairs, head_size, keys_padded), dtype=e4m3, device=q.device)
    config = find_config("attention_fp8_prepare", "all")
    tile_columns = triton.next_power_of_2(columns)
    tile_rows = min(config.constants["ELEMENTS"] // tile_columns, FP8_ROWS)
    blocks = max(tokens_padded, keys_padded) // tile_rows
    magnitudes = torch.empty((pairs, 3, blocks), dtype=torch.float32, device=q.device)
    units = torch.empty((pairs, 3), dtype=torch.float32, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    emulate = q.device.type == "cpu"

    tile = {"D": head_size, "COLUMNS": tile_columns, "ROWS": tile_rows}
    strides = (_strides(q), _strides(k), _strides(v))
    grid = (blocks, pairs, 3)
    launch(fp8_magnitude_kernel, grid, q, k, v, magnitudes, tokens, keys, heads, *strides, config=config, **tile)
    launch(
        fp8_quantise_kernel,
        grid,
        *(q, k, v, magnitudes, q8, k8, v8, units, tokens, keys, heads, tokens_padded, keys_padded, *strides),
        config=config,
        DQ=columns,
        BLOCKS=triton.next_power_of_2(blocks),
        EMULATE=emulate,
        **tile,
    )
    config = find_config("attention_fp8", shape_class(head_size))
    launch(
        attention_fp8_kernel,
        (triton.cdiv(tokens, config.constants["BLOCK_M"]), pairs),
        *(q8, k8, v8, units, out, scale * LOG2_E, tokens, keys, heads, tokens_padded, keys_padded),
        config=config,
        D=head_size,
        D1=first,
        D2=second,
        DQ=columns,
        V1=v_first,
        V2=v_second,
        EMULATE=emulate,
    )
    return out
