"""Triton: area, box and score of each slot from the labels, then the filter of segments."""

import triton
import triton.language as tl

PROBABILITY_SCALE = tl.constexpr(2.0**24)


@triton.jit
def panoptic_statistics_kernel(
    segmentation_ptr,  # [B, H, W] int32
    probability_ptr,  # [B, H, W] float32
    counts_ptr,  # [B, 6, Q] int32, zeros: area, (sigmoid area), W - left, right + 1, H - top, bottom + 1
    scores_ptr,  # [B, Q] int64, zeros: summed probability
    slots,
    target_height,
    target_width,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
):
    """Adds one tile to area, box and score of its labels.

    It takes one label after another: there are few, and one pass costs the same for any number of slots.
    """
    image = tl.program_id(2).to(tl.int64)
    x = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)[None, :]
    y = tl.program_id(1) * BLOCK_Y + tl.arange(0, BLOCK_Y)[:, None]
    inside = (y < target_height) & (x < target_width)
    pixel = (image * target_height + y) * target_width + x
    label = tl.load(segmentation_ptr + pixel, mask=inside, other=0)
    probability = tl.load(probability_ptr + pixel, mask=inside, other=0.0)
    fixed = (probability * PROBABILITY_SCALE).to(tl.int32)
    counts_ptr += image * 6 * slots - 1  # labels are slot + 1
    scores_ptr += image * slots - 1

    current = tl.max(tl.max(label, 1), 0)
    while current > 0:
        mine = label == current
        tl.atomic_add(counts_ptr + current, tl.sum(tl.sum(mine.to(tl.int32), 1), 0), sem="relaxed")
        left = tl.max(tl.max(tl.where(mine, target_width - x, 0), 1), 0)
        right = tl.max(tl.max(tl.where(mine, x + 1, 0), 1), 0)
        top = tl.max(tl.max(tl.where(mine, target_height - y, 0), 1), 0)
        bottom = tl.max(tl.max(tl.where(mine, y + 1, 0), 1), 0)
        tl.atomic_max(counts_ptr + 2 * slots + current, left, sem="relaxed")
        tl.atomic_max(counts_ptr + 3 * slots + current, right, sem="relaxed")
        tl.atomic_max(counts_ptr + 4 * slots + current, top, sem="relaxed")
        tl.atomic_max(counts_ptr + 5 * slots + current, bottom, sem="relaxed")
        total = tl.sum(tl.sum(tl.where(mine, fixed, 0).to(tl.int64), 1), 0)
        tl.atomic_add(scores_ptr + current, total, sem="relaxed")
        label = tl.where(mine, 0, label)
        current = tl.max(tl.max(label, 1), 0)


@triton.jit
def is_kept(counts_ptr, slot, slots, count_threshold, overlap_threshold, inside):
    """Decides which slots stay: (kept, area), shaped as `slot`."""
    area = tl.load(counts_ptr + slot, mask=inside, other=0)
    sigmoid_area = tl.load(counts_ptr + slots + slot, mask=inside, other=0)
    overlap = area.to(tl.float64) / tl.maximum(sigmoid_area, 1).to(tl.float64)
    kept = (area >= count_threshold) & ((sigmoid_area == 0) | (overlap >= overlap_threshold))
    return kept & (slot > 0) & (area > 0) & inside, area


@triton.jit
def panoptic_filter_kernel(
    segmentation_ptr,  # [B, H, W] int32, filtered in place
    counts_ptr,  # [B, 6, Q] int32
    scores_ptr,  # [B, Q] int64
    area_ptr,  # [B, Q] int32
    box_ptr,  # [B, Q, 4] int32
    score_ptr,  # [B, Q] float32
    count_threshold,
    overlap_threshold_bits,  # a float64 as integer: a float argument would be rounded to float32
    slots,
    target_height,
    target_width,
    BLOCK_Q: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Makes the pixels of dropped segments void; the first program of an image writes its area, box and score."""
    image = tl.program_id(1).to(tl.int64)
    overlap_threshold = tl.cast(overlap_threshold_bits, tl.int64).to(tl.float64, bitcast=True)
    counts_ptr += image * 6 * slots
    pixels = tl.cast(target_height, tl.int64) * target_width
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    value = tl.load(segmentation_ptr + image * pixels + pixel, mask=inside, other=0)
    kept, _unused = is_kept(counts_ptr, value - 1, slots, count_threshold, overlap_threshold, inside & (value > 0))
    tl.store(segmentation_ptr + image * pixels + pixel, tl.where(kept, value, 0), mask=inside)

    if tl.program_id(0) == 0:
        slot = tl.arange(0, BLOCK_Q)
        known = slot < slots
        alive, area = is_kept(counts_ptr, slot, slots, count_threshold, overlap_threshold, known)
        area = tl.where(alive, area, 0)
        left = target_width - tl.load(counts_ptr + 2 * slots + slot, mask=known, other=0)
        right = tl.load(counts_ptr + 3 * slots + slot, mask=known, other=0)
        top = target_height - tl.load(counts_ptr + 4 * slots + slot, mask=known, other=0)
        bottom = tl.load(counts_ptr + 5 * slots + slot, mask=known, other=0)
        total = tl.load(scores_ptr + image * slots + slot, mask=known, other=0).to(tl.float64) / PROBABILITY_SCALE
        score = (total / tl.maximum(area, 1).to(tl.float64)).to(tl.float32)
        row = image * slots + slot
        tl.store(area_ptr + row, area, mask=known)
        tl.store(score_ptr + row, tl.where(alive, score, 0.0), mask=known)
        tl.store(box_ptr + row * 4, tl.where(alive, left, 0), mask=known)
        tl.store(box_ptr + row * 4 + 1, tl.where(alive, top, 0), mask=known)
        tl.store(box_ptr + row * 4 + 2, tl.where(alive, right - left, 0), mask=known)
        tl.store(box_ptr + row * 4 + 3, tl.where(alive, bottom - top, 0), mask=known)
