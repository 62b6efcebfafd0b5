"""Fixtures of the metrics' tests."""

from types import ModuleType

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from ldmseg_fast.panoptic.format import MAX_ID

IDS = [0, 1, 2, 3, 7, 255, 256, 65535, 65536, MAX_ID - 1, MAX_ID]


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
