"""Triton: ids are read once and each bit is written once, in 16-byte accesses, in either memory format."""

import triton
import triton.language as tl


@triton.jit
def load_codes(ids_ptr, table_ptr, table_size, inside, HAS_TABLE: tl.constexpr):
    """Loads int32 ids, remapped; an id without an entry in the table becomes void."""
    ids = tl.load(ids_ptr, mask=inside, other=0)
    if HAS_TABLE:
        ids = ids.to(tl.int64)
        known = (ids >= 0) & (ids < table_size)
        ids = tl.load(table_ptr + ids, mask=inside & known, other=0)
    return ids.to(tl.int32)


@triton.jit
def bit_values(codes, k, dtype: tl.constexpr):
    """Makes -1, 0 or +1 by selection only: converting integers is slow on a GPU."""
    one, minus_one, zero = tl.full([1], 1.0, dtype), tl.full([1], -1.0, dtype), tl.full([1], 0.0, dtype)
    return tl.where(codes == 0, zero, tl.where((codes >> k & 1) != 0, one, minus_one))


@triton.jit
def encode_planes_kernel(
    ids_ptr,  # [B, P] integer
    table_ptr,  # [B, T] integer
    categories_ptr,  # [B, P] integer; not read where CATEGORY_BITS is 0
    bits_ptr,  # [B, K + Kc, P]
    num_pixels,  # P
    table_size,  # T
    NUM_BITS: tl.constexpr,
    CATEGORY_BITS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Encodes one block of pixels to planes."""
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < num_pixels
    codes = load_codes(
        ids_ptr + image * num_pixels + pixel, table_ptr + image * table_size, table_size, inside, HAS_TABLE
    )
    first = image * (NUM_BITS + CATEGORY_BITS)
    for k in tl.static_range(NUM_BITS):
        plane_ptr = bits_ptr + (first + k) * num_pixels
        tl.store(plane_ptr + pixel, bit_values(codes, k, bits_ptr.dtype.element_ty), mask=inside)
    if CATEGORY_BITS > 0:
        codes = tl.load(categories_ptr + image * num_pixels + pixel, mask=inside, other=0).to(tl.int32)
        for k in tl.static_range(CATEGORY_BITS):
            plane_ptr = bits_ptr + (first + NUM_BITS + k) * num_pixels
            tl.store(plane_ptr + pixel, bit_values(codes, k, bits_ptr.dtype.element_ty), mask=inside)


@triton.jit
def encode_channels_last_kernel(
    ids_ptr,  # [B, P] integer
    table_ptr,  # [B, T] integer
    categories_ptr,  # [B, P] integer; not read where CATEGORY_BITS is 0
    bits_ptr,  # [B, P, K + Kc]
    num_pixels,  # P
    table_size,  # T
    NUM_BITS: tl.constexpr,
    CATEGORY_BITS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    BLOCK: tl.constexpr,  # pixels
):
    """Encodes one block of pixels to channels_last.

    A thread takes 8 pixels, which are K + Kc vectors of 8 values: which pixel and bit a value is, the compiler knows.
    """
    ALL_BITS: tl.constexpr = NUM_BITS + CATEGORY_BITS
    image = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    eight = tl.arange(0, 8)[None, :]
    group = tl.arange(0, BLOCK // 8)[:, None]
    pixel = first + group * 8 + eight
    codes = load_codes(
        *(ids_ptr + image * num_pixels + pixel, table_ptr + image * table_size, table_size),
        *(pixel < num_pixels, HAS_TABLE),
    )
    categories = codes
    if CATEGORY_BITS > 0:
        place = image * num_pixels + pixel
        categories = tl.load(categories_ptr + place, mask=pixel < num_pixels, other=0).to(tl.int32)
    bits_ptr += (image * num_pixels + first) * ALL_BITS
    values = (num_pixels - first) * ALL_BITS
    for i in tl.static_range(ALL_BITS):
        value = i * 8 + eight  # of the 8 (K + Kc) values of a group
        plane = value % ALL_BITS
        code = tl.zeros([BLOCK // 8, 8], tl.int32)
        for p in tl.static_range(i * 8 // ALL_BITS, (i * 8 + 7) // ALL_BITS + 1):
            mine = tl.sum(tl.where(eight == p, codes, 0), 1)[:, None]  # the code of pixel p: nothing is added
            if CATEGORY_BITS > 0:
                other = tl.sum(tl.where(eight == p, categories, 0), 1)[:, None]
                mine = tl.where(plane < NUM_BITS, mine, other)
            code = tl.where(value // ALL_BITS == p, mine, code)
        offset = group * (8 * ALL_BITS) + value
        shift = tl.where(plane < NUM_BITS, plane, plane - NUM_BITS)
        bit = bit_values(code, shift, bits_ptr.dtype.element_ty)
        tl.store(bits_ptr + offset, bit, mask=offset < values)


@triton.jit
def decode_kernel(
    bits_ptr,  # [B, K, P], any strides
    ids_ptr,  # [B, P] int32
    num_pixels,  # P
    image_stride,
    plane_stride,
    pixel_stride,
    NUM_BITS: tl.constexpr,
    BITS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Decodes one block of pixels of any strides."""
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BITS_PADDED)
    inside = pixel < num_pixels
    pointers = (
        bits_ptr
        + image * image_stride
        + pixel.to(tl.int64)[:, None] * pixel_stride
        + k.to(tl.int64)[None, :] * plane_stride
    )
    bits = tl.load(pointers, mask=inside[:, None] & (k < NUM_BITS)[None, :], other=0.0).to(tl.float32)
    ids = tl.sum((bits > 0).to(tl.int32) << k[None, :], 1)
    tl.store(ids_ptr + image * num_pixels + pixel, ids, mask=inside)


@triton.jit
def decode_channels_last_kernel(
    bits_ptr,  # [B, P, K]
    ids_ptr,  # [B, P] int32
    num_pixels,  # P
    image_stride,
    NUM_BITS: tl.constexpr,
    BLOCK: tl.constexpr,  # pixels
):
    """Decodes one block of pixels in channels_last; a thread takes 8, as in `encode_channels_last_kernel`."""
    image = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    eight = tl.arange(0, 8)[None, :]
    group = tl.arange(0, BLOCK // 8)[:, None]
    bits_ptr += image * image_stride + first * NUM_BITS
    values = (num_pixels - first) * NUM_BITS
    codes = tl.zeros([BLOCK // 8, 8], tl.int32)
    for i in tl.static_range(NUM_BITS):
        value = i * 8 + eight  # of the 8 K values of a group
        offset = group * (8 * NUM_BITS) + value
        bit = tl.load(bits_ptr + offset, mask=offset < values, other=0.0).to(tl.float32) > 0
        part = bit.to(tl.int32) << (value % NUM_BITS)
        for p in tl.static_range(i * 8 // NUM_BITS, (i * 8 + 7) // NUM_BITS + 1):
            mine = tl.sum(tl.where(value // NUM_BITS == p, part, 0), 1)[:, None]
            codes += tl.where(eight == p, mine, 0)
    pixel = first + group * 8 + eight
    tl.store(ids_ptr + image * num_pixels + pixel, codes, mask=pixel < num_pixels)
