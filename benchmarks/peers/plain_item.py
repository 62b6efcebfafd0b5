"""Makes a training item as a loop written from the paper's text would: Pillow, numpy, and float32 throughout."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from ldmseg_fast.data.coco_panoptic import CocoPanoptic


def plain_item(dataset: CocoPanoptic, index: int, rng: np.random.Generator) -> dict[str, Any]:
    """Returns the same content as the data set's item, bit planes included, in the obvious way."""
    picture, map_path = dataset.paths(index)
    with Image.open(picture) as opened:
        image = opened.convert("RGB").resize((dataset.size,) * 2, Image.Resampling.BICUBIC)
    with Image.open(map_path) as opened:
        rgb = np.array(opened.convert("RGB"), np.int64)
    ids = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
    crowds = [segment["id"] for segment in dataset.segments_info(index) if segment.get("iscrowd", 0)]
    for segment_id, area in zip(*np.unique(ids, return_counts=True)):
        if segment_id in crowds or area < dataset.min_area:
            ids[ids == segment_id] = 0
    ids = np.array(Image.fromarray(ids.astype(np.int32)).resize((dataset.size,) * 2, Image.Resampling.NEAREST))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255.0
    present = [segment_id for segment_id in np.unique(ids) if segment_id]
    slots = rng.permutation(np.arange(1, dataset.num_slots))[: len(present)]
    mask = np.zeros_like(ids)
    for segment_id, slot in zip(present, slots):
        mask[ids == segment_id] = slot
    target = torch.from_numpy(mask).long()
    bits = torch.stack([(target >> bit) & 1 for bit in range((dataset.num_slots - 1).bit_length())]).float()
    bits[:, target == 0] = 0.5
    if rng.random() < 0.5:
        pixels, bits, target = pixels.flip(-1), bits.flip(-1), target.flip(-1)
    return {"image": 2 * pixels - 1, "bits": 2 * bits - 1, "target": target}
