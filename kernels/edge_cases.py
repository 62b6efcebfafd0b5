"""Launches where every size is 1: the compiler turns such arguments into constants, which must build as well."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ldmseg_fast.kernels.attention import host as attention
from ldmseg_fast.kernels.ddim_step import host as ddim_step
from ldmseg_fast.kernels.group_norm_silu import host as group_norm_silu
from ldmseg_fast.kernels.mask_bits import host as mask_bits
from ldmseg_fast.kernels.panoptic_head import host as panoptic_head
from ldmseg_fast.kernels.point_loss import host as point_loss


def edge_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """(kernel folder, something that launches its kernels on meta tensors)"""
    half, single, one = _meta(1, 1, 1, 1), _meta(1, 1, 1, 1, dtype=torch.float32), _meta(1, dtype=torch.int64)
    ids, table = _meta(1, 1, 1, dtype=torch.uint8), _meta(1, 1, dtype=torch.uint8)
    for channels_last in (False, True):
        yield "mask_bits", partial(mask_bits.encode_mask_bits, ids, 1, table, torch.float16, channels_last)
    yield "mask_bits", partial(mask_bits.decode_mask_bits, half)
    yield "attention", partial(_attention, _meta(1, 1, 1, 8))
    yield "panoptic_head", partial(panoptic_head.panoptic_head, half, (1, 1), (1, 1), 0.5, 512, 0.5)
    for size in (1, 256):  # a group at once, and in tiles
        yield "group_norm_silu", partial(_group_norm_silu, _meta(1, 1, size, size), _meta(1, 1))
    coefficients = _meta(1, 4, dtype=torch.float32)
    yield (
        "ddim_step",
        partial(ddim_step.ddim_step, half, single, half, one, coefficients, "epsilon", True, torch.float16),
    )
    yield "point_loss", partial(_point_loss, half, ids, one, _meta(1, 1, 2, dtype=torch.float32))


def _meta(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention(q: Tensor) -> None:
    out, logsumexp = attention.attention_forward(q, q, q, 1.0)
    attention.attention_backward(out, q, q, q, out, logsumexp, 1.0)
    attention.attention_fp8(q, q, q, 1.0)


def _group_norm_silu(x: Tensor, scale: Tensor) -> None:
    weight = scale[0]
    y, mean, rstd = group_norm_silu.group_norm_silu_forward(x, weight, weight, 1, 1e-5, scale, scale, x, True)
    group_norm_silu.group_norm_silu_backward(y, x, mean, rstd, weight, weight, scale, scale, True)


def _point_loss(logits: Tensor, ids: Tensor, one: Tensor, points: Tensor) -> None:
    point_loss.point_logits(logits, points)
    point_loss.point_margin(logits, points)
    point_loss.slot_logits(logits, one, one, points)
    loss, _, logsumexp = point_loss.sample_ce_forward(logits, ids, points)
    point_loss.sample_ce_backward(loss, logits, ids, points, logsumexp)
    loss, _, sums = point_loss.sample_bce_dice_forward(logits, ids, one, one, points)
    point_loss.sample_bce_dice_backward(loss, loss, logits, ids, one, one, points, sums)
