"""Triton: both resizings, softmax and argmax for one tile of target pixels at a time."""

import triton
import triton.language as tl

from ldmseg_fast.kernels.panoptic_head import reference

LARGEST = tl.constexpr(reference.LARGEST)
UNSOUND_WEIGHT = tl.constexpr(reference.UNSOUND_WEIGHT)
FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def source(position, scale, size):
    """Finds (low, high, weight of high) by torch's bilinear rule with align_corners=False."""
    point = tl.maximum((tl.cast(position, tl.float32) + 0.5) * scale - 0.5, 0.0)
    low = tl.minimum(point.to(tl.int32), size - 1)
    return low, tl.minimum(low + 1, size - 1), point - low.to(tl.float32)


@triton.jit
def leading_bits(value):
    """Keeps the part of a float32 that TF32 holds exactly; the rest is exact in float32 and nearly so in TF32."""
    return (value.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def resize_matrix(position, first, inner_scale, inner_size, outer_scale, outer_size, SIZE: tl.constexpr):
    """Composes the two resizings of one axis: [positions, SIZE] weights of the inputs from `first` on."""
    low, high, blend = source(position, outer_scale, outer_size)
    near = resize_part(low, first, inner_scale, inner_size, SIZE)
    return (1.0 - blend)[:, None] * near + blend[:, None] * resize_part(high, first, inner_scale, inner_size, SIZE)


@triton.jit
def resize_part(position, first, scale, size, SIZE: tl.constexpr):
    """Makes the matrix of one resizing, [positions, SIZE]."""
    low, high, weight = source(position, scale, size)
    index = (first + tl.arange(0, SIZE))[None, :]
    near = tl.where(index == low[:, None], (1.0 - weight)[:, None], 0.0)
    return near + tl.where(index == high[:, None], weight[:, None], 0.0)


@triton.jit
def row_weight(row, top, bottom, blend, scale, size):
    """Computes what one row of logits weighs in the target row between network rows `top` and `bottom`."""
    low, high, weight = source(top, scale, size)
    near = tl.where(row == low, 1.0 - weight, 0.0) + tl.where(row == high, weight, 0.0)
    low, high, weight = source(bottom, scale, size)
    far = tl.where(row == low, 1.0 - weight, 0.0) + tl.where(row == high, weight, 0.0)
    return (1.0 - blend) * near + blend * far


@triton.jit
def split_columns(columns, dtype: tl.constexpr):
    """Splits float32 weights into three parts of `dtype` whose sum is nearly exact; of float32 the parts fit TF32."""
    if dtype == tl.float32:
        high = leading_bits(columns)
        return high, columns - high, high
    high = columns.to(dtype)
    rest = columns - high.to(tl.float32)
    middle = rest.to(dtype)
    return high, middle, (rest - middle.to(tl.float32)).to(dtype)


@triton.jit
def resized_row(row_ptr, inside, high, middle, low, CAREFUL: tl.constexpr):
    """Resizes one row of logits, [WINDOW, BLOCK_Q], to the tile's columns, by weights [BLOCK_X, WINDOW] in parts.

    Returns:
        float32 [BLOCK_X, BLOCK_Q], and [BLOCK_X]: the weight of cells with logits that are not finite, where CAREFUL.
    """
    dtype: tl.constexpr = row_ptr.dtype.element_ty
    row = tl.load(row_ptr, mask=inside, other=0.0)
    unsound = tl.zeros([high.shape[0]], tl.float32)
    if CAREFUL:
        wide = row.to(tl.float32)
        cell = tl.max(tl.where(tl.abs(wide) <= FLOAT32_MAX, 0, 1), 1)
        unsound = tl.sum((high.to(tl.float32) + middle.to(tl.float32)) * cell.to(tl.float32)[None, :], 1)
        row = tl.where((cell > 0)[:, None], 0.0, tl.minimum(tl.maximum(wide, -LARGEST), LARGEST)).to(dtype)
    if dtype == tl.float32:  # 3xTF32
        leading = leading_bits(row)
        logits = tl.dot(high, row - leading, input_precision="tf32")
        logits = tl.dot(middle, leading, logits, input_precision="tf32")
        logits = tl.dot(high, leading, logits, input_precision="tf32")
    else:  # products of halves are exact in float32; two parts of float16 hold what three of bfloat16 do
        logits = tl.dot(middle, row)
        if dtype == tl.bfloat16:
            logits = tl.dot(low, row, logits)
        logits = tl.dot(high, row, logits)
    return logits, unsound


@triton.jit
def panoptic_tile_kernel(
    logits_ptr,  # [B, Q, h, w]
    segmentation_ptr,  # [B, H, W] int32: slot + 1 where confident and not slot 0
    probability_ptr,  # [B, H, W] float32
    counts_ptr,  # [B, 6, Q] int32, zeros; this kernel adds to the second: sigmoid area
    unsure_ptr,  # [B, tiles down, tiles across] int32: 1 where a tile met a logit that is not finite
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
    CAREFUL: tl.constexpr,  # do the unsure tiles
    INTERPRETED: tl.constexpr,
    ALL_SLOTS: tl.constexpr,  # Q is BLOCK_Q
    ALIGNMENT: tl.constexpr,  # of the window's first column
    WINDOW: tl.constexpr,  # columns of logits under the tile
    SOURCE_ROWS: tl.constexpr,  # rows of logits under one target row
    BLOCK_Q: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BY_EQUALITY: tl.constexpr,  # label: the lowest slot whose logit equals the best, in the place of a ranking of pairs
):
    """Labels one tile of target pixels, and counts its pixels above the sigmoid threshold of each slot.

    In the matrix product, a logit that is not finite makes NaNs of whole rows of the tile. A second launch, which is
    CAREFUL, does such tiles again: the logit's cell counts as zeros, and pixels that take something from it are void.
    """
    image = tl.program_id(2).to(tl.int64)
    unsure_ptr += (image * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    if CAREFUL:  # noqa: SIM102 (only a condition of constants alone is decided by the compiler)
        if tl.load(unsure_ptr) == 0:
            return
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
    high, middle, low = split_columns(columns, logits_ptr.dtype.element_ty)
    column = start + tl.arange(0, WINDOW)
    inside = tl.broadcast_to((column < width)[:, None], [WINDOW, BLOCK_Q])
    if not ALL_SLOTS:
        inside = inside & (slot < slots)[None, :]
    window_ptr = logits_ptr + column[:, None].to(tl.int64) * column_stride + slot[None, :].to(tl.int64) * slot_stride

    above = tl.zeros([BLOCK_X, BLOCK_Q // 2], tl.int32)  # two slots share an int32: at most BLOCK_X BLOCK_Y < 2^16 each
    unsure = tl.zeros([BLOCK_X], tl.int32)
    # three neighbouring rows, resized, of which `held` is the last; each is resized once
    lower = tl.zeros([BLOCK_X, BLOCK_Q], tl.float32)
    unsound_lower = tl.zeros([BLOCK_X], tl.float32)
    upper, middle_row, unsound_upper, unsound_middle = lower, lower, unsound_lower, unsound_lower
    held = -1
    for y in range(first_y, tl.minimum(first_y + BLOCK_Y, target_height)):
        top, bottom, blend = source(y, target_scale_y, network_height)
        first_row, _, _ = source(top, scale_y, height)
        if SOURCE_ROWS == 3:
            while held < first_row + 2:
                held = tl.maximum(held, first_row - 1) + 1
                upper, middle_row = middle_row, lower
                unsound_upper, unsound_middle = unsound_middle, unsound_lower
                row_ptr = window_ptr + tl.minimum(held, height - 1).to(tl.int64) * row_stride
                lower, unsound_lower = resized_row(row_ptr, inside, high, middle, low, CAREFUL)
            first = row_weight(first_row, top, bottom, blend, scale_y, height)
            second = row_weight(first_row + 1, top, bottom, blend, scale_y, height)
            third = row_weight(first_row + 2, top, bottom, blend, scale_y, height)
            logits = first * upper + second * middle_row + third * lower
            unsound = first * unsound_upper + second * unsound_middle + third * unsound_lower
        else:  # two pairs of neighbours, far apart
            last_row, _, _ = source(bottom, scale_y, height)
            logits = tl.zeros([BLOCK_X, BLOCK_Q], tl.float32)
            unsound = tl.zeros([BLOCK_X], tl.float32)
            for i in tl.static_range(4):
                row = first_row + i if i < 2 else tl.maximum(last_row, first_row + 2) + (i - 2)
                weight = row_weight(row, top, bottom, blend, scale_y, height)
                row_ptr = window_ptr + tl.minimum(row, height - 1).to(tl.int64) * row_stride
                resized, unsound_row = resized_row(row_ptr, inside, high, middle, low, CAREFUL)
                logits += weight * resized
                unsound += weight * unsound_row
        if not ALL_SLOTS:
            logits = tl.where((slot < slots)[None, :], logits, float("-inf"))
        ranked = logits
        if INTERPRETED:  # numpy refuses to rank NaNs alone; a GPU gives any label, and the tile is done again
            ranked = tl.where(logits == logits, logits, float("-inf"))
        if BY_EQUALITY:
            best = tl.max(ranked, 1)
            label = tl.min(tl.where(ranked == best[:, None], slot[None, :], BLOCK_Q - 1), 1)
        else:
            best, label = tl.max(ranked, 1, return_indices=True)
        probability = 1.0 / tl.sum(tl.math.exp2((logits - best[:, None]) * LOG2_E), 1)
        counted = in_row
        if CAREFUL:
            sound = unsound <= UNSOUND_WEIGHT
            probability = tl.where(sound, probability, 0.0)
            label = tl.where(sound, label, 0)
            counted = in_row & sound
        else:
            unsure |= (probability != probability).to(tl.int32)
        confident = (probability >= mask_threshold) & (label > 0)
        pixel = (image * target_height + y) * target_width + x
        tl.store(probability_ptr + pixel, probability, mask=in_row)
        tl.store(segmentation_ptr + pixel, tl.where(confident, label.to(tl.int32) + 1, 0), mask=in_row)
        reached = ((logits >= logit_threshold) & counted[:, None]).to(tl.int32)
        even, odd = tl.split(tl.reshape(reached, [BLOCK_X, BLOCK_Q // 2, 2]))
        above += even + (odd << 16)

    pair = tl.sum(above, 0)  # [BLOCK_Q / 2]
    if not CAREFUL:
        again = tl.max(unsure, 0)
        tl.store(unsure_ptr, again)
        pair = tl.where(again > 0, 0, pair)
    slot = tl.arange(0, BLOCK_Q // 2) * 2
    if not ALL_SLOTS:  # a threshold of 0 is reached by slots that do not exist, too
        pair = tl.where(slot + 1 < slots, pair, tl.where(slot < slots, pair & 0xFFFF, 0))
    counts_ptr += (image * 6 + 1) * slots
    tl.atomic_add(counts_ptr + slot, pair & 0xFFFF, mask=pair & 0xFFFF != 0, sem="relaxed")
    tl.atomic_add(counts_ptr + slot + 1, pair >> 16, mask=pair >> 16 != 0, sem="relaxed")
