"""Starts the kernels that encode and decode (analog bits: Chen et al., arXiv 2208.04202)."""

import torch
import triton
from torch import Tensor

from ldmseg_fast.kernels.configs import find_config
from ldmseg_fast.kernels.launch import launch
from ldmseg_fast.kernels.mask_bits.forward import (
    decode_channels_last_kernel,
    decode_kernel,
    encode_channels_last_kernel,
    encode_planes_kernel,
)


def encode_mask_bits(
    segment_ids: Tensor,
    num_bits: int,
    table: Tensor | None,
    dtype: torch.dtype,
    channels_last: bool,
    category_ids: Tensor | None = None,
    category_bits: int = 0,
) -> Tensor:
    """Launches the encoding; arguments have passed `op.check_encode`.

    Args:
        segment_ids: uint8, int16, int32 or int64 [B, H, W].
        num_bits: K.
        table: integer [B, T], or None; an id without an entry becomes void.
        dtype: float16, bfloat16 or float32.
        channels_last: memory format of the result.
        category_ids: integer [B, H, W], or None.
        category_bits: Kc, 0 without `category_ids`.

    Returns:
        `dtype` [B, K + Kc, H, W] in {-1, +1}, 0 where the new id, or the category, is 0.
    """
    batch, height, width = segment_ids.shape
    segment_ids = segment_ids.contiguous()
    table = None if table is None else table.contiguous()
    category_ids = None if category_ids is None else category_ids.contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    bits = torch.empty(
        (batch, num_bits + category_bits, height, width),
        dtype=dtype,
        device=segment_ids.device,
        memory_format=memory_format,
    )
    config = find_config("encode_mask_bits", "channels_last" if channels_last else "planes")
    launch(
        encode_channels_last_kernel if channels_last else encode_planes_kernel,
        (triton.cdiv(height * width, config.constants["BLOCK"]), batch),
        *(segment_ids, segment_ids if table is None else table),
        *(segment_ids if category_ids is None else category_ids, bits, height * width),
        1 if table is None else table.shape[1],
        config=config,
        NUM_BITS=num_bits,
        CATEGORY_BITS=category_bits,
        HAS_TABLE=table is not None,
    )
    return bits


def decode_mask_bits(bits: Tensor) -> Tensor:
    """Launches the decoding of float [B, K, H, W], either memory format, to int32 [B, H, W]."""
    batch, num_bits, height, width = bits.shape
    if bits.stride(2) != width * bits.stride(3):
        bits = bits.clone(memory_format=torch.contiguous_format)  # contiguous() keeps the stride of a width of 1
    ids = torch.empty((batch, height, width), dtype=torch.int32, device=bits.device)
    config = find_config("decode_mask_bits", "all")
    grid = (triton.cdiv(height * width, config.constants["BLOCK"]), batch)
    if bits.stride(1) == 1 and bits.stride(3) == num_bits:
        arguments = (bits, ids, height * width, bits.stride(0))
        launch(decode_channels_last_kernel, grid, *arguments, config=config, NUM_BITS=num_bits)
        return ids
    launch(
        decode_kernel,
        grid,
        *(bits, ids, height * width, bits.stride(0), bits.stride(1), bits.stride(3)),
        config=config,
        NUM_BITS=num_bits,
        BITS_PADDED=triton.next_power_of_2(num_bits),
    )
    return ids
