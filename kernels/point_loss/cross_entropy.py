"""Triton: cross entropy over the slots at points, forward and backward; targets may have weights."""

import triton
import triton.language as tl

from ldmseg_fast.kernels.point_loss.sampling import corner, load_points, load_target, sample_slots


@triton.jit
def ce_forward_kernel(
    logits_ptr,  # [B, Q, h, w]
    ids_ptr,  # [B, H, W]
    points_ptr,  # [B, P, 2]
    weights_ptr,  # [Q] float32; not read unless WEIGHTED
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
    WEIGHTED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Computes the summed cross entropy of one block of points of one image."""
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
    loss = tl.where(counted, logsumexp - target_logit, 0.0)
    if WEIGHTED:
        loss *= tl.load(weights_ptr + target, mask=counted, other=0.0)
    tl.store(loss_ptr + block, tl.sum(loss))
    tl.store(count_ptr + block, tl.sum(counted.to(tl.float32)))


@triton.jit
def ce_backward_kernel(
    grad_loss_ptr,  # scalar
    logits_ptr,  # [B, Q, h, w]
    ids_ptr,  # [B, H, W]
    points_ptr,  # [B, P, 2]
    weights_ptr,  # [Q] float32; not read unless WEIGHTED
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
    WEIGHTED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Adds the gradients of one block of points of one image."""
    image = tl.program_id(1).to(tl.int64)
    point = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = point < points
    x, y = load_points(points_ptr + image * points * 2, point, inside)
    logits_ptr += image * image_stride
    grad_ptr += image * grad_image_stride
    target = load_target(ids_ptr + image * ids_height * ids_width, x, y, inside, slots, ids_height, ids_width)
    logsumexp = tl.load(logsumexp_ptr + image * points + point, mask=inside, other=0.0)
    counted = inside & (target > 0)
    grad_loss = tl.where(counted, tl.load(grad_loss_ptr), 0.0)
    if WEIGHTED:
        grad_loss *= tl.load(weights_ptr + target, mask=counted, other=0.0)
    for first in range(0, slots, BLOCK_Q):
        slot = first + tl.arange(0, BLOCK_Q)
        value = sample_slots(logits_ptr, slot, x, y, slots, height, width, slot_stride, row_stride, column_stride)
        grad = tl.exp(value - logsumexp[:, None])
        grad = (grad - (slot.to(tl.int64)[None, :] == target[:, None]).to(tl.float32)) * grad_loss[:, None]
        for i in tl.static_range(4):
            column, row, weight = corner(x, y, width, height, i % 2, i // 2)
            pixel = row.to(tl.int64) * grad_row_stride + column.to(tl.int64) * grad_column_stride
            pointers = grad_ptr + pixel[:, None] + slot.to(tl.int64)[None, :] * grad_slot_stride
            mask = (counted & (weight > 0))[:, None] & (slot < slots)[None, :]
            tl.atomic_add(pointers, weight[:, None] * grad, mask=mask, sem="relaxed")
