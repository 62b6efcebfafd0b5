"""Keeps result files, which an interrupted evaluation goes on from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldmseg_fast import distributed
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.evaluation.scores import OBJECT
from ldmseg_fast.files import sha256
from ldmseg_fast.panoptic.results import PanopticResult, ResultsWriter


class Clock:
    """Counts seconds spent predicting, and images predicted."""

    def __init__(self) -> None:
        self.seconds, self.images = 0.0, 0

    def per_image(self) -> float:
        """Gives the mean seconds over the images of all ranks that were not read back; 0 where all were."""
        seconds, images = (sum(parts) for parts in zip(*distributed.gather_objects((self.seconds, self.images))))
        return seconds / max(images, 1)


class Store:
    """Keeps results by name in one folder (OUT/NAME.json, OUT/NAME/*.png); without a folder it keeps nothing.

    Args:
        folder: OUT.
        dataset: whose images the results are of.
        settings: what the results depend on.

    Attributes:
        clock: of the results that were predicted.
    """

    def __init__(self, folder: str | None, dataset: CocoPanoptic, settings: Mapping[str, Any]) -> None:
        self.folder, self.dataset, self.settings, self.clock = folder, dataset, settings, Clock()
        self._writers: dict[str, ResultsWriter] = {}
        self._sums: dict[int, str] = {}

    def results(
        self,
        name: str,
        settings: Mapping[str, Any],
        indices: Sequence[int],
        predict: Callable[[Sequence[int]], list[PanopticResult]],
        categories: Sequence[Mapping[str, Any]] = OBJECT,
    ) -> list[PanopticResult]:
        """Reads a batch's results where an earlier evaluation wrote all of them; otherwise predicts and writes them.

        Results of pictures or maps that have changed since are predicted again, and take the place of the old. A batch
        that was cut is predicted as a whole again, so that it has the same images beside each other.

        Args:
            name: of the results in the folder.
            settings: what these depend on beside the store's.
            indices: the batch's places in the data set.
            predict: makes the results of such places.
            categories: COCO's, for their JSON.

        Raises:
            ArgumentError: the folder holds results of other settings.
        """
        writer = self.writer(name, categories, settings)
        ids = [self.dataset.image_id(index) for index in indices]
        if writer is not None:
            there = [self._is_there(writer, index) for index in indices]  # of all: before results are made of the files
            if all(there):
                return [writer.read(image_id) for image_id in ids]
        start = time.perf_counter()
        results = predict(indices)
        self.clock.seconds += time.perf_counter() - start
        self.clock.images += len(results)
        for index, result in zip(indices, results):
            self.write(name, categories, settings, index, result)
        return results

    def write(
        self,
        name: str,
        categories: Sequence[Mapping[str, Any]],
        settings: Mapping[str, Any],
        index: int,
        result: PanopticResult,
        also: Sequence[Path] = (),
    ) -> None:
        """Writes one image's result, unless it is there already and was made from the same files.

        Arguments are as `results` and `writer` have them; `also` are files that it depends on beside picture and map.
        """
        writer = self.writer(name, categories, settings)
        if writer is None:
            return
        image_id, made_from = self.dataset.image_id(index), self._sum(index, also)
        if writer.made_from.get(image_id) != made_from:
            writer.add(image_id, result, image_name=self.dataset.paths(index)[0].name, made_from=made_from)

    def _is_there(self, writer: ResultsWriter, index: int) -> bool:
        """Tells whether an image's result was written, and its picture and map have not changed since."""
        return writer.made_from.get(self.dataset.image_id(index)) == self._sum(index)

    def _sum(self, index: int, also: Sequence[Path] = ()) -> str:
        """Returns a sum by which an image's picture and map, and the files `also`, are recognised."""
        if index not in self._sums:  # kept, as a file may change while its result is made
            self._sums[index] = "-".join(sha256(path)[:16] for path in self.dataset.paths(index))
        return "-".join([self._sums[index], *(sha256(path)[:16] for path in also)])

    def writer(
        self, name: str, categories: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
    ) -> ResultsWriter | None:
        """Gives the writer of the results called `name`, made on first use; None where nothing is kept.

        Args:
            name: of the results in the folder.
            categories: COCO's, for their JSON.
            settings: what they depend on beside the store's.
        """
        if self.folder is None:
            return None
        if name not in self._writers:
            everything = {**self.settings, **settings}
            self._writers[name] = ResultsWriter(self.folder, name, categories, everything)
        return self._writers[name]

    def finish(self) -> None:
        """Writes the JSON files, once every rank is here; all ranks call it."""
        distributed.barrier()
        for writer in self._writers.values():
            if distributed.is_main():
                writer.finish()
            writer.close()
