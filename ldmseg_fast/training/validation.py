"""Measures panoptic quality during training, shared among the ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ldmseg_fast import distributed
from ldmseg_fast.data.coco_panoptic import CocoPanoptic, collate
from ldmseg_fast.data.loader import to_device
from ldmseg_fast.data.reader import PatientReader
from ldmseg_fast.files import replacing
from ldmseg_fast.metrics.pq import PanopticQuality
from ldmseg_fast.panoptic.results import PanopticResult
from ldmseg_fast.reports.draw import enlarge, overlay, picture_grid
from ldmseg_fast.training.stages import Stage

OBJECT = [{"id": 1, "name": "object", "isthing": 1}]
CHUNK = 16  # images of a forward pass, whatever the number of ranks, so that the numbers do not depend on it
PICTURES = 8


Truth = tuple[np.ndarray, list[dict]]  # ids [H, W] and segments_info


class _Chunks:
    """Reads validation items; `at` is the one that is being read."""

    def __init__(self, dataset: CocoPanoptic) -> None:
        self.dataset, self.at = dataset, 0

    def read(self, indices: range) -> tuple[dict[str, Any], list[Truth]]:
        items, truths = [], []
        for index in indices:
            self.at = index
            items.append(self.dataset[index])
            truths.append(self.dataset.ground_truth(index))
        return collate(items), truths

    def picture(self, index: int) -> np.ndarray:
        self.at = index
        return self.dataset.load_image(index)

    def where(self) -> str:
        return f"validation reads {' and '.join(map(str, self.dataset.paths(self.at)))}"


class _Stats:
    """Counts PQ without categories and, where `aware` is there, with them."""

    def __init__(self, agnostic: PanopticQuality, aware: PanopticQuality | None) -> None:
        self.agnostic, self.aware = agnostic, aware

    def add(
        self, ids: np.ndarray, segments: list[dict], result: PanopticResult, index: int, ids_of: dict[int, int]
    ) -> None:
        """Counts image `index`; `ids_of` has the split's category id of each of the model's."""
        guess = result.segmentation
        self.agnostic.add(ids, segments, guess, result.segments_info, image_id=index)
        if self.aware is not None:
            named = [
                s | {"category_id": ids_of[s["category_id"]]}
                for s in result.segments_info
                if s["category_id"] in ids_of
            ]
            if len(named) < len(result.segments_info):  # what the split has no category for is void
                guess = np.where(np.isin(guess, [s["id"] for s in named]), guess, 0)
            self.aware.add(ids, segments, guess, named, image_id=index)

    def merge(self, other: _Stats) -> _Stats:
        self.agnostic = self.agnostic.merge(other.agnostic)
        if self.aware is not None and other.aware is not None:
            self.aware = self.aware.merge(other.aware)
        return self

    def values(self) -> dict[str, float]:
        values = self.agnostic.compute()["All"]
        found = {f"val/{key}": 100.0 * values[key] for key in ("pq", "sq", "rq")}
        if self.aware is not None:
            result = self.aware.compute()
            groups = {"class_pq": "All", "class_pq_things": "Things", "class_pq_stuff": "Stuff"}
            found |= {f"val/{name}": 100.0 * result[group]["pq"] for name, group in groups.items()}
        return found


def mean_of_sets(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Joins the numbers of several sets.

    Args:
        found: what `validate` returns, by the set's name.

    Returns:
        The means over the sets that have it under `validate`'s names, and each set's own as val/NAME/pq and so on.
    """
    by_key: dict[str, list[float]] = {}
    for of_set in found.values():
        for key, value in of_set.items():
            by_key.setdefault(key, []).append(value)
    values = {key: sum(numbers) / len(numbers) for key, numbers in by_key.items()}
    return values | {
        f"val/{name}/{key.removeprefix('val/')}": value
        for name, of_set in found.items()
        for key, value in of_set.items()
    }


@torch.no_grad()
def validate(
    stage: Stage,
    dataset: CocoPanoptic,
    device: torch.device,
    pictures: Path | None,
    *,
    timeout: float = 300.0,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Measures PQ in percent over the split, the same for any number of ranks.

    It is class-agnostic, and of models with categories class-aware too.

    Rank 0 writes a grid of pictures, or prints a warning where it cannot be written. The split is cut into chunks,
    which the ranks take in turn. All ranks run the network equally often, because under ZeRO 3 a forward pass needs all
    of them.

    Args:
        stage: predicts the maps.
        dataset: the split.
        device: of this rank.
        pictures: the grid's file; None: there is none.
        timeout: seconds that reading a chunk, or a picture to show, may take.
        stop: asked before each chunk; where it is true on any rank, all of them leave off.

    Returns:
        val/loss, the mean over images under noise of their own;
        val/pq, val/sq, val/rq, and of models with categories val/class_pq, val/class_pq_things and val/class_pq_stuff;
        None where it was stopped.

    Raises:
        DataError: a file that cannot be read, or a read that hangs.
    """
    stage.eval()
    source = _Chunks(dataset)
    reader = PatientReader(timeout, source.where)
    rank, world = distributed.rank(), distributed.world_size()
    chunks = [range(start, min(start + CHUNK, len(dataset))) for start in range(0, len(dataset), CHUNK)]
    rows: list[list[Any]] = []
    stats: dict[int, _Stats] = {}
    losses: dict[int, float] = {}
    table = stage.categories
    if dataset.class_agnostic:
        table = None
    numbers = {} if table is None else table.numbers_of(dataset.categories, str(dataset.folders.annotations))
    ids_of = {} if table is None else {table[number].id: category_id for category_id, number in numbers.items()}
    for first in range(0, len(chunks), world):
        if distributed.any_rank(stop()):
            reader.close()
            stage.train()
            return None
        mine = first + rank
        indices = chunks[min(mine, len(chunks) - 1)]
        batch, truths = reader.call(partial(source.read, indices))
        batch = to_device(batch, device)
        results = stage.predict(batch, [truth[0].shape for truth in truths])
        loss = stage.held_out_loss(batch)
        if mine >= len(chunks):
            continue
        aware = PanopticQuality(dataset.categories) if table is not None else None
        losses[mine] = float(loss) * len(indices)
        stats[mine] = _Stats(PanopticQuality(OBJECT, class_agnostic=True), aware)
        for index, (ids, segments), result in zip(indices, truths, results):
            stats[mine].add(ids, segments, result, index, ids_of)
            if distributed.is_main() and len(rows) < PICTURES:
                image = reader.call(partial(source.picture, index))
                picture, truth, guess = (enlarge(array, 256) for array in (image, ids, result.segmentation))
                rows.append([picture, overlay(picture, truth), overlay(picture, guess)])
    reader.close()
    by_chunk: dict[int, _Stats] = {}
    for counted, scored in distributed.gather_objects((stats, losses)):
        by_chunk |= counted
        losses |= scored
    merged = by_chunk[0]
    for chunk in range(1, len(chunks)):  # in this order, whoever counted them: sums of floats depend on it
        merged = merged.merge(by_chunk[chunk])
    if distributed.is_main() and pictures is not None and rows:
        try:
            pictures.parent.mkdir(parents=True, exist_ok=True)
            with replacing(pictures) as temporary:
                picture_grid(rows, ["image", "truth", "prediction"]).save(temporary, format="PNG")
        except OSError as error:  # no reason to lose the steps since the last checkpoint
            tqdm.write(f"warning: {pictures}: {error.strerror or error}; the run goes on without it", file=sys.stderr)
    stage.train()
    return {"val/loss": sum(losses[chunk] for chunk in sorted(losses)) / len(dataset)} | merged.values()
