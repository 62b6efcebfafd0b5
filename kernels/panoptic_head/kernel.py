"""Triton: both resizings, softmax and argmax for one tile of target pixels at a time, then two passes over the labels.

Two bilinear resizings of an axis are one sparse matrix. A program composes them for its tile: each target row is a sum
of at most four rows of logits, and the columns are one small matrix product, in which 3xTF32 keeps float32's precision.
Full-size logits therefore exist in registers only. All sums over pixels are of integers, so that results do not depend
on the order of the programs.
"""

import struct
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmseg_fast.kernels.configs import find_config
from ldmseg_fast.kernels.launch import launch
from ldmseg_fast.kernels.panoptic_head import reference

LOG2_E = tl.constexpr(1.4426950408889634)
PROBABILITY_SCALE = tl.constexpr(2.0**24)
MAX_SLOTS = 256
MAX_WINDOW = 128  # columns of logits under one tile


@triton.jit
def source(position, scale, size):
    """(low, high, weight of high) of torch's bilinear rule with align_corners=False"""
    point = tl.maximum((tl.cast(position, tl.float32) + 0.5) * scale - 0.5, 0.0)
    low = tl.minimum(point.to(tl.int32), size - 1)
    return low, tl.minimum(low + 1, size - 1), point - low.to(tl.float32)


@triton.jit
def leading_bits(value):
    """The part of a float32 that TF32 holds exactly; the rest is exact in float32 and nearly so in TF32"""
    return (value.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def resize_matrix(position, first, inner_scale, inner_size, outer_scale, outer_size, SIZE: tl.constexpr):
    """[positions, SIZE] the two resizings of one axis composed: weights of the inputs from `first` on"""
    low, high, blend = source(position, outer_scale, outer_size)
    near = resize_part(low, first, inner_scale, inner_size, SIZE)
    return (1.0 - blend)[:, None] * near + blend[:, None] * resize_part(high, first, inner_scale, inner_size, SIZE)


@triton.jit
def resize_part(position, first, scale, size, SIZE: tl.constexpr):
    """[positions, SIZE] one resizing"""
    low, high, weight = source(position, scale, size)
    index = (first + tl.arange(0, SIZE))[None, :]
    near = tl.where(index == low[:, None], (1.0 - weight)[:, None], 0.0)
    return near + tl.where(index == high[:, None], weight[:, None], 0.0)


@triton.jit
def row_weight(row, top, bottom, blend, scale, size):
    """What one row of logits weighs in the target row between network rows `top` and `bottom`"""
    low, high, weight = source(top, scale, size)
    near = tl.where(row == low, 1.0 - weight, 0.0) + tl.where(row == high, weight, 0.0)
    low, high, weight = source(bottom, scale, size)
    far = tl.where(row == low, 1.0 - weight, 0.0) + tl.where(row == high, weight, 0.0)
    return (1.0 - blend) * near + blend * far


@triton.jit
def panoptic_tile_kernel(
    logits_ptr,  # [B, Q, h, w]
    segmentation_ptr,  # [B, H, W] int32: slot + 1 where confident and not slot 0
    probability_ptr,  # [B, H, W] float32
    counts_ptr,  # [B, 6, Q] int32, zeros; this kernel adds to the second: sigmoid area
    mask_threshold,
    logit_threshold,  # the smallest logit whose sigmoid reaches mask_threshold
    slots,
    height,
    width,
    network_height,
    network_width,
    target_height,
    target_width,
    scale_y,  # h / network height
    scale_x,
    target_scale_y,  # network height / H
    target_scale_x,
    image_stride,
    slot_stride,
    row_stride,
    column_stride,
    ALL_SLOTS: tl.constexpr,  # Q is BLOCK_Q
    ALIGNMENT: tl.constexpr,  # of the window's first column
    WINDOW: tl.constexpr,  # columns of logits under the tile
    SOURCE_ROWS: tl.constexpr,  # rows of logits under one target row
    BLOCK_Q: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    first_x = tl.program_id(0) * BLOCK_X
    first_y = tl.program_id(1) * BLOCK_Y
    slot = tl.arange(0, BLOCK_Q)
    logits_ptr += image * image_stride

    x = first_x + tl.arange(0, BLOCK_X)
    in_row = x < target_width
    start, _, _ = source(first_x, target_scale_x, network_width)
    start, _, _ = source(start, scale_x, width)
    start = tl.multiple_of(start // ALIGNMENT * ALIGNMENT, ALIGNMENT)
    columns = resize_matrix(
        tl.minimum(x, target_width - 1), start, scale_x, width, target_scale_x, network_width, WINDOW
    )  # [BLOCK_X, WINDOW]
    columns_high = leading_bits(columns)
    columns_low = columns - columns_high
    column = start + tl.arange(0, WINDOW)
    inside = tl.broadcast_to((column < width)[:, None], [WINDOW, BLOCK_Q])
    if not ALL_SLOTS:
        inside = inside & (slot < slots)[None, :]
    window_ptr = logits_ptr + column[:, None].to(tl.int64) * column_stride + slot[None, :].to(tl.int64) * slot_stride

    above = tl.zeros([BLOCK_X, BLOCK_Q // 2], tl.int32)  # two slots share an int32: at most BLOCK_X BLOCK_Y < 2^16 each
    for y in range(first_y, tl.minimum(first_y + BLOCK_Y, target_height)):
        top, bottom, blend = source(y, target_scale_y, network_height)
        first_row, _, _ = source(top, scale_y, height)
        last_row, _, _ = source(bottom, scale_y, height)
        rows = tl.zeros([WINDOW, BLOCK_Q], tl.float32)
        for i in tl.static_range(SOURCE_ROWS):
            # three rows in sequence, or two pairs of neighbours that lie further apart
            row = first_row + i if SOURCE_ROWS == 3 or i < 2 else tl.maximum(last_row, first_row + 2) + (i - 2)
            weight = row_weight(row, top, bottom, blend, scale_y, height)
            row_ptr = window_ptr + tl.minimum(row, height - 1).to(tl.int64) * row_stride
            rows += weight * tl.load(row_ptr, mask=inside, other=0.0).to(tl.float32)

        rows_high = leading_bits(rows)
        logits = tl.dot(columns_high, rows - rows_high, input_precision="tf32")  # [BLOCK_X, BLOCK_Q]
        logits = tl.dot(columns_low, rows_high, logits, input_precision="tf32")
        logits = tl.dot(columns_high, rows_high, logits, input_precision="tf32")
        if not ALL_SLOTS:
            logits = tl.where((slot < slots)[None, :], logits, float("-inf"))
        best, label = tl.max(logits, 1, return_indices=True)
        probability = 1.0 / tl.sum(tl.math.exp2((logits - best[:, None]) * LOG2_E), 1)
        confident = (probability >= mask_threshold) & (label > 0)
        pixel = (image * target_height + y) * target_width + x
        tl.store(probability_ptr + pixel, probability, mask=in_row)
        tl.store(segmentation_ptr + pixel, tl.where(confident, label.to(tl.int32) + 1, 0), mask=in_row)
        reached = ((logits >= logit_threshold) & in_row[:, None]).to(tl.int32)
        even, odd = tl.split(tl.reshape(reached, [BLOCK_X, BLOCK_Q // 2, 2]))
        above += even + (odd << 16)

    pair = tl.sum(above, 0)  # [BLOCK_Q / 2]
    slot = tl.arange(0, BLOCK_Q // 2) * 2
    counts_ptr += (image * 6 + 1) * slots
    tl.atomic_add(counts_ptr + slot, pair & 0xFFFF, mask=pair & 0xFFFF != 0, sem="relaxed")
    tl.atomic_add(counts_ptr + slot + 1, pair >> 16, mask=pair >> 16 != 0, sem="relaxed")


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
    """One label of the tile after another: there are few, and one pass costs the same for any number of slots"""
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
    image = tl.program_id(1).to(tl.int64)
    overlap_threshold = tl.cast(overlap_threshold_bits, tl.int64).to(tl.float64, bitcast=True)
    counts_ptr += image * 6 * slots
    pixels = target_height.to(tl.int64) * target_width
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


@cache
def least_logit(threshold: float) -> float:
    """The smallest float32 whose sigmoid, as torch computes it, is at least `threshold`."""

    def reaches(logit: float) -> bool:
        return bool(torch.tensor(logit, dtype=torch.float32, device="cpu").sigmoid() >= threshold)

    low, high = -1e4, 1e4
    if reaches(low):
        return float("-inf")
    if not reaches(high):
        return float("inf")
    while True:
        middle = float(torch.tensor((low + high) / 2, dtype=torch.float32, device="cpu"))
        if middle in (low, high):
            return high
        low, high = (low, middle) if reaches(middle) else (middle, high)


@cache
def window_columns(width: int, network_width: int, target_width: int, block: int, alignment: int) -> int:
    """The most columns of logits, from an aligned one on, that a tile of `block` target columns touches."""

    def low(position: int, inner: int, outer: int) -> int:
        return min(int(max((position + 0.5) * (inner / outer) - 0.5, 0.0)), inner - 1)

    most = 1
    for first in range(0, target_width, block):
        last = min(first + block, target_width) - 1
        start = low(low(first, network_width, target_width), width, network_width) // alignment * alignment
        right = min(low(last, network_width, target_width) + 1, network_width - 1)
        most = max(most, min(low(right, width, network_width) + 1, width - 1) - start + 1)
    return most + 1  # the kernel's float32 may fall on the other side of an integer


def panoptic_head(
    mask_logits: Tensor,
    network_size: tuple[int, int],
    target_size: tuple[int, int],
    mask_threshold: float,
    count_threshold: int,
    overlap_threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, slots, height, width = mask_logits.shape
    block_q = max(16, triton.next_power_of_2(slots))
    slots_first = mask_logits.stride(1) == 1  # channels_last
    shape_class = ("q128" if block_q <= 128 else "q256") + ("_channels_last" if slots_first else "_planes")
    config = find_config("panoptic_head", shape_class)
    alignment = 1 if slots_first else 16 // mask_logits.element_size()
    block_x = config.constants["BLOCK_X"]
    window = window_columns(width, network_size[1], target_size[1], block_x, alignment)
    window = max(16, triton.next_power_of_2(window))
    if slots > MAX_SLOTS or window > MAX_WINDOW:  # shrinking by more than four, or a different model
        return reference.panoptic_head(
            mask_logits, network_size, target_size, mask_threshold, count_threshold, overlap_threshold
        )

    device = mask_logits.device
    segmentation = torch.empty((batch, *target_size), dtype=torch.int32, device=device)
    probability = torch.empty((batch, *target_size), dtype=torch.float32, device=device)
    counts = torch.zeros((batch, 6, slots), dtype=torch.int32, device=device)
    scores = torch.zeros((batch, slots), dtype=torch.int64, device=device)
    launch(
        panoptic_tile_kernel,
        (triton.cdiv(target_size[1], block_x), triton.cdiv(target_size[0], config.constants["BLOCK_Y"]), batch),
        *(mask_logits, segmentation, probability, counts, mask_threshold, least_logit(mask_threshold)),
        *(slots, height, width, *network_size, *target_size),
        *(height / network_size[0], width / network_size[1]),
        *(network_size[0] / target_size[0], network_size[1] / target_size[1]),
        *mask_logits.stride(),
        config=config,
        ALL_SLOTS=slots == block_q,
        ALIGNMENT=alignment,
        WINDOW=window,
        SOURCE_ROWS=3 if height <= network_size[0] else 4,
        BLOCK_Q=block_q,
    )
    config = find_config("panoptic_statistics", "all")
    launch(
        panoptic_statistics_kernel,
        (
            triton.cdiv(target_size[1], config.constants["BLOCK_X"]),
            triton.cdiv(target_size[0], config.constants["BLOCK_Y"]),
            batch,
        ),
        *(segmentation, probability, counts, scores, slots, *target_size),
        config=config,
    )
    area = torch.empty((batch, slots), dtype=torch.int32, device=device)
    box = torch.empty((batch, slots, 4), dtype=torch.int32, device=device)
    score = torch.empty((batch, slots), dtype=torch.float32, device=device)
    config = find_config("panoptic_filter", "all")
    launch(
        panoptic_filter_kernel,
        (triton.cdiv(target_size[0] * target_size[1], config.constants["BLOCK"]), batch),
        *(segmentation, counts, scores, area, box, score, count_threshold),
        *(struct.unpack("<q", struct.pack("<d", overlap_threshold))[0], slots, *target_size),
        config=config,
        BLOCK_Q=block_q,
    )
    return segmentation, probability, area, box, score
