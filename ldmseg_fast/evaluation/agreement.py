"""Measures how far a backend's maps agree with the torch backend's: pixels, panoptic quality, time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldmseg_fast import distributed
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.evaluation.scores import OBJECT
from ldmseg_fast.metrics.pq import PanopticQuality
from ldmseg_fast.panoptic.postprocess import PanopticResult
from ldmseg_fast.pipeline import LDMSegPipeline


def same_pixels(one: Sequence[PanopticResult], other: Sequence[PanopticResult]) -> tuple[int, int]:
    """Counts the pixels with the same id, and all pixels. Ids are slots, so equal noise gives equal ids.

    Raises:
        ArgumentError: not the same images.
    """
    if len(one) != len(other) or any(a.segmentation.shape != b.segmentation.shape for a, b in zip(one, other)):
        raise ArgumentError(f"agreement: {len(one)} and {len(other)} maps of different images")
    same = sum(int(np.count_nonzero(a.segmentation == b.segmentation)) for a, b in zip(one, other))
    return same, sum(a.segmentation.size for a in one)


class TorchAgreement:
    """Runs the torch backend on an evaluation's images, with the same noise, and compares.

    Args:
        model_dir: MODEL_DIR.
        image_size: side in pixels of what the networks see.
        sampling: the evaluation's num_inference_steps, solver and eta.
        seed, thresholds: likewise.
        limit: how many of this rank's images are compared at most.
        cuda_graph, class_agnostic: of the torch backend, see `LDMSegPipeline.from_pretrained`.
    """

    def __init__(
        self,
        model_dir: str | Path,
        image_size: int,
        sampling: Mapping[str, Any],
        seed: int,
        thresholds: PostprocessConfig,
        limit: int,
        cuda_graph: bool | None = None,
        class_agnostic: bool = False,
    ) -> None:
        self.pipe = LDMSegPipeline.from_pretrained(
            model_dir, image_size=image_size, cuda_graph=cuda_graph, class_agnostic=class_agnostic
        )
        self.settings = {**sampling, "seed": seed, "thresholds": thresholds}
        self.limit = limit
        self.ours, self.torch = (PanopticQuality(OBJECT, class_agnostic=True) for _ in range(2))
        self.images = self.same = self.total = 0
        self.seconds = 0.0

    def add(self, dataset: Any, indices: Sequence[int], results: Sequence[PanopticResult]) -> None:
        """Compares the results of the images at `indices` of the data set; those beyond the limit are passed over."""
        indices = list(indices)[: max(self.limit - self.images, 0)]
        if not indices:
            return
        images = [dataset.load_image(index) for index in indices]
        ids = [dataset.image_id(index) for index in indices]
        settings: dict[str, Any] = {**self.settings, "image_ids": ids, "batch_size": len(images)}
        if not self.images:
            self.pipe(images, **settings | {"num_inference_steps": 1})  # first calls are slow: not what is compared
        start = time.perf_counter()
        expected: list[Any] = list(self.pipe(images, **settings))
        self.seconds += time.perf_counter() - start
        same, total = same_pixels(results[: len(indices)], expected)
        self.same, self.total, self.images = self.same + same, self.total + total, self.images + len(indices)
        for index, result, other in zip(indices, results, expected):
            truth, segments = dataset.ground_truth(index)
            for stat, each in ((self.ours, result), (self.torch, other)):
                stat.add(truth, segments, each.segmentation, each.segments_info, dataset.describe(index))

    def report(self) -> dict[str, Any]:
        """Merges all ranks' parts; all ranks call it.

        `pixel_agreement` is a share, `pq` and `torch_pq` are in percent, `pq_difference` is this backend's minus
        torch's, in points.
        """
        parts = distributed.gather_objects((self.ours, self.torch, self.same, self.total, self.images, self.seconds))
        ours, torch, same, total, images, seconds = parts[0]
        for part in parts[1:]:
            ours, torch = ours.merge(part[0]), torch.merge(part[1])
            same, total, images, seconds = (a + b for a, b in zip((same, total, images, seconds), part[2:]))
        pq, torch_pq = (100.0 * stat.compute()["class_agnostic"]["pq"] for stat in (ours, torch))
        return {
            "images": images,
            "pixel_agreement": same / max(total, 1),
            "pq": pq,
            "torch_pq": torch_pq,
            "pq_difference": pq - torch_pq,
            "torch_seconds_per_image": seconds / max(images, 1),
        }


def format_agreement(report: dict[str, Any], seconds_per_image: float) -> str:
    """Writes a report of `TorchAgreement` as one line, to stand under an evaluation's table.

    Without a time of this backend, where all results were read back, it has no ratio.
    """
    line = (
        f"agreement with torch over {report['images']} images: {100 * report['pixel_agreement']:.2f} % of pixels, "
        f"PQ {report['pq_difference']:+.2f} points; torch {1000 * report['torch_seconds_per_image']:.1f} ms per image"
    )
    if not seconds_per_image:
        return f"{line}; no ratio: the results were read back"
    return f"{line}, ratio {report['torch_seconds_per_image'] / seconds_per_image:.2f}"
