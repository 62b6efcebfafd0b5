"""Fixtures of the metrics' tests."""

import json
from types import ModuleType

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from ldmseg_fast.panoptic.coco_masks import rle_of_mask
from ldmseg_fast.panoptic.format import MAX_ID, write_panoptic_png

CATEGORIES = [{"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}]
IDS = [0, 1, 2, 3, 7, 255, 256, 65535, 65536, MAX_ID - 1, MAX_ID]


def _masks_of(ids, segments, image_id, score=None):
    return [
        {"image_id": image_id, "category_id": s["category_id"], "iscrowd": s.get("iscrowd", 0)}
        | {"segmentation": rle_of_mask(ids == s["id"]), "bbox": [0.5, 1, 2, 3e0]}
        | ({} if score is None else {"score": score})
        for s in segments
    ]


@pytest.fixture
def files(tmp_path):
    """Eight images as PNGs, as instances and as a list of results; ROOT/{gt,pred}.json, _masks.json, pred_list.json."""
    rng = np.random.default_rng(1)
    shared = {"images": [], "categories": CATEGORIES}
    entries, masks = {"gt": [], "pred": []}, {"gt": [], "pred": []}
    for kind in entries:
        (tmp_path / kind).mkdir()
    for image_id in range(1, 9):
        gt = np.kron(rng.integers(0, 7, (5, 6)), np.ones((9, 11), int)).astype(np.int32)
        pred = np.where(rng.random(gt.shape) < 0.15, 0, np.roll(gt, 2, 1)).astype(np.int32)
        image = {"id": image_id, "file_name": f"{image_id:06d}.jpg", "height": 45, "width": 66}
        shared["images"].append(image | {"weather": "rain" if image_id % 3 else "sun"})
        for kind, ids in (("gt", gt), ("pred", pred)):
            segments = [
                {"id": int(i), "category_id": int(i) % 2 + 1, "iscrowd": int(kind == "gt" and i == 6)}
                for i in np.unique(ids[ids > 0])
            ]
            write_panoptic_png(tmp_path / kind / f"{image_id:06d}.png", ids)
            entry = {"image_id": image_id, "file_name": f"{image_id:06d}.png", "segments_info": segments}
            entries[kind].append(entry)
            masks[kind] += _masks_of(ids, segments, image_id, None if kind == "gt" else 0.5)
    for kind in entries:
        (tmp_path / f"{kind}.json").write_text(json.dumps(shared | {"annotations": entries[kind]}))
        (tmp_path / f"{kind}_masks.json").write_text(json.dumps(shared | {"annotations": masks[kind]}))
    (tmp_path / "pred_list.json").write_text(json.dumps(masks["pred"]))
    return tmp_path


@pytest.fixture(scope="session")
def plain_pq() -> ModuleType:
    """The straightforward implementation in benchmarks/."""
    from benchmarks.peers import plain_pq

    return plain_pq


@pytest.fixture(scope="session")
def panoptic_images() -> SearchStrategy:
    """Draws (gt ids, gt segments, pred ids, pred segments) of one image."""
    return _images()


@st.composite
def _images(draw):
    """Ground truth and prediction: blocks of segments, void, crowds, specks; one time in three unrelated."""
    height, width = draw(st.integers(1, 14)), draw(st.integers(1, 140))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    gt = _blocks(rng, height, width, draw(st.integers(1, len(IDS))))
    if draw(st.integers(0, 2)):
        shift = draw(st.integers(0, 3))
        pred = np.roll(gt, shift, axis=1)
        noisy = rng.random(gt.shape) < draw(st.sampled_from([0.0, 0.05, 0.4]))
        pred = np.where(noisy, rng.choice(IDS, gt.shape), pred)
    else:
        pred = _blocks(rng, height, width, draw(st.integers(1, len(IDS))))
    categories = draw(st.integers(1, 3))
    gt_segments = _segments(rng, gt, categories, draw(st.sampled_from([0.0, 0.3, 0.8])))
    pred_segments = _segments(rng, pred, categories, 0.0)
    if draw(st.booleans()):  # categories that follow the ground truth where ids are shared
        category = {segment["id"]: segment["category_id"] for segment in gt_segments}
        for segment in pred_segments:
            segment["category_id"] = category.get(segment["id"], segment["category_id"])
    return gt.astype(np.int32), gt_segments, pred.astype(np.int32), pred_segments


def _blocks(rng, height, width, count):
    size = rng.integers(1, 8)
    small = rng.choice(IDS[:count], (height // size + 1, width // size + 1))
    return np.kron(small, np.ones((size, size), int))[:height, :width]


def _segments(rng, ids, categories, crowds):
    present = rng.permutation([i for i in np.unique(ids) if i])
    return [
        {"id": int(i), "category_id": int(rng.integers(1, categories + 1)), "iscrowd": int(rng.random() < crowds)}
        for i in present
    ]
