"""Triton: binary cross entropy and Dice of one segment a row, forward and backward."""

import triton
import triton.language as tl

from ldmseg_fast.kernels.point_loss.sampling import corner, load_image, load_points, sample_mask, sample_plane


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
    images,
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
    """Computes both losses of one row over all its points."""
    mask_row = tl.program_id(0).to(tl.int64)
    image, known = load_image(image_ptr + mask_row, images)
    slot = tl.load(slot_ptr + mask_row)
    present = known & (slot > 0) & (slot < slots)
    plane_ptr = logits_ptr + image * image_stride + slot * slot_stride
    ids_ptr += image * ids_height * ids_width
    points_ptr += mask_row * points * 2

    bce = tl.zeros([BLOCK_P], tl.float32)
    sum_pt = tl.zeros([BLOCK_P], tl.float32)
    sum_p = tl.zeros([BLOCK_P], tl.float32)
    sum_t = tl.zeros([BLOCK_P], tl.float32)
    for first in range(0, points, BLOCK_P):
        point = first + tl.arange(0, BLOCK_P)
        inside = point < tl.where(present, points, 0)  # Triton 3.9's interpreter spreads no bool
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
    images,
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
    """Adds the gradients of one block of points of one row."""
    mask_row = tl.program_id(1).to(tl.int64)
    image, known = load_image(image_ptr + mask_row, images)
    slot = tl.load(slot_ptr + mask_row)
    point = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = point < tl.where(known & (slot > 0) & (slot < slots), points, 0)
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
