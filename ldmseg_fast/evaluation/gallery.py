"""Picks the worst and some random images of an evaluation, for its page of pictures."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np

from ldmseg_fast import distributed
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.panoptic.results import PanopticResult
from ldmseg_fast.reports.error_entry import PageEntry, image_quality
from ldmseg_fast.reports.error_page import random_places, render_entry, worst_places, write_worst_and_random

_Candidate = tuple[PanopticResult, np.ndarray]


class Gallery:
    """Holds at most `worst` + `random` results of this rank while an evaluation runs.

    The random images depend on the seed and the split alone; of equally bad images the first of the split are shown.

    Args:
        dataset: the split.
        worst, random: how many images of each kind.
        seed: of the random choice.
    """

    def __init__(self, dataset: CocoPanoptic, worst: int, random: int, seed: int) -> None:
        self.dataset, self.count = dataset, worst
        self.random = random_places(len(dataset), random, seed)
        self._qualities: dict[int, float] = {}
        self._kept: dict[int, _Candidate] = {}

    def add(self, index: int, result: PanopticResult, matches: np.ndarray) -> None:
        """Takes note of one image: its place in the split, its map, and its rows of `MATCH_DTYPE`, [N]."""
        quality = image_quality(matches)
        if not math.isnan(quality):
            self._qualities[index] = quality
        self._kept[index] = (result, matches)
        kept = {*worst_places(self._qualities, self.count), *self.random}
        self._qualities = {key: value for key, value in self._qualities.items() if key in kept}
        self._kept = {key: value for key, value in self._kept.items() if key in kept}

    def write(self, path: Path, title: str, class_aware: bool) -> None:
        """Writes the page, on rank 0; all ranks call it, and each draws its own images.

        Args:
            path: the HTML file.
            title: its heading.
            class_aware: whether segments were matched by category.
        """
        qualities: dict[int, float] = {}
        for part in distributed.gather_objects(self._qualities):
            qualities |= part
        worst = worst_places(qualities, self.count)
        drawn = {index: self._draw(index, class_aware) for index in {*worst, *self.random} & self._kept.keys()}
        everything: dict[int, str] = {}
        for other in distributed.gather_objects(drawn):
            everything |= other
        write = partial(
            write_worst_and_random,
            path,
            everything,
            worst=worst,
            random=self.random,
            title=title,
            images=len(self.dataset),
            by_category=class_aware,
        )
        distributed.run_on_main(write)

    def _draw(self, index: int, class_aware: bool) -> str:
        result, matches = self._kept[index]
        ids, segments = self.dataset.ground_truth(index)
        names = {category["id"]: str(category.get("name", category["id"])) for category in self.dataset.categories}
        entry = PageEntry(
            name=self.dataset.paths(index)[0].name,
            image=self.dataset.load_image(index),
            gt_ids=ids,
            gt_segments=segments,
            pred_ids=result.segmentation,
            pred_segments=result.segments_info,
            matches=matches,
            categories=names if class_aware else {},
        )
        return render_entry(entry)
