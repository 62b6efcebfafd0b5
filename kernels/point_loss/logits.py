"""Triton: logits at points, by which the points of the losses are chosen."""

import triton
import triton.language as tl

from ldmseg_fast.kernels.point_loss.sampling import load_image, load_points, sample_plane, sample_slots


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
    """Samples all slots, or their margin, at one block of points of one image."""
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
    images,
    slots,
    height,
    width,
    image_stride,
    slot_stride,
    row_stride,
    column_stride,
    BLOCK_P: tl.constexpr,
):
    """Samples one row's slot at one block of its points."""
    mask_row = tl.program_id(1).to(tl.int64)
    point = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = point < points
    image, known = load_image(image_ptr + mask_row, images)
    slot = tl.maximum(tl.load(slot_ptr + mask_row), 0)
    plane_ptr = logits_ptr + image * image_stride + slot * slot_stride
    x, y = load_points(points_ptr + mask_row * points * 2, point, inside)
    wanted = point < tl.where(known & (slot < slots), points, 0)  # Triton 3.9's interpreter spreads no bool
    value = sample_plane(plane_ptr, x, y, wanted, height, width, row_stride, column_stride)
    tl.store(out_ptr + mask_row * points + point, value, mask=inside)
