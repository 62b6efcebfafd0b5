"""Panoptic quality during training, shared among the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ldmseg_fast import distributed
from ldmseg_fast.data.coco_panoptic import CocoPanoptic, collate
from ldmseg_fast.data.loader import to_device
from ldmseg_fast.draw import enlarge, overlay, picture_grid
from ldmseg_fast.metrics.pq import PQStat
from ldmseg_fast.stages import Stage

OBJECT = [{"id": 1, "name": "object", "isthing": 1}]
CHUNK = 16  # images of a forward pass, whatever the number of ranks, so that the numbers do not depend on it
PICTURES = 8


@torch.no_grad()
def validate(stage: Stage, dataset: CocoPanoptic, device: torch.device, pictures: Path | None) -> dict[str, float]:
    """Class-agnostic PQ in percent over the split, the same for any number of ranks; a grid of pictures from rank 0.

    The split is cut into chunks, which the ranks take in turn. All ranks run the network equally often, because under
    ZeRO 3 a forward pass needs all of them.
    """
    stage.eval()
    rank, world = distributed.rank(), distributed.world_size()
    chunks = [range(start, min(start + CHUNK, len(dataset))) for start in range(0, len(dataset), CHUNK)]
    rows: list[list[Any]] = []
    stats: dict[int, PQStat] = {}
    for first in range(0, len(chunks), world):
        mine = first + rank
        indices = chunks[min(mine, len(chunks) - 1)]
        batch = to_device(collate([dataset[index] for index in indices]), device)
        truths = [dataset.ground_truth(index) for index in indices]
        results = stage.predict(batch, [truth[0].shape for truth in truths])
        if mine >= len(chunks):
            continue
        stats[mine] = PQStat(OBJECT, class_agnostic=True)
        for index, (ids, segments), result in zip(indices, truths, results):
            stats[mine].add(ids, segments, result.segmentation, result.segments_info, image_id=index)
            if distributed.is_main() and len(rows) < PICTURES:
                image = dataset.load_image(index)
                picture, truth, guess = (enlarge(array, 256) for array in (image, ids, result.segmentation))
                rows.append([picture, overlay(picture, truth), overlay(picture, guess)])
    by_chunk: dict[int, PQStat] = {}
    for part in distributed.gather_objects(stats):
        by_chunk |= part
    merged = by_chunk[0]
    for chunk in range(1, len(chunks)):  # in this order, whoever counted them: sums of floats depend on it
        merged = merged.merge(by_chunk[chunk])
    if distributed.is_main() and pictures is not None and rows:
        pictures.parent.mkdir(parents=True, exist_ok=True)
        picture_grid(rows, ["image", "truth", "prediction"]).save(pictures)
    stage.train()
    values = merged.result()["All"]
    return {f"val/{key}": 100.0 * values[key] for key in ("pq", "sq", "rq")}
