"""Plain torch: what the kernel must equal."""

import torch
from torch import Tensor


def encode_mask_bits(
    segment_ids: Tensor,  # [B, H, W] integer
    num_bits: int,
    table: Tensor | None,  # [B, T] integer, id -> new id
    dtype: torch.dtype,
    channels_last: bool,
    category_ids: Tensor | None = None,  # [B, H, W] integer
    category_bits: int = 0,  # Kc
) -> Tensor:  # [B, K + Kc, H, W]
    """Encodes ids as bits, least significant first (Chen et al., arXiv 2208.04202).

    Arguments and result as in `op.encode_mask_bits`: integer [B, H, W] to `dtype` [B, K + Kc, H, W].
    A table looks ids up unchecked.
    """
    if table is not None:
        segment_ids = table.gather(1, segment_ids.flatten(1).long()).view(segment_ids.shape)
    bits = _planes(segment_ids, num_bits, dtype)
    if category_ids is not None:
        bits = torch.cat([bits, _planes(category_ids, category_bits, dtype)], 1)
    return bits.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _planes(ids: Tensor, num_bits: int, dtype: torch.dtype) -> Tensor:  # [B, H, W] -> [B, K, H, W]
    ids = ids.int()[:, None]  # [B, 1, H, W]
    shifts = torch.arange(num_bits, dtype=torch.int32, device=ids.device)[:, None, None]  # [K, 1, 1]
    return (ids >> shifts & 1).to(dtype).mul_(2).sub_(1).mul_(ids != 0)


def decode_mask_bits(bits: Tensor) -> Tensor:  # [B, K, H, W] -> [B, H, W]
    """Decodes float [B, K, H, W] to int32 [B, H, W]: bit k is `bits[:, k] > 0`."""
    shifts = torch.arange(bits.shape[1], dtype=torch.int32, device=bits.device)[:, None, None]  # [K, 1, 1]
    return ((bits > 0).int() << shifts).sum(1, dtype=torch.int32)
