"""Reads and writes masks as COCO writes them: run lengths (RLE) and polygons, bit for bit as pycocotools does.

The format is cocodataset.org/#format-data, "Object Detection": `segmentation` is {"size": [H, W], "counts": ...}, run
lengths down the columns that begin with a run of zeros, as a list or as compressed text, or a list of polygons
[x0, y0, x1, y1, ...] in pixels. The rasteriser and the text are those of pycocotools' maskApi.c
(github.com/cocodataset/cocoapi): a polygon's corners are rounded to fifths of a pixel.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldmseg_fast.errors import PanopticFormatError
from ldmseg_fast.native import _C, warn_slow
from ldmseg_fast.panoptic.format import MAX_PIXELS, MAX_SIDE
from ldmseg_fast.panoptic.shapes import compress_counts

SCALE = 5  # the grid of corners
_MOST_CROSSINGS = 2**27
_MOST_CHARACTERS = 7  # of a run length


def mask_of_rle(rle: Mapping[str, Any], where: str) -> np.ndarray:
    """Decodes run lengths, compressed (text or bytes) or not (a list), as bool [H, W].

    Args:
        rle: {"size": [H, W], "counts": ...}.
        where: what an error names, such as the file and the annotation.

    Raises:
        PanopticFormatError: names `where`: no size or one beyond `MAX_SIDE` and `MAX_PIXELS`, characters that are none
            of the format, counts that are negative, no whole numbers, or do not add up to the size.
    """
    height, width, counts = rle_parts(rle, where)
    if _C is not None:
        try:
            return _C.mask_of_counts(counts, height, width).view(bool)
        except _C.BadMask as error:
            raise PanopticFormatError(f"{where}: {error}; write the mask again") from None
    warn_slow()
    try:
        if isinstance(counts, bytes):
            counts = _counts_of_text(counts)
        ends = _ends_of_counts(counts, height * width)
    except ValueError as error:
        raise PanopticFormatError(f"{where}: {error}; write the mask again") from None
    mask = np.zeros(height * width, bool)
    for begin, end in zip(ends[0:-1:2].tolist(), ends[1::2].tolist()):
        mask[begin:end] = True
    return np.ascontiguousarray(mask.reshape(width, height).T)


def mask_of_polygons(polygons: Sequence[Any], height: int, width: int, where: str) -> np.ndarray:
    """Rasterises polygons, bool [H, W]; where several overlap, the mask is their union.

    Args:
        polygons: each [x0, y0, x1, y1, ...], or [N, 2], in pixels. Parts outside the picture are cut off.
        height, width: of the picture, in pixels.
        where: what an error names.

    Raises:
        PanopticFormatError: names `where`: no polygon, one of under 3 points or of an odd number of values, values that
            are no finite numbers, or a size beyond `MAX_SIDE` and `MAX_PIXELS`.
    """
    height, width = _checked_size((height, width), where)
    outlines = outlines_of(polygons, where)
    if _C is not None:
        try:
            return _C.mask_of_outlines(outlines, height, width).view(bool)
        except _C.BadMask as error:
            raise PanopticFormatError(f"{where}: {error}") from None
    warn_slow()
    mask = np.zeros(height * width, bool)
    try:
        for outline in outlines:
            toggles = np.bincount(_toggles(outline, height, width), minlength=height * width + 1)
            mask |= np.cumsum(toggles[: height * width]) % 2 == 1
    except ValueError as error:
        raise PanopticFormatError(f"{where}: {error}") from None
    return np.ascontiguousarray(mask.reshape(width, height).T)


def rle_of_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encodes a mask, bool [H, W], as {"size": [H, W], "counts": str}.

    Raises:
        PanopticFormatError: no such mask.
    """
    if mask.ndim != 2 or mask.size == 0 or mask.dtype != np.bool_:
        raise PanopticFormatError(f"expected a mask bool [H, W], got {list(mask.shape)} {mask.dtype}")
    flat = mask.T.ravel()
    ends = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0] if not flat[0] else [0, 0], ends, [flat.size]])).tolist()
    return {"size": list(mask.shape), "counts": compress_counts(counts).decode("ascii")}


def rle_parts(rle: Any, where: str) -> tuple[int, int, Any]:
    """Returns height, width and counts, which are bytes or int64 [N], checked as far as types and the size go.

    Raises:
        PanopticFormatError: see `mask_of_rle`.
    """
    if not isinstance(rle, Mapping) or "size" not in rle or "counts" not in rle:
        raise PanopticFormatError(f"{where}: run lengths need `size` and `counts`, got {rle!r:.80}")
    height, width = _checked_size(rle["size"], where)
    counts = rle["counts"]
    if isinstance(counts, str):
        if not counts.isascii():
            raise PanopticFormatError(f"{where}: `counts` has a character that run lengths do not have; write it again")
        return height, width, counts.encode("ascii")
    if isinstance(counts, bytes | bytearray):
        return height, width, bytes(counts)
    return height, width, _whole_numbers(counts, where)


def outlines_of(polygons: Any, where: str) -> list[np.ndarray]:
    """Turns polygons into float64 [N, 2] each.

    Raises:
        PanopticFormatError: see `mask_of_polygons`.
    """
    if isinstance(polygons, str | bytes | Mapping) or not isinstance(polygons, Sequence | np.ndarray):
        raise PanopticFormatError(f"{where}: expected a list of polygons, got {polygons!r:.80}")
    if len(polygons) == 0:
        raise PanopticFormatError(f"{where}: there is no polygon; leave the annotation out, or draw one")
    outlines = []
    for place, polygon in enumerate(polygons):
        try:
            values = np.asarray(polygon)
        except (ValueError, OverflowError):  # lists of other depths
            values = np.empty(1, object)
        if values.ndim == 2 and values.shape[1] == 2:
            values = values.ravel()
        if values.ndim != 1 or (values.size and values.dtype.kind not in "iuf"):
            raise PanopticFormatError(f"{where}: polygon {place} must be a list of numbers, got {polygon!r:.80}")
        if values.size % 2 or values.size < 6:
            raise PanopticFormatError(
                f"{where}: polygon {place} has {values.size} values; at least 3 points x, y are needed"
            )
        outline = np.ascontiguousarray(values.reshape(-1, 2), np.float64)
        if not np.isfinite(outline).all():
            raise PanopticFormatError(f"{where}: polygon {place} has a value that is no finite number")
        outlines.append(outline)
    return outlines


def _checked_size(size: Any, where: str) -> tuple[int, int]:
    if type(size) is list and [type(side) for side in size] == [int, int]:  # nearly always
        height, width = size
        if 1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE and height * width <= MAX_PIXELS:
            return height, width
    sides = list(size) if isinstance(size, Sequence | np.ndarray) and not isinstance(size, str | bytes) else []
    whole = [int(side) for side in sides if _is_number(side) and 1 <= side <= MAX_SIDE and side == int(side)]
    if len(sides) != 2 or len(whole) != 2 or whole[0] * whole[1] > MAX_PIXELS:
        raise PanopticFormatError(
            f"{where}: `size` must be [height, width] with sides of 1 to {MAX_SIDE} and up to {MAX_PIXELS} pixels, got "
            f"{size!r:.80}"
        )
    return whole[0], whole[1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _whole_numbers(counts: Any, where: str) -> np.ndarray:
    try:
        values = np.asarray(counts)
    except (ValueError, OverflowError):
        values = np.empty(1, object)
    if values.ndim == 1 and values.dtype.kind in "iuf" and np.isfinite(values).all():
        whole = np.clip(values, -1, 2**32).astype(np.int64)
        if values.dtype.kind in "iu" or (whole == np.clip(values, -1, 2**32)).all():
            return np.ascontiguousarray(whole)
    raise PanopticFormatError(f"{where}: `counts` must be a text or a list of whole numbers, got {counts!r:.80}")


def _counts_of_text(text: bytes) -> np.ndarray:
    counts: list[int] = []
    at = 0
    while at < len(text):
        value = 0
        for place in range(len(text)):
            if at == len(text):
                raise ValueError("`counts` ends inside a number")
            digit = text[at] - 48
            if not 0 <= digit <= 63:
                raise ValueError(f"`counts` has a character that run lengths do not have, at place {at}")
            if place > _MOST_CHARACTERS:
                raise ValueError(f"`counts` has a number of over {_MOST_CHARACTERS} characters, at place {at}")
            at += 1
            value |= (digit & 31) << 5 * place
            if not digit & 32:
                value -= 32 << 5 * place if digit & 16 else 0
                break
        if len(counts) > 2:
            value += counts[-2]
        if not 0 <= value < 2**32:
            raise ValueError(f"`counts` has the run length {value}")
        counts.append(value)
    return np.array(counts, np.int64)


def _ends_of_counts(counts: np.ndarray, pixels: int) -> np.ndarray:
    """Returns where runs end, an even number of them with empty runs among them."""
    if (counts < 0).any():
        raise ValueError(f"`counts` has the run length {counts.min()}")
    total = int(counts.sum())
    if total > pixels:
        raise ValueError(f"`counts` covers more than the {pixels} pixels of `size`")
    if total < pixels:
        raise ValueError(f"`counts` covers {total} of the {pixels} pixels of `size`")
    return np.cumsum(counts if len(counts) % 2 == 0 else np.append(counts, 0))


def _toggles(outline: np.ndarray, height: int, width: int) -> np.ndarray:
    """Lists the pixels, down the columns, where an outline is entered or left, as csrc/coco_masks.cpp finds them."""
    scaled = SCALE * outline + 0.5
    if not (np.abs(scaled) < 2**31 - 1).all():
        worst = outline.ravel()[np.argmax(np.abs(outline))]
        raise ValueError(f"a coordinate is no number, or far outside every picture: {worst:f}")
    grid = np.trunc(scaled).astype(np.int64)
    found, crossings = [np.empty(0, np.int64)], 0
    for start, end in zip(grid, np.roll(grid, -1, axis=0)):
        (x0, y0), (x1, y1) = start.tolist(), end.tolist()
        dx, dy = abs(x1 - x0), abs(y1 - y0)
        if (x0 > x1) if dx >= dy else (y0 > y1):
            x0, y0, x1, y1 = x1, y1, x0, y0
        u = SCALE * np.arange(max(0, min(x0, x1) // SCALE - 1), min(width - 1, max(x0, x1) // SCALE) + 1) + 2
        u = u[(u >= min(x0, x1)) & (u + 1 <= max(x0, x1))]
        if not len(u):
            continue
        crossings += len(u)
        if crossings > _MOST_CROSSINGS:
            raise ValueError("the outline crosses over 2^27 columns: it is no outline")
        if dx >= dy:
            slope = (y1 - y0) / dx
            v = np.minimum(*(np.trunc(y0 + slope * (u + step - x0) + 0.5) for step in (0, 1)))
        else:
            slope = (x1 - x0) / dy
            guess = np.trunc((u + 0.5 - x0) / slope)
            steps = np.clip(guess + np.arange(-2, 4)[:, None], 1, dy)
            minor = np.trunc(x0 + slope * steps + 0.5)
            first = np.argmax(minor > u if slope > 0 else minor <= u, axis=0)
            v = y0 + steps[first, np.arange(len(u))] - 1
        rows = np.ceil(np.clip((v + 0.5) / SCALE - 0.5, 0, height)).astype(np.int64)
        found.append(u // SCALE * height + rows)
    return np.concatenate(found)
