"""Overlapping masks become one map by one rule."""

import numpy as np
import pytest

from ldmseg_fast.errors import DataError
from ldmseg_fast.formats.painting import EMPTY, HIDDEN, OVERLAP, Mask, paint


def box(top, left, bottom, right, size=(6, 8)):
    pixels = np.zeros(size, bool)
    pixels[top:bottom, left:right] = True
    return pixels


def test_small_things_lie_on_large_ones_and_all_on_stuff():
    small, large, crowd, sky = box(1, 1, 3, 3), box(0, 0, 4, 4), box(0, 0, 5, 5), box(0, 0, 6, 8)
    painted = paint(
        [Mask(small, 1), Mask(large, 1, score=0.5), Mask(crowd, 1, iscrowd=True), Mask(sky, 2, isthing=False)], 6, 8
    )
    expected = np.full((6, 8), 4)
    for number, pixels in ((3, crowd), (2, large), (1, small)):
        expected[pixels] = number
    assert np.array_equal(painted.ids, expected) and painted.ids.dtype == np.int32
    assert painted.segments == [
        {"id": 1, "category_id": 1, "iscrowd": 0},
        {"id": 2, "category_id": 1, "iscrowd": 0, "score": 0.5},
        {"id": 3, "category_id": 1, "iscrowd": 1},
        {"id": 4, "category_id": 2, "iscrowd": 0},
    ]
    assert painted.left_out == {OVERLAP: 25 + 16 + 4}


def test_an_order_of_its_own_is_kept():
    painted = paint([Mask(box(1, 1, 3, 3), 1), Mask(box(0, 0, 4, 4), 1), Mask(box(0, 0, 1, 1), 1)], 6, 8, ordered=True)
    assert [segment["id"] for segment in painted.segments] == [1, 2] == sorted(set(np.unique(painted.ids)) - {0})
    assert painted.left_out == {HIDDEN: 1, OVERLAP: 5} and painted.ids[0, 0] == 2


def test_stuff_of_one_category_is_one_segment():
    painted = paint([Mask(box(0, 0, 2, 2), 7, isthing=False), Mask(box(1, 1, 4, 4), 7, isthing=False)], 6, 8)
    assert len(painted.segments) == 1 and painted.left_out == {} and (painted.ids == 1).sum() == 12
    assert np.array_equal(painted.ids == 1, box(0, 0, 2, 2) | box(1, 1, 4, 4))


def test_empty_masks_and_no_masks():
    assert paint([], 6, 8).segments == [] and not paint([], 6, 8).ids.any()
    painted = paint([Mask(box(0, 0, 0, 0), 1), Mask(box(0, 0, 1, 1), 1)], 6, 8)
    assert painted.segments[0]["id"] == 1 and painted.left_out == {EMPTY: 1}


def test_a_mask_of_another_size_is_named():
    with pytest.raises(DataError, match="the dog is 4x3, its picture 8x6"):
        paint([Mask(np.ones((3, 4), bool), 1, name="the dog")], 6, 8)
