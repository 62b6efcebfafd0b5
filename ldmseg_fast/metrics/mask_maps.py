"""Makes one map of the masks of an image: RLE and polygon annotations, which may overlap, without a PNG.

The rule of overlaps: crowds and stuff lie below things, and in both the smaller lies over the larger, the later of the
list over the earlier of equal ones. An annotation of which no pixel is left does not count. Masks are those of
https://cocodataset.org/#format-data.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldmseg_fast.errors import PanopticFormatError
from ldmseg_fast.native import _C, warn_slow
from ldmseg_fast.panoptic.coco_masks import mask_of_polygons, mask_of_rle, outlines_of, rle_parts

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class MaskMap:
    """Holds a map of painted masks.

    Attributes:
        size: (H, W).
        columns: the map on its side: the extension's `RunMap`, or int32 [W, H]. Mask k has the id k + 1.
        gone: masks of which no pixel is left, ascending.
        hidden: pixels of masks that lie under others.
    """

    size: Size
    columns: Any
    gone: list[int]
    hidden: int

    def ids(self) -> np.ndarray:
        """Returns the map, int32 [H, W]."""
        columns = self.columns if isinstance(self.columns, np.ndarray) else self.columns.ids()
        return np.ascontiguousarray(columns.T)


def size_of_masks(segmentations: Sequence[Any], where: Callable[[int], str]) -> Size | None:
    """Returns (H, W) as run lengths tell it; None where there are polygons alone.

    Raises:
        PanopticFormatError: sizes that differ, or are none.
    """
    sizes: dict[Size, int] = {}
    for place, segmentation in enumerate(segmentations):
        if isinstance(segmentation, Mapping):
            sizes.setdefault(rle_parts(segmentation, where(place))[:2], place)
    if len(sizes) > 1:
        (first, _), (second, place) = list(sizes.items())[:2]
        raise PanopticFormatError(
            f"{where(place)}: a mask of {second[1]}x{second[0]} beside one of {first[1]}x{first[0]}"
        )
    return next(iter(sizes), None)


def paint_masks(
    segmentations: Sequence[Any], above: Sequence[bool], size: Size, where: Callable[[int], str]
) -> MaskMap:
    """Paints masks over each other by the rule of this file.

    Args:
        segmentations: run lengths or lists of polygons, see `panoptic.coco_masks`.
        above: of each, whether it is a thing and no crowd.
        size: (H, W).
        where: what an error says of mask k.

    Raises:
        PanopticFormatError: see `mask_of_rle` and `mask_of_polygons`; besides, run lengths of another size.
    """
    encoded: list[Any] = []
    for place, segmentation in enumerate(segmentations):
        if not isinstance(segmentation, Mapping):
            encoded.append(outlines_of(segmentation, where(place)))
            continue
        height, width, counts = rle_parts(segmentation, where(place))
        if (height, width) != tuple(size):
            raise PanopticFormatError(
                f"{where(place)}: the mask is {width}x{height}, the image {size[1]}x{size[0]}; sizes must be equal"
            )
        encoded.append(counts)
    if _C is not None:
        try:
            return MaskMap(size, *_C.paint_masks(encoded, np.asarray(above, np.uint8).reshape(-1), *size))
        except _C.BadMask as error:
            number, _, reason = str(error).partition(" ")
            raise PanopticFormatError(f"{where(int(number))}: {reason}; write the mask again") from None
    warn_slow()
    masks = [
        mask_of_rle(segmentation, where(place))
        if isinstance(segmentation, Mapping)
        else mask_of_polygons(segmentation, *size, where(place))
        for place, segmentation in enumerate(segmentations)
    ]
    areas = [int(mask.sum()) for mask in masks]
    ids = np.zeros(size, np.int32)
    for place in sorted(range(len(masks)), key=lambda place: (above[place], -areas[place])):
        ids[masks[place]] = place + 1
    gone = sorted(set(range(len(masks))) - set((np.unique(ids[ids > 0]) - 1).tolist()))
    return MaskMap(size, np.ascontiguousarray(ids.T), gone, sum(areas) - int(np.count_nonzero(ids)))
