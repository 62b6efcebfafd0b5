"""Turns mask logits into panoptic maps and `segments_info`.

Source: Van Gansbeke and De Brabandere, arXiv 2401.10227, section 3.3.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.errors import ArgumentError, PanopticFormatError
from ldmseg_fast.kernels.panoptic_head import panoptic_head
from ldmseg_fast.panoptic.results import PanopticResult, ResultsWriter
from ldmseg_fast.panoptic.segment_categories import name_segments, slot_categories
from ldmseg_fast.panoptic.shapes import segment_shapes, split_segments

Result = TypeVar("Result", bound=PanopticResult)

__all__ = ["PanopticResult", "ResultsWriter", "connected", "postprocess", "resize_logits"]


def postprocess(
    mask_logits: Tensor,
    network_size: tuple[int, int],
    target_sizes: Sequence[tuple[int, int]],
    thresholds: PostprocessConfig,
    category_logits: Tensor | None = None,
    categories: CategoryTable | None = None,
    *,
    fuse: bool = True,
) -> list[PanopticResult]:
    """Makes panoptic maps at each image's own size, class-agnostic ones without `category_logits`.

    Images of one size are processed together.

    Args:
        mask_logits: float16, bfloat16 or float32 [B, Q, h, w], one slot per segment; slot 0 is never kept.
        network_size: (height, width) in pixels, to which the logits are resized bilinearly first.
        target_sizes: (height, width) of each image's map, to which they are resized bilinearly then.
        thresholds: see `kernels.panoptic_head`.
        category_logits: float [B, C + 1, h / f, w / f]; see `segment_categories`.
        categories: the table of the C categories.
        fuse: whether stuff of one category becomes one segment.

    Returns:
        One result per image, with int32 maps [H, W].

    Raises:
        ArgumentError: logits of another shape, or another number of sizes.
    """
    if mask_logits.ndim != 4 or len(target_sizes) != len(mask_logits):
        shape = list(mask_logits.shape)
        raise ArgumentError(
            f"expected mask_logits [B, Q, h, w] and B target sizes, got {shape} and {len(target_sizes)} sizes"
        )
    images_of_size: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, (height, width) in enumerate(target_sizes):
        images_of_size[int(height), int(width)].append(index)
    results: dict[int, PanopticResult] = {}
    for size, images in images_of_size.items():
        segmentation, _, *statistics = panoptic_head(
            mask_logits if len(images) == len(mask_logits) else mask_logits[images],
            network_size,
            size,
            thresholds.mask_threshold,
            thresholds.count_threshold,
            thresholds.overlap_threshold,
        )
        results.update(zip(images, read_maps(segmentation, *statistics)))
    ordered = [results[image] for image in range(len(results))]
    if category_logits is None or categories is None:
        return ordered
    return with_categories(ordered, mask_logits, category_logits, categories, fuse=fuse)


def read_maps(segmentation: Tensor, area: Tensor, box: Tensor, score: Tensor) -> list[PanopticResult]:
    """Copies what `panoptic_head` made to the host: int32 [B, H, W], and of each slot [B, Q], [B, Q, 4] and [B, Q]."""
    maps, *statistics = (tensor.cpu().numpy() for tensor in (segmentation, area, box, score))
    return [PanopticResult(each, make_segments_info(*rows)) for each, *rows in zip(maps, *statistics)]


def with_categories(
    results: Sequence[PanopticResult],
    mask_logits: Tensor,
    category_logits: Tensor,
    categories: CategoryTable,
    *,
    fuse: bool = True,
) -> list[PanopticResult]:
    """Gives segments their categories.

    Args:
        results: of each image, without.
        mask_logits, category_logits, categories, fuse: as in `postprocess`, float [B, Q, h, w] and [B, C + 1, ., .].
    """
    used = sorted({segment["id"] - 1 for result in results for segment in result.segments_info})
    slots = torch.tensor(used, dtype=torch.int64, device=mask_logits.device)
    found = (tensor.cpu().numpy() for tensor in slot_categories(mask_logits, category_logits, slots))  # [B, K]
    numbers, scores = (_of_slots(part, used, mask_logits.shape[1]) for part in found)  # [B, Q]
    return [name_segments(*each, categories, fuse=fuse) for each in zip(results, numbers, scores)]


def _of_slots(values: np.ndarray, slots: list[int], count: int) -> np.ndarray:
    """Puts the values of some slots, [B, K], into the places of all, [B, Q]."""
    everywhere = np.zeros((len(values), count), values.dtype)
    everywhere[:, slots] = values
    return everywhere


def resize_logits(mask_logits: Tensor, network_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Resizes slot logits as `postprocess` does: bilinearly to the network's size, then to `size`.

    Args:
        mask_logits: [B, Q, h, w] of any float dtype.
        network_size, size: (height, width) in pixels.

    Returns:
        float32 [B, Q, height, width].
    """
    logits = F.interpolate(mask_logits.float(), network_size, mode="bilinear", align_corners=False)
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def connected(result: Result, least: int = 1) -> Result:
    """Makes each 4-connected piece of a segment a segment of its own; pieces under `least` pixels become void.

    Args:
        result: an int32 map [H, W] and its segments.
        least: pixels.

    Returns:
        A result of the same type. Ids are new, areas and boxes are the pieces' own, and what else is known of a segment
        holds for each of its pieces.

    Raises:
        PanopticFormatError: no such map, or an id in it that its segments do not have.
    """
    segmentation, sources = split_segments(result.segmentation, least)
    known = {segment["id"]: segment for segment in result.segments_info}
    if unknown := sorted(set(sources.tolist()) - known.keys()):
        raise PanopticFormatError(f"ids in the map but not in segments_info: {str(unknown[:10])[1:-1]}")
    segments = [
        known[source] | {"was_fused": False} | shape
        for source, shape in zip(sources.tolist(), segment_shapes(segmentation))
    ]
    return replace(result, segmentation=segmentation, segments_info=segments)


def make_segments_info(area: np.ndarray, box: np.ndarray, score: np.ndarray) -> list[dict[str, Any]]:
    """Makes `segments_info` from each slot's area, int [Q], box, int [Q, 4], and score, float [Q].

    Areas are in pixels, boxes are (x, y, width, height). Slots of area 0 have no entry.
    """
    return [
        {
            "id": slot + 1,
            "category_id": 1,
            "label_id": 1,
            "isthing": True,
            "iscrowd": 0,
            "was_fused": False,
            "area": int(area[slot]),
            "bbox": box[slot].tolist(),
            "score": float(score[slot]),
        }
        for slot in np.flatnonzero(area).tolist()
    ]
