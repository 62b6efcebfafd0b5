"""Names segments without a trained network: each takes the category of the training segment that looks most alike.

Looks are colour and texture: mean and deviation of CIELAB, a histogram of uniform local binary patterns (Ojala et al.,
"Multiresolution gray-scale and rotation invariant texture classification with local binary patterns", TPAMI 2002), and
where in the picture the segment lies. The rule is the nearest neighbour's (Cover and Hart, "Nearest neighbor pattern
classification", IEEE Transactions on Information Theory 1967). Together with a classical method it is the baseline of
models with categories. scikit-image does the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.metrics.baselines import segments_of
from ldmseg_fast.metrics.class_vote import merge_stuff

SIDE = 256  # larger pictures are described at this length of their longer side
PATTERNS = 10  # uniform ones of 8 neighbours


def describe_segments(image: np.ndarray, ids: np.ndarray, listed: Sequence[int]) -> np.ndarray:
    """Describes segments by colour, texture and place.

    Args:
        image: uint8 [H, W, 3].
        ids: integer [H, W].
        listed: N of its ids.

    Returns:
        float64 [N, 19]: mean and deviation of L*, a*, b*, shares of the local binary patterns, and x, y and the root of
        the area, as shares of the picture. A segment that vanishes where a large picture is described small is all 0.
    """
    from skimage import color, feature

    height, width = image.shape[:2]
    shrink = min(1.0, SIDE / max(height, width))
    if shrink < 1.0:
        size = max(1, round(width * shrink)), max(1, round(height * shrink))
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
        ids = np.asarray(Image.fromarray(ids.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
    lab = color.rgb2lab(image)
    lightness = np.round(lab[..., 0] * 2.55).astype(np.uint8)
    patterns: np.ndarray = feature.local_binary_pattern(lightness, 8, 1, "uniform").astype(np.int64)
    rows, columns = np.mgrid[: ids.shape[0], : ids.shape[1]]
    found = np.zeros((len(listed), 6 + PATTERNS + 3))
    for place, number in enumerate(listed):
        inside = ids == number
        area = np.count_nonzero(inside)
        if not area:
            continue
        colours = lab[inside]
        shares = np.bincount(patterns[inside], minlength=PATTERNS) / area
        where = (columns[inside].mean() / ids.shape[1], rows[inside].mean() / ids.shape[0], np.sqrt(area / ids.size))
        found[place] = np.concatenate([colours.mean(0), colours.std(0), shares, where])
    return found


class NearestCategory:
    """Remembers what the segments of a training split look like.

    Args:
        items: pictures, uint8 [H, W, 3], each with (ids integer [H, W], `segments_info` with `category_id`); crowds are
            left out.
        categories: COCO entries with `id` and `isthing`.

    Raises:
        ArgumentError: no segment at all.
    """

    def __init__(
        self,
        items: Iterable[tuple[np.ndarray, tuple[np.ndarray, list[dict]]]],
        categories: Sequence[Mapping[str, Any]],
    ) -> None:
        self.stuff = {entry["id"] for entry in categories if not entry.get("isthing", 1)}
        descriptions, numbers = [], []
        for image, (ids, segments) in items:
            listed = [segment for segment in segments if not segment.get("iscrowd", 0)]
            descriptions.append(describe_segments(image, ids, [segment["id"] for segment in listed]))
            numbers += [segment["category_id"] for segment in listed]
        if not numbers:
            raise ArgumentError("no segment to learn categories from: give a training split with annotations")
        known = np.concatenate(descriptions)
        self.mean, self.deviation = known.mean(0), np.maximum(known.std(0), 1e-6)
        self.known = (known - self.mean) / self.deviation
        self.numbers = np.array(numbers)

    def name(self, image: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Gives every segment of a map the category of its nearest neighbour, and makes stuff of one category one.

        Args:
            image: uint8 [H, W, 3].
            ids: integer [H, W], 0 void.

        Returns:
            The map [H, W] and its segments, with `category_id`.
        """
        segments = segments_of(ids)
        if not segments:
            return ids, []
        found = (describe_segments(image, ids, [s["id"] for s in segments]) - self.mean) / self.deviation
        squares = (found**2).sum(1)[:, None] + (self.known**2).sum(1) - 2 * found @ self.known.T  # [N, training]
        numbers = self.numbers[squares.argmin(1)].tolist()
        return merge_stuff(ids, [s | {"category_id": n} for s, n in zip(segments, numbers)], self.stuff)
