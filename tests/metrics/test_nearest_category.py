"""Segments named by the training segment that looks most alike."""

import numpy as np
import pytest

pytest.importorskip("skimage")

from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.metrics.nearest_category import NearestCategory, describe_segments

CATEGORIES = [{"id": 7, "name": "grass", "isthing": 0}, {"id": 3, "name": "ball", "isthing": 1}]


def picture(seed, top=(30, 160, 40), bottom=(200, 30, 30), size=(24, 32)):
    """Two halves of one colour each, with noise."""
    rng = np.random.default_rng(seed)
    ids = np.ones(size, np.int32)
    ids[size[0] // 2 :] = 2
    image = np.where((ids == 1)[..., None], top, bottom) + rng.integers(-9, 9, (*size, 3))
    return image.clip(0, 255).astype(np.uint8), ids


def items():
    for seed in range(3):
        image, ids = picture(seed)
        yield image, (ids, [{"id": 1, "category_id": 7, "iscrowd": 0}, {"id": 2, "category_id": 3, "iscrowd": 0}])


def test_segments_get_the_category_of_what_looks_alike():
    nearest = NearestCategory(items(), CATEGORIES)
    image, ids = picture(9, top=(190, 40, 35), bottom=(35, 150, 45))  # the other way round
    named, segments = nearest.name(image, ids)
    assert {s["id"]: s["category_id"] for s in segments} == {1: 3, 2: 7}
    assert np.array_equal(named, ids)


def test_stuff_of_one_category_is_one_segment():
    nearest = NearestCategory(items(), CATEGORIES)
    image, ids = picture(9, top=(30, 160, 40), bottom=(32, 158, 41))
    named, segments = nearest.name(image, ids)
    assert [s["category_id"] for s in segments] == [7] and set(np.unique(named)) == {1}


def test_descriptions():
    image, ids = picture(0, size=(600, 800))
    found = describe_segments(image, ids, [1, 2, 5])
    assert found.shape == (3, 19) and not found[2].any()  # 5 is not there
    assert found[0, -3:] == pytest.approx([0.5, 0.25, 0.5**0.5], abs=0.01)
    assert found[0, 6:16].sum() == pytest.approx(1)
    small = describe_segments(*picture(0, size=(24, 32)), [1, 2])
    assert np.abs(small[:, :3] - found[:2, :3]).max() < 3  # colours do not depend on the size


def test_nothing_to_learn_from():
    image, ids = picture(0)
    with pytest.raises(ArgumentError, match="no segment to learn"):
        NearestCategory([(image, (ids, [{"id": 1, "category_id": 7, "iscrowd": 1}]))], CATEGORIES)
    nearest = NearestCategory(items(), CATEGORIES)
    assert nearest.name(image, np.zeros_like(ids))[1] == []
