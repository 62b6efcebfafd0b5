"""Bilinear samples of logits and of ids at points, in registers: what all of these kernels share."""

import triton
import triton.language as tl


@triton.jit
def corner(x, y, width, height, DX: tl.constexpr, DY: tl.constexpr):
    """Finds (column, row, weight) of one of the four neighbours of points in [0, 1]; the weight is 0 outside."""
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
def load_image(image_ptr, images):
    """Loads a row's image: (index, whether there is such an image); the index is 0 where there is none."""
    image = tl.load(image_ptr)
    known = (image >= 0) & (image < images)
    return tl.where(known, image, 0), known


@triton.jit
def load_points(points_ptr, point, inside):
    """Loads x and y; points beyond the end lie in the middle of the image."""
    x = tl.load(points_ptr + point * 2, mask=inside, other=0.5)
    y = tl.load(points_ptr + point * 2 + 1, mask=inside, other=0.5)
    return x, y


@triton.jit
def sample_slots(logits_ptr, slot, x, y, slots, height, width, slot_stride, row_stride, column_stride):
    """Samples [P, Q] logits at points, -inf for slots beyond the last."""
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
    """Samples [P] logits of one plane."""
    value = tl.zeros([x.shape[0]], tl.float32)
    for i in tl.static_range(4):
        column, row, weight = corner(x, y, width, height, i % 2, i // 2)
        pixel = row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
        value += weight * tl.load(plane_ptr + pixel, mask=inside & (weight > 0), other=0.0).to(tl.float32)
    return value


@triton.jit
def sample_mask(ids_ptr, slot, x, y, inside, height, width):
    """Samples the binary mask `ids == slot` bilinearly, [P]."""
    value = tl.zeros([x.shape[0]], tl.float32)
    for i in tl.static_range(4):
        column, row, weight = corner(x, y, width, height, i % 2, i // 2)
        mask = inside & (weight > 0)
        ids = tl.load(ids_ptr + row.to(tl.int64) * width + column, mask=mask, other=0).to(tl.int64)
        value += tl.where(mask & (ids == slot), weight, 0.0)
    return value


@triton.jit
def load_target(ids_ptr, x, y, inside, slots, height, width):
    """Loads the id of the pixel that holds each point, [P]; 0 for void and for what is no slot."""
    column = tl.minimum(tl.maximum(tl.floor(x * width).to(tl.int32), 0), width - 1)
    row = tl.minimum(tl.maximum(tl.floor(y * height).to(tl.int32), 0), height - 1)
    ids = tl.load(ids_ptr + row.to(tl.int64) * width + column, mask=inside, other=0).to(tl.int64)
    return tl.where((ids > 0) & (ids < slots), ids, 0)
