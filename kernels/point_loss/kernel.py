"""Triton: logits are gathered at points and used in registers; gradients go back by atomic additions in float32.

The order of those additions is not fixed, so gradients differ in the last bits from run to run (as those of
`F.grid_sample` do). Logits are read in either memory format; channels_last, where the slots of a pixel lie together, is
the fast one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmseg_fast.kernels.configs import find_config
from ldmseg_fast.kernels.launch import launch


@triton.jit
def corner(x, y, width, height, DX: tl.constexpr, DY: tl.constexpr):
    """(column, row, weight) of one of the four neighbours of points in [0, 1]; the weight is 0 outside"""
    x = x * width - 0.5
    y = y * height - 0.5
    left = tl.floor(x)
    top = tl.floor(y)
    weight_x = x - left if DX else 1.0 - (x - left)
    weight_y = y - top if DY else 1.0 - (y - top)
    column = left.to(tl.int32) + DX
    row = top.to(tl.int32) + DY
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return column, row, tl.where(inside, weight_x * weight_y, 0.0)


@triton.jit
def load_points(points_ptr, point, inside):
    """x, y; points beyond the end lie in the middle of the image"""
    x = tl.load(points_ptr + point * 2, mask=inside, other=0.5)
    y = tl.load(points_ptr + point * 2 + 1, mask=inside, other=0.5)
    return x, y


@triton.jit
def sample_slots(logits_ptr, slot, x, y, slots, height, width, slot_stride, row_stride, column_stride):
    """[P, Q] logits at points, -inf for slots beyond the last"""
    known = slot < slots
    value = tl.zeros([x.shape[0], slot.shape[0]], tl.float32)
    for i in tl.static_range(4):
        column, row, weight = corner(x, y, width, height, i % 2, i // 2)
        pixel = row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
        pointers = logits_ptr + pixel[:, None] + slot.to(tl.int64)[None, :] * slot_stride
        mask = (weight > 0)[:, None] & known[None, :]
        value += weight[:, None] * tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return tl.where(known[None, :], value, float("-inf"))


@triton.jit
def sample_plane(plane_ptr, x, y, inside, height, width, row_stride, column_stride):
    """[P] logits of one plane"""
    value = tl.zeros([x.shape[0]], tl.float32)
    for i in tl.static_range(4):
        column, row, weight = corner(x, y, width, height, i % 2, i // 2)
        pixel = row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
        value += weight * tl.load(plane_ptr + pixel, mask=inside & (weight > 0), other=0.0).to(tl.float32)
    return value


@triton.jit
def sample_mask(ids_ptr, slot, x, y, inside, height, width):
    """[P] the binary mask `ids == slot`, sampled bilinearly"""
    value = tl.zeros([x.shape[0]], tl.float32)
    for i in tl.static_range(4):
        column, row, weight = corner(x, y, width, height, i % 2, i // 2)
        mask = inside & (weight > 0)
        ids = tl.load(ids_ptr + row.to(tl.int64) * width + column, mask=mask, other=0).to(tl.int64)
        value += tl.where(mask & (ids == slot), weight, 0.0)
    return value


@triton.jit
def load_target(ids_ptr, x, y, inside, slots, height, width):
    """[P] id of the pixel that holds each point, 0 for void and for what is no slot"""
    column = tl.minimum(tl.maximum(tl.floor(x * width).to(tl.int32), 0), width - 1)
    row = tl.minimum(tl.maximum(tl.floor(y * height).to(tl.int32), 0), height - 1)
    ids = tl.load(ids_ptr + row.to(tl.int64) * width + column, mask=inside, other=0).to(tl.int64)
    return tl.where((ids > 0) & (ids < slots), ids, 0)


@triton.jit
def point_logits_kernel(
    logits_ptr,  # [B, Q, h, w]
    points_ptr,  # [B, P, 2]
    out_ptr,  # [B, Q, P], or [B, P] with MARGIN
    points,  # P
    slots,  # Q
    height,
    width,
    image_stride,
    slot_stride,
    row_stride,
    column_stride,
    MARGIN: tl.constexpr,  # write best - second best only
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    point = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = point < points
    x, y = load_points(points_ptr + image * points * 2, point, inside)
    logits_ptr += image * image_stride
    best = tl.full([BLOCK_P], float("-inf"), tl.float32)
    second = tl.full([BLOCK_P], float("-inf"), tl.float32)
    for first in range(0, slots, BLOCK_Q):
        slot = first + tl.arange(0, BLOCK_Q)
        value = sample_slots(logits_ptr, slot, x, y, slots, height, width, slot_stride, row_stride, column_stride)
        if MARGIN:
            top, index = tl.max(value, 1, return_indices=True)
            rest = tl.where(tl.arange(0, BLOCK_Q)[None, :] == index[:, None], float("-inf"), value)
            second = tl.maximum(tl.maximum(second, tl.max(rest, 1)), tl.minimum(best, top))
            best = tl.maximum(best, top)
        else:
            pointers = out_ptr + (image * slots + slot[None, :]) * points + point[:, None]
            tl.store(pointers, value, mask=inside[:, None] & (slot < slots)[None, :])
    if MARGIN:
        tl.store(out_ptr + image * points + point, best - second, mask=inside)


@triton.jit
def slot_logits_kernel(
    logits_ptr,  # [B, Q, h, w]
    image_ptr,  # [M]
    slot_ptr,  # [M]
    points_ptr,  # [M, P, 2]
    out_ptr,  # [M, P]
    points,
    height,
    width,
    image_stride,
    slot_stride,
    row_stride,
    column_stride,
    BLOCK_P: tl.constexpr,
):
    mask_row = tl.program_id(1).to(tl.int64)
    point = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = point < points
    plane_ptr = logits_ptr + tl.load(image_ptr + mask_row) * image_stride
    plane_ptr += tl.maximum(tl.load(slot_ptr + mask_row), 0) * slot_stride
    x, y = load_points(points_ptr + mask_row * points * 2, point, inside)
    value = sample_plane(plane_ptr, x, y, inside, height, width, row_stride, column_stride)
    tl.store(out_ptr + mask_row * points + point, value, mask=inside)


@triton.jit
def ce_forward_kernel(
    logits_ptr,  # [B, Q, h, w]
    ids_ptr,  # [B, H, W]
    points_ptr,  # [B, P, 2]
    logsumexp_ptr,  # [B, P]
    loss_ptr,  # [B, blocks]
    count_ptr,  # [B, blocks]
    points,
    slots,
    height,
    width,
    ids_height,
    ids_width,
    image_stride,
    slot_stride,
    row_stride,
    column_stride,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    point = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = point < points
    x, y = load_points(points_ptr + image * points * 2, point, inside)
    logits_ptr += image * image_stride
    target = load_target(ids_ptr + image * ids_height * ids_width, x, y, inside, slots, ids_height, ids_width)

    top = tl.full([BLOCK_P], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_P], tl.float32)
    target_logit = tl.zeros([BLOCK_P], tl.float32)
    for first in range(0, slots, BLOCK_Q):
        slot = first + tl.arange(0, BLOCK_Q)
        value = sample_slots(logits_ptr, slot, x, y, slots, height, width, slot_stride, row_stride, column_stride)
        new_top = tl.maximum(top, tl.max(value, 1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(value - new_top[:, None]), 1)
        target_logit += tl.sum(tl.where(slot.to(tl.int64)[None, :] == target[:, None], value, 0.0), 1)
        top = new_top
    logsumexp = top + tl.log(total)
    counted = inside & (target > 0)
    tl.store(logsumexp_ptr + image * points + point, logsumexp, mask=inside)
    block = image * tl.num_programs(0) + tl.program_id(0)
    tl.store(loss_ptr + block, tl.sum(tl.where(counted, logsumexp - target_logit, 0.0)))
    tl.store(count_ptr + block, tl.sum(counted.to(tl.float32)))


@triton.jit
def ce_backward_kernel(
    grad_loss_ptr,  # scalar
    logits_ptr,  # [B, Q, h, w]
    ids_ptr,  # [B, H, W]
    points_ptr,  # [B, P, 2]
    logsumexp_ptr,  # [B, P]
    grad_ptr,  # [B, Q, h, w] float32
    points,
    slots,
    height,
    width,
    ids_height,
    ids_width,
    image_stride,
    slot_stride,
    row_stride,
    column_stride,
    grad_image_stride,
    grad_slot_stride,
    grad_row_stride,
    grad_column_stride,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    point = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = point < points
    x, y = load_points(points_ptr + image * points * 2, point, inside)
    logits_ptr += image * image_stride
    grad_ptr += image * grad_image_stride
    target = load_target(ids_ptr + image * ids_height * ids_width, x, y, inside, slots, ids_height, ids_width)
    logsumexp = tl.load(logsumexp_ptr + image * points + point, mask=inside, other=0.0)
    grad_loss = tl.where(inside & (target > 0), tl.load(grad_loss_ptr), 0.0)
    for first in range(0, slots, BLOCK_Q):
        slot = first + tl.arange(0, BLOCK_Q)
        value = sample_slots(logits_ptr, slot, x, y, slots, height, width, slot_stride, row_stride, column_stride)
        grad = tl.exp(value - logsumexp[:, None])
        grad = (grad - (slot.to(tl.int64)[None, :] == target[:, None]).to(tl.float32)) * grad_loss[:, None]
        for i in tl.static_range(4):
            column, row, weight = corner(x, y, width, height, i % 2, i // 2)
            pixel = row.to(tl.int64) * grad_row_stride + column.to(tl.int64) * grad_column_stride
            pointers = grad_ptr + pixel[:, None] + slot.to(tl.int64)[None, :] * grad_slot_stride
            mask = (inside & (target > 0) & (weight > 0))[:, None] & (slot < slots)[None, :]
            tl.atomic_add(pointers, weight[:, None] * grad, mask=mask, sem="relaxed")


@triton.jit
def bce_dice_forward_kernel(
    logits_ptr,  # [B, Q, h, w]
    ids_ptr,  # [B, H, W]
    image_ptr,  # [M]
    slot_ptr,  # [M]
    points_ptr,  # [M, P, 2]
    bce_ptr,  # [M]
    dice_ptr,  # [M]
    sums_ptr,  # [M, 3]
    points,
    slots,
    height,
    width,
    ids_height,
    ids_width,
    image_stride,
    slot_stride,
    row_stride,
    column_stride,
    BLOCK_P: tl.constexpr,
):
    mask_row = tl.program_id(0).to(tl.int64)
    image = tl.load(image_ptr + mask_row)
    slot = tl.load(slot_ptr + mask_row)
    present = (slot > 0) & (slot < slots)
    plane_ptr = logits_ptr + image * image_stride + slot * slot_stride
    ids_ptr += image * ids_height * ids_width
    points_ptr += mask_row * points * 2

    bce = tl.zeros([BLOCK_P], tl.float32)
    sum_pt = tl.zeros([BLOCK_P], tl.float32)
    sum_p = tl.zeros([BLOCK_P], tl.float32)
    sum_t = tl.zeros([BLOCK_P], tl.float32)
    for first in range(0, points, BLOCK_P):
        point = first + tl.arange(0, BLOCK_P)
        inside = (point < points) & present
        x, y = load_points(points_ptr, point, inside)
        logit = sample_plane(plane_ptr, x, y, inside, height, width, row_stride, column_stride)
        t = sample_mask(ids_ptr, slot, x, y, inside, ids_height, ids_width)
        p = tl.where(inside, 1.0 / (1.0 + tl.exp(-logit)), 0.0)
        loss = tl.maximum(logit, 0.0) - logit * t + tl.log(1.0 + tl.exp(-tl.abs(logit)))
        bce += tl.where(inside, loss, 0.0)
        sum_pt += p * t
        sum_p += p
        sum_t += t
    pt = tl.sum(sum_pt)
    p = tl.sum(sum_p)
    t = tl.sum(sum_t)
    dice = 1.0 - (2.0 * pt + 1.0) / (p + t + 1.0)
    tl.store(bce_ptr + mask_row, tl.sum(bce) / points)
    tl.store(dice_ptr + mask_row, tl.where(present, dice, 0.0))
    tl.store(sums_ptr + mask_row * 3, pt)
    tl.store(sums_ptr + mask_row * 3 + 1, p)
    tl.store(sums_ptr + mask_row * 3 + 2, t)


@triton.jit
def bce_dice_backward_kernel(
    grad_bce_ptr,  # scalar
    grad_dice_ptr,  # scalar
    logits_ptr,  # [B, Q, h, w]
    ids_ptr,  # [B, H, W]
    image_ptr,  # [M]
    slot_ptr,  # [M]
    points_ptr,  # [M, P, 2]
    sums_ptr,  # [M, 3]
    grad_ptr,  # [B, Q, h, w] float32
    points,
    slots,
    height,
    width,
    ids_height,
    ids_width,
    image_stride,
    slot_stride,
    row_stride,
    column_stride,
    grad_image_stride,
    grad_slot_stride,
    grad_row_stride,
    grad_column_stride,
    BLOCK_P: tl.constexpr,
):
    mask_row = tl.program_id(1).to(tl.int64)
    image = tl.load(image_ptr + mask_row)
    slot = tl.load(slot_ptr + mask_row)
    point = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (point < points) & (slot > 0) & (slot < slots)
    x, y = load_points(points_ptr + mask_row * points * 2, point, inside)
    plane_ptr = logits_ptr + image * image_stride + slot * slot_stride
    logit = sample_plane(plane_ptr, x, y, inside, height, width, row_stride, column_stride)
    t = sample_mask(ids_ptr + image * ids_height * ids_width, slot, x, y, inside, ids_height, ids_width)
    p = 1.0 / (1.0 + tl.exp(-logit))

    numerator = 2.0 * tl.load(sums_ptr + mask_row * 3) + 1.0
    denominator = tl.load(sums_ptr + mask_row * 3 + 1) + tl.load(sums_ptr + mask_row * 3 + 2) + 1.0
    grad = tl.load(grad_bce_ptr) * (p - t) / points
    grad += tl.load(grad_dice_ptr) * (numerator / denominator - 2.0 * t) / denominator * p * (1.0 - p)
    grad_ptr += image * grad_image_stride + slot * grad_slot_stride
    for i in tl.static_range(4):
        column, row, weight = corner(x, y, width, height, i % 2, i // 2)
        pixel = row.to(tl.int64) * grad_row_stride + column.to(tl.int64) * grad_column_stride
        tl.atomic_add(grad_ptr + pixel, weight * grad, mask=inside & (weight > 0), sem="relaxed")


def _format(mask_logits: Tensor) -> str:
    return "channels_last" if mask_logits.stride(1) == 1 else "planes"


def point_logits(mask_logits: Tensor, points: Tensor) -> Tensor:
    return _point_logits(mask_logits, points, margin=False)


def point_margin(mask_logits: Tensor, points: Tensor) -> Tensor:
    return _point_logits(mask_logits, points, margin=True)


def _point_logits(mask_logits: Tensor, points: Tensor, margin: bool) -> Tensor:
    batch, slots, height, width = mask_logits.shape
    count = points.shape[1]
    out = torch.empty((batch, count) if margin else (batch, slots, count), dtype=torch.float32, device=points.device)
    config = find_config("point_logits", _format(mask_logits))
    launch(
        point_logits_kernel,
        (triton.cdiv(count, config.constants["BLOCK_P"]), batch),
        *(mask_logits, points.contiguous(), out, count, slots, height, width, *mask_logits.stride()),
        config=config,
        MARGIN=margin,
    )
    return out


def slot_logits(mask_logits: Tensor, image_index: Tensor, slots: Tensor, points: Tensor) -> Tensor:
    rows, count = points.shape[:2]
    out = torch.empty((rows, count), dtype=torch.float32, device=points.device)
    config = find_config("slot_logits", "all")
    launch(
        slot_logits_kernel,
        (triton.cdiv(count, config.constants["BLOCK_P"]), rows),
        *(mask_logits, image_index.contiguous(), slots.contiguous(), points.contiguous(), out, count),
        *(*mask_logits.shape[2:], *mask_logits.stride()),
        config=config,
    )
    return out


def sample_ce_forward(mask_logits: Tensor, segment_ids: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, slots, height, width = mask_logits.shape
    count = points.shape[1]
    config = find_config("sample_ce", _format(mask_logits))
    blocks = triton.cdiv(count, config.constants["BLOCK_P"])
    logsumexp = torch.empty((batch, count), dtype=torch.float32, device=points.device)
    losses, counts = (torch.empty((batch, blocks), dtype=torch.float32, device=points.device) for _ in range(2))
    launch(
        ce_forward_kernel,
        (blocks, batch),
        *(mask_logits, segment_ids.contiguous(), points.contiguous(), logsumexp, losses, counts),
        *(count, slots, height, width, *segment_ids.shape[1:], *mask_logits.stride()),
        config=config,
    )
    return losses.sum(), counts.sum(), logsumexp


def sample_ce_backward(
    grad_loss: Tensor, mask_logits: Tensor, segment_ids: Tensor, points: Tensor, logsumexp: Tensor
) -> Tensor:
    batch, slots, height, width = mask_logits.shape
    count = points.shape[1]
    grad = torch.zeros_like(mask_logits, dtype=torch.float32)
    config = find_config("sample_ce", _format(mask_logits))
    launch(
        ce_backward_kernel,
        (triton.cdiv(count, config.constants["BLOCK_P"]), batch),
        *(grad_loss, mask_logits, segment_ids.contiguous(), points.contiguous(), logsumexp, grad),
        *(count, slots, height, width, *segment_ids.shape[1:], *mask_logits.stride(), *grad.stride()),
        config=config,
    )
    return grad.to(mask_logits.dtype)


def sample_bce_dice_forward(
    mask_logits: Tensor, segment_ids: Tensor, image_index: Tensor, slots: Tensor, points: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows, count = points.shape[:2]
    bce, dice = (torch.empty(rows, dtype=torch.float32, device=points.device) for _ in range(2))
    sums = torch.empty((rows, 3), dtype=torch.float32, device=points.device)
    launch(
        bce_dice_forward_kernel,
        (rows,),
        *(mask_logits, segment_ids.contiguous(), image_index.contiguous(), slots.contiguous(), points.contiguous()),
        *(bce, dice, sums, count, *mask_logits.shape[1:], *segment_ids.shape[1:], *mask_logits.stride()),
        config=find_config("sample_bce_dice_forward", "all"),
    )
    return bce.sum(), dice.sum(), sums


def sample_bce_dice_backward(
    grad_bce: Tensor,
    grad_dice: Tensor,
    mask_logits: Tensor,
    segment_ids: Tensor,
    image_index: Tensor,
    slots: Tensor,
    points: Tensor,
    sums: Tensor,
) -> Tensor:
    rows, count = points.shape[:2]
    grad = torch.zeros_like(mask_logits, dtype=torch.float32)
    config = find_config("sample_bce_dice_backward", "all")
    launch(
        bce_dice_backward_kernel,
        (triton.cdiv(count, config.constants["BLOCK_P"]), rows),
        *(grad_bce, grad_dice, mask_logits, segment_ids.contiguous(), image_index.contiguous(), slots.contiguous()),
        *(points.contiguous(), sums, grad, count, *mask_logits.shape[1:], *segment_ids.shape[1:]),
        *(*mask_logits.stride(), *grad.stride()),
        config=config,
    )
    return grad.to(mask_logits.dtype)
