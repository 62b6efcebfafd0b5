"""What the attention kernels share: tiles of one head's rows, and where a program's image and head begin.

Strides are in units of 8 elements, so that the compiler knows that every row starts on 16 bytes.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(
    matrix_ptr,  # [N, D]
    row,  # first row of the tile
    rows,  # N
    stride,  # between rows, in units of 8 elements
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,  # column
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """[ROWS, COLUMNS], zero outside the matrix"""
    local = tl.arange(0, ROWS)
    column = FIRST + tl.arange(0, COLUMNS)
    base = matrix_ptr + tl.cast(row, tl.int64) * (stride * 8)
    pointers = base + local[:, None] * (stride * 8) + column[None, :]
    inside = (row + local < rows)[:, None]
    if FIRST + COLUMNS > D:
        if MASK_ROWS:
            return tl.load(pointers, mask=inside & (column < D)[None, :], other=0.0)
        return tl.load(pointers, mask=(column < D)[None, :], other=0.0)
    if MASK_ROWS:
        return tl.load(pointers, mask=inside, other=0.0)
    return tl.load(pointers)


@triton.jit
def store_tile(
    matrix_ptr,
    value,
    row,
    rows,
    stride,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
):
    local = tl.arange(0, ROWS)
    column = FIRST + tl.arange(0, COLUMNS)
    pointers = matrix_ptr + tl.cast(row, tl.int64) * (stride * 8) + local[:, None] * (stride * 8) + column[None, :]
    inside = (row + local < rows)[:, None] & (column < D)[None, :]
    tl.store(pointers, value.to(matrix_ptr.dtype.element_ty), mask=inside)


@triton.jit
def at_head(matrix_ptr, image, head, image_stride, head_stride):
    """The first row of one head"""
    return matrix_ptr + (image * image_stride + head * head_stride) * 8
