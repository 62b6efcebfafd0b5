"""What the attention kernels share: tiles of one head's rows, and where a program's image and head begin.

The strides of a tensor are a tuple (image, row, head) in units of 8 elements, so that the compiler knows that every row
starts on 16 bytes.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tiles_of(
    matrix_ptr,  # [N, D]
    rows,  # N
    stride,  # between rows, in units of 8 elements
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """Makes what `load_tile` reads tiles [ROWS, COLUMNS] of one head's rows from.

    That is the pointer, or a descriptor, by which the tensor memory accelerator of sm_90 copies a whole tile for one
    thread's instruction. Where there is none the compiler makes pointers of it again.
    """
    if DESCRIBED:
        row_stride = tl.cast(stride, tl.int64) * 8
        return tl.make_tensor_descriptor(matrix_ptr, [rows, D], [row_stride, 1], [ROWS, COLUMNS])
    else:  # a branch that is not taken is not compiled
        return matrix_ptr


@triton.jit
def load_tile(
    matrix_ptr,  # [N, D], or what `tiles_of` made of it
    row,  # first row of the tile
    rows,  # N
    stride,  # between rows, in units of 8 elements
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,  # column
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    DESCRIBED: tl.constexpr = False,
):
    """Loads [ROWS, COLUMNS] of one head's rows, zero outside the matrix."""
    if DESCRIBED:
        return matrix_ptr.load([row, FIRST])
    else:
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
    """Stores [ROWS, COLUMNS] to one head's rows, in their dtype; what lies outside the matrix is dropped."""
    local = tl.arange(0, ROWS)
    column = FIRST + tl.arange(0, COLUMNS)
    pointers = matrix_ptr + tl.cast(row, tl.int64) * (stride * 8) + local[:, None] * (stride * 8) + column[None, :]
    inside = (row + local < rows)[:, None] & (column < D)[None, :]
    tl.store(pointers, value.to(matrix_ptr.dtype.element_ty), mask=inside)


@triton.jit
def this_head(heads):
    """Finds the head of this program: (image and head as one number, image, head), int64."""
    pair = tl.program_id(1)
    return pair.to(tl.int64), (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)


@triton.jit
def at_head(tensor_ptr, strides, image, head):
    """Finds one head of a tensor [B, N, heads, D]: (a pointer to its first row, the stride of its rows)."""
    return tensor_ptr + (image * strides[0] + head * strides[2]) * 8, strides[1]
