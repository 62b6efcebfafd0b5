"""Result files that an interrupted evaluation goes on from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldmseg_fast import distributed
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.evaluation.scores import OBJECT
from ldmseg_fast.panoptic.results import PanopticResult, ResultsWriter


def states_of(folder: Path, patterns: Sequence[str]) -> dict[str, list[int]]:
    """Size and time of the last change of the files that match, by name: results of other contents are other results,
    whatever the folder is called."""
    files = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    states = {path.relative_to(folder).as_posix(): path.stat() for path in files}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}


class Clock:
    """Seconds spent predicting, and images predicted."""

    def __init__(self) -> None:
        self.seconds, self.images = 0.0, 0

    def per_image(self) -> float:
        """Over all ranks: the mean over the images that were not read back."""
        seconds, images = (sum(parts) for parts in zip(*distributed.gather_objects((self.seconds, self.images))))
        return seconds / max(images, 1)


class Store:
    """Results by name in one folder (OUT/NAME.json, OUT/NAME/*.png); without a folder nothing is kept.

    settings: what the results depend on; going on with other settings is a ValueError.
    """

    def __init__(self, folder: str | None, settings: Mapping[str, Any], clock: Clock) -> None:
        self.folder, self.settings, self.clock = folder, settings, clock
        self._writers: dict[str, ResultsWriter] = {}

    def results(
        self,
        name: str,
        settings: Mapping[str, Any],
        dataset: CocoPanoptic,
        indices: Sequence[int],
        predict: Callable[[Sequence[int]], list[PanopticResult]],
    ) -> list[PanopticResult]:
        """A batch's results: read back where an earlier evaluation wrote all of them, otherwise predicted and written.

        A batch that was cut is predicted as a whole again, so that it has the same images beside each other.
        """
        writer = self.writer(name, OBJECT, settings)
        ids = [dataset.image_id(index) for index in indices]
        if writer is not None and all(image_id in writer.written for image_id in ids):
            return [writer.read(image_id) for image_id in ids]
        start = time.perf_counter()
        results = predict(indices)
        self.clock.seconds += time.perf_counter() - start
        self.clock.images += len(results)
        for index, result in zip(indices, results):
            self.write(name, OBJECT, settings, dataset, index, result)
        return results

    def write(
        self,
        name: str,
        categories: Sequence[Mapping[str, Any]],
        settings: Mapping[str, Any],
        dataset: CocoPanoptic,
        index: int,
        result: PanopticResult,
    ) -> None:
        """One image, unless it is there already."""
        writer = self.writer(name, categories, settings)
        if writer is not None and dataset.image_id(index) not in writer.written:
            writer.add(dataset.image_id(index), result, image_name=dataset.paths(index)[0].name)

    def writer(
        self, name: str, categories: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
    ) -> ResultsWriter | None:
        if self.folder is None:
            return None
        if name not in self._writers:
            everything = {**self.settings, **settings}
            self._writers[name] = ResultsWriter(self.folder, name, categories, everything)
        return self._writers[name]

    def finish(self) -> None:
        """The JSON files, once every rank is here."""
        distributed.barrier()
        for writer in self._writers.values():
            if distributed.is_main():
                writer.finish()
            writer.close()
