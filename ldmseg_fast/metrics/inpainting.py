"""Measures mask inpainting: blocks of the map are dropped, the model fills them in, panoptic quality per sparsity.

The protocol is that of Van Gansbeke and De Brabandere, arXiv 2401.10227: blocks of 16 x 16 pixels, each dropped with
probability 0.1 .. 0.9, and the mean PQ over the probabilities.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.metrics.baselines import ids_in
from ldmseg_fast.metrics.pq import PanopticQuality

BLOCKS = (8, 16, 32)
PROBABILITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
PAPER_BLOCK = 16
PAPER_PROBABILITIES = PROBABILITIES[1:-1]


def drop_blocks(
    height: int, width: int, block: int, probability: float, seed: int = 0, image_id: int | str = 0
) -> np.ndarray:
    """Draws the dropped pixels, bool [height, width]: whole blocks of block x block pixels.

    Blocks are cut off at the right and lower edges. The result depends on the arguments alone, not on the batch or rank
    that an image is in.

    Raises:
        ArgumentError: a block without pixels, or a probability outside 0..1.
    """
    if block < 1 or not 0.0 <= probability <= 1.0:
        raise ArgumentError(f"blocks of {block} pixels dropped with probability {probability}: need >= 1 and 0..1")
    key = zlib.crc32(str(image_id).encode())
    generator = np.random.default_rng([seed, key, block, round(1000 * probability)])
    cells = generator.random((-(-height // block), -(-width // block))) < probability
    return np.kron(cells, np.ones((block, block), bool))[:height, :width]


def keep_given(pred_ids: np.ndarray, given_ids: np.ndarray, dropped: np.ndarray) -> np.ndarray:
    """Puts the given pixels back into a prediction: the map's ids where they were neither dropped nor void.

    pred_ids, given_ids: integer [H, W], which number their segments alike. dropped: bool [H, W].
    """
    return np.where(dropped | (given_ids == 0), pred_ids, given_ids)


def only_dropped(
    ids: np.ndarray, segments: Sequence[Mapping[str, Any]], dropped: np.ndarray
) -> tuple[np.ndarray, list[Mapping[str, Any]]]:
    """Voids a map, integer [H, W], outside the dropped pixels, bool [H, W], and lists the segments that are left."""
    inside = np.where(dropped, ids, 0)
    present = set(ids_in(inside))
    return inside, [segment for segment in segments if segment["id"] in present]


class InpaintingStat:
    """Accumulates class-agnostic panoptic quality for each (block, probability)."""

    def __init__(self) -> None:
        self.stats: dict[tuple[int, float], PanopticQuality] = {}

    def add(
        self,
        block: int,
        probability: float,
        gt_ids: np.ndarray,
        gt_segments: Sequence[Mapping[str, Any]],
        pred_ids: np.ndarray,
        pred_segments: Sequence[Mapping[str, Any]],
        image_id: int | str | None = None,
    ) -> None:
        """Matches one image as `PanopticQuality.add` does: two maps, integer [H, W], and their `segments_info`.

        Raises:
            PanopticFormatError: see `PanopticQuality.add`.
        """
        stat = self.stats.setdefault((block, probability), PanopticQuality([], class_agnostic=True))
        stat.add(gt_ids, gt_segments, pred_ids, pred_segments, image_id)

    def merge(self, other: "InpaintingStat") -> "InpaintingStat":
        """Adds another rank's part to this one and returns this one.

        Raises:
            ArgumentError: an image that both have counted.
        """
        for key, stat in other.stats.items():
            self.stats.setdefault(key, PanopticQuality([], class_agnostic=True)).merge(stat)
        return self

    def result(self) -> dict[str, Any]:
        """Returns panoptic quality by sparsity, as fractions.

        `sparsities` has one row each (block, probability, pq, sq, rq, pq_crowd_correct, images). `mean_pq`, keyed by
        str(block), is the mean over its probabilities. `paper_mean_pq` is that of 16 x 16 blocks over 0.1 .. 0.9; None
        where one of them is missing.
        """
        rows = []
        for (block, probability), stat in sorted(self.stats.items()):
            result = stat.compute()
            quality = {name: result["All"][name] for name in ("pq", "sq", "rq", "pq_crowd_correct")}
            rows.append({"block": block, "probability": probability, **quality, "images": result["images"]})
        by_block: dict[int, dict[float, float]] = {}
        for row in rows:
            by_block.setdefault(row["block"], {})[row["probability"]] = row["pq"]
        paper = [by_block.get(PAPER_BLOCK, {}).get(probability) for probability in PAPER_PROBABILITIES]
        known = [pq for pq in paper if pq is not None]
        return {
            "sparsities": rows,
            "mean_pq": {str(block): _mean(list(values.values())) for block, values in by_block.items()},
            "paper_mean_pq": _mean(known) if len(known) == len(paper) else None,
        }


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
