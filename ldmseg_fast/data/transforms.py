"""Turns 24-bit ids into slots, and augments. It needs NumPy and Pillow; random draws come from a given generator only.

Shapes: H W the picture as stored, S the side that the networks see, Q slots (slot 0 is void).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.native import _C

__all__ = [
    "ID_SCHEMES",
    "TABLE_SIZE",
    "Augmentation",
    "color_jitter",
    "compact_ids",
    "crop_box",
    "dense_ids",
    "make_remap_table",
    "paste",
    "present_ids",
    "resize_ids",
    "resize_image",
]

ID_SCHEMES = ("random", "position", "position_spread", "position_cell", "area")
TABLE_SIZE = 256  # dense ids are uint8

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Augmentation:
    """Sets the augmentation of training.

    Attributes:
        flip: the probability of mirroring.
        scale_min: the smallest side of a random crop as a share of the picture's (1: no crop).
        color_jitter: the largest relative change of brightness, contrast and saturation (0: none).
        aspect_jitter: the largest relative change of a random crop's width to height (0: none).
        paste: the probability of pasting things of another picture (Ghiasi et al. 2021, arXiv 2012.07177).

    Raises:
        ArgumentError: a number that is out of range.
    """

    flip: float = 0.5
    scale_min: float = 1.0
    color_jitter: float = 0.0
    aspect_jitter: float = 0.0
    paste: float = 0.0

    def __post_init__(self) -> None:
        shares = (("flip", 0, 1), ("color_jitter", 0, 1), ("paste", 0, 1))
        for name, low, high in (*shares, ("scale_min", 0.05, 1), ("aspect_jitter", 0, 0.9)):
            if not low <= getattr(self, name) <= high:
                raise ArgumentError(f"{name}={getattr(self, name)}: a number from {low} to {high} expected")

    @property
    def crops(self) -> bool:
        """Whether pictures are cropped at random."""
        return self.scale_min < 1 or self.aspect_jitter > 0


def _runs(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns values and start positions of the runs of equal ids in raster order: maps have few of them."""
    flat = ids.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    return flat[starts], starts


def present_ids(ids: np.ndarray) -> np.ndarray:
    """Returns the sorted distinct ids of a map, [N] in its own integer dtype, of a map [H, W], void included."""
    return np.unique(_runs(ids)[0])


def dense_ids(
    ids: np.ndarray, segment_ids: Sequence[int], *, crowd: Sequence[bool] = (), min_area: int = 0
) -> np.ndarray:
    """Numbers the segments of a map by their place in `segment_ids`.

    Args:
        ids: an integer map [H, W], 0 void.
        segment_ids: the ids that the map may have.
        crowd: as long as `segment_ids`, or empty; segments marked here become void.
        min_area: segments under this number of pixels become void.

    Returns:
        [H, W] with 0 void and 1..len(segment_ids), uint8 for up to 255 segments and int32 for more.

    Raises:
        ArgumentError: names the first id of the map that the list lacks.
    """
    values, starts = _runs(ids)
    lengths = np.diff(starts, append=ids.size)
    known = np.array([0, *segment_ids], np.int64)
    order = np.argsort(known, kind="stable")
    place = np.minimum(np.searchsorted(known, values, sorter=order), len(known) - 1)
    numbers = order[place]
    unknown = known[numbers] != values
    if unknown.any():
        raise ArgumentError(f"segment id {values[unknown][0]} is in the map but not in segments_info")
    kept = np.arange(len(known), dtype=np.uint8 if len(known) <= 256 else np.int32)
    kept[np.bincount(numbers, lengths, len(known)) < min_area] = 0
    kept[np.flatnonzero(crowd) + 1] = 0
    return np.repeat(kept[numbers], lengths).reshape(ids.shape)


def compact_ids(dense: np.ndarray, max_segments: int) -> tuple[np.ndarray, int]:
    """Renumbers a map without gaps: uint8 [S, S] with 1..n in the old order, and n.

    The map is uint8 or int32 [S, S]. Of more than `max_segments` segments the largest stay and the rest become void. A
    uint8 map that has no gaps already is returned itself.
    """
    if _C is not None and dense.dtype == np.uint8:
        return _C.compact_ids(np.ascontiguousarray(dense), max_segments)
    values, starts = _runs(dense)
    lengths = np.diff(starts, append=dense.size)
    area = np.bincount(values, lengths)
    area[0] = 0
    kept = np.flatnonzero(area)
    if len(kept) > max_segments:
        kept = np.sort(kept[np.argsort(-area[kept], kind="stable")[:max_segments]])
    if dense.dtype == np.uint8 and len(kept) == len(area) - 1:
        return dense, len(kept)  # numbered without gaps already
    numbers = np.zeros(len(area), np.uint8)
    numbers[kept] = np.arange(1, len(kept) + 1)
    return np.repeat(numbers[values], lengths).reshape(dense.shape), len(kept)


def crop_box(height: int, width: int, scale_min: float, rng: np.random.Generator, aspect_jitter: float = 0.0) -> Box:
    """Draws a random box with sides of `scale_min`..1 of the picture's.

    Its aspect is the picture's own, changed by a factor of 1 - `aspect_jitter`..1 / (1 - `aspect_jitter`) (Szegedy et
    al. 2015, section 6): one of its sides is shorter by so much.
    """
    scale = rng.uniform(scale_min, 1)
    narrow = low = scale
    if aspect_jitter:
        longest = -np.log(1 - aspect_jitter)
        change = rng.uniform(-longest, longest)
        narrow, low = scale * np.exp(min(change, 0)), scale * np.exp(min(-change, 0))
    box_height, box_width = max(1, round(height * low)), max(1, round(width * narrow))
    top, left = int(rng.integers(height - box_height + 1)), int(rng.integers(width - box_width + 1))
    return left, top, left + box_width, top + box_height


def resize_image(rgb: np.ndarray | Image.Image, size: int, box: Box | None = None) -> np.ndarray:
    """Resizes uint8 [H, W, 3] to [S, S, 3] by Pillow's bicubic (with antialiasing); the aspect is not preserved.

    An array that has the size already is returned itself.
    """
    if isinstance(rgb, np.ndarray):
        if box is None and rgb.shape[:2] == (size, size):
            return rgb
        rgb = Image.fromarray(rgb)
    return np.array(rgb.resize((size, size), Image.Resampling.BICUBIC, box=box))


def resize_ids(ids: np.ndarray, size: int, box: Box | None = None) -> np.ndarray:
    """Resizes a map, uint8 or int32 [H, W], to [S, S] by the nearest pixel, as Pillow does.

    A map that has the size already is returned itself.
    """
    if box is None and ids.shape == (size, size):
        return ids
    return np.array(Image.fromarray(ids).resize((size, size), Image.Resampling.NEAREST, box=box))


def paste(
    rgb: np.ndarray, ids: np.ndarray, other: np.ndarray, maps: tuple[np.ndarray, np.ndarray], places: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pastes segments of another picture.

    Args:
        rgb: the picture, uint8 [P, P, 3].
        ids: its map, integers [S, S].
        other: the other picture, uint8 [P, P, 3].
        maps: of the other picture: integers [P, P] and the same [S, S], 0..N.
        places: int32 [N + 1], which number each of its segments gets; 0: it is not pasted.

    Returns:
        A new picture and a new map, int32 [S, S].
    """
    fine, coarse = (places[numbers] for numbers in maps)
    return np.where(fine[..., None] > 0, other, rgb), np.where(coarse > 0, coarse, ids)


def color_jitter(rgb: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Scales brightness, contrast and saturation of uint8 [S, S, 3] each by a random 1 - strength..1 + strength.

    Returns:
        A new picture, uint8 [S, S, 3].
    """
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3).astype(np.float32)
    luma = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow's "L"
    picture = rgb.astype(np.float32) * brightness
    mean = (picture @ luma).mean()
    picture = mean + contrast * (picture - mean)
    grey = (picture @ luma)[..., None]
    picture = grey + saturation * (picture - grey)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def make_remap_table(
    segment_ids: np.ndarray, num_segments: int, num_slots: int, scheme: str, rng: np.random.Generator
) -> np.ndarray:
    """Assigns slots to dense ids: uint8 [256] with distinct slots in 1..Q-1 for 1..num_segments, 0 (void) elsewhere.

    segment_ids: uint8 [S, S] as from `compact_ids`. Schemes:

    - "random": a random subset of the slots without replacement, as the paper trains (arXiv 2401.10227).
    - "position": slots 1, 2, 3, ... in raster order of the centroids, by coarse rows (an eighth of the side).
    - "position_spread": the same order, spread evenly over all slots.
    - "position_cell": the slot of the grid cell that holds the centroid, or of the nearest free cell; larger segments
      choose first. Rows and columns are Gray-coded, so that neighbouring cells differ in one bit: what a segment gets
      hardly depends on which others there are, and doubt between two cells is doubt about one bit plane.
    - "area": slots 1, 2, 3, ... by falling area.

    All but "random" are functions of the map.

    Raises:
        ArgumentError: an unknown scheme, a number of slots outside 2..256, or too many segments.
    """
    if scheme not in ID_SCHEMES:
        raise ArgumentError(f"id_assignment={scheme!r}: one of {', '.join(ID_SCHEMES)} expected")
    if not 2 <= num_slots <= TABLE_SIZE:
        raise ArgumentError(f"num_slots={num_slots}: 2..{TABLE_SIZE} expected")
    if not 0 <= num_segments < num_slots:
        raise ArgumentError(
            f"{num_segments} segments do not fit {num_slots - 1} slots: void the smallest (compact_ids)"
        )
    table = np.zeros(TABLE_SIZE, np.uint8)
    if num_segments == 0:
        return table
    free = num_slots - 1
    consecutive = np.arange(1, num_segments + 1)
    if scheme == "random":
        slots = rng.permutation(free)[:num_segments] + 1
    elif scheme == "area":
        area = np.bincount(segment_ids.ravel(), minlength=num_segments + 1)[1 : num_segments + 1]
        slots = _by_rank(np.argsort(-area, kind="stable"), consecutive)
    else:
        y, x = _centroids(segment_ids, num_segments)
        if scheme == "position_cell":
            area = np.bincount(segment_ids.ravel(), minlength=num_segments + 1)[1 : num_segments + 1]
            slots = _cells(y, x, np.argsort(-area, kind="stable"), num_slots)
        else:
            order = np.lexsort((x, np.floor(y * 8)))
            if scheme == "position_spread":
                consecutive = 1 + (2 * consecutive - 1) * free // (2 * num_segments)
            slots = _by_rank(order, consecutive)
    table[1 : num_segments + 1] = slots
    return table


def _by_rank(order: np.ndarray, slots: np.ndarray) -> np.ndarray:
    assigned = np.empty_like(slots)
    assigned[order] = slots
    return assigned


def _centroids(segment_ids: np.ndarray, num_segments: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns y, x [num_segments] in [0, 1). Segments without pixels lie at the end of the raster."""
    height, width = segment_ids.shape
    flat, length = segment_ids.ravel(), num_segments + 1
    area = np.bincount(flat, minlength=length)[1:length]
    rows = np.bincount(flat, np.repeat(np.arange(height, dtype=np.float64), width), length)[1:length]
    columns = np.bincount(flat, np.tile(np.arange(width, dtype=np.float64), height), length)[1:length]
    last = 1 - 1e-9
    present = np.maximum(area, 1)
    y, x = (rows / present + 0.5) / height, (columns / present + 0.5) / width
    return np.where(area > 0, y, last), np.where(area > 0, x, last)


def _cells(y: np.ndarray, x: np.ndarray, order: np.ndarray, num_slots: int) -> np.ndarray:
    """Returns the slots of the cells that hold y, x. In `order`, a taken cell gives way to the nearest that is free."""
    bits = num_slots.bit_length() - 1
    rows, columns = 2 ** (bits // 2), 2 ** (bits - bits // 2)
    row, column = np.divmod(np.arange(rows * columns), columns)
    slot_of_cell = (row ^ row >> 1) * columns + (column ^ column >> 1)
    spare = np.arange(rows * columns, num_slots)  # beyond the largest power of two, all in the lower right corner
    row, column = np.append(row, np.full(len(spare), rows)), np.append(column, np.full(len(spare), columns))
    slot_of_cell = np.append(slot_of_cell, spare)
    free = slot_of_cell > 0  # slot 0 is void
    slots = np.empty(len(y), int)
    for segment in order:
        distance = (row + 0.5 - y[segment] * rows) ** 2 + (column + 0.5 - x[segment] * columns) ** 2
        cell = np.argmin(np.where(free, distance, np.inf))
        slots[segment] = slot_of_cell[cell]
        free[cell] = False
    return slots
