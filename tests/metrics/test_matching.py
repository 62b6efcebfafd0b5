"""Matches of one image: C++, numpy twin and a mask-by-mask implementation agree, and faults are named."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldmseg_fast.errors import PanopticFormatError
from ldmseg_fast.metrics import matching
from ldmseg_fast.metrics.matching import (
    FALSE_NEGATIVE,
    FALSE_POSITIVE,
    FALSE_POSITIVE_ONE_CROWD,
    TRUE_POSITIVE,
    match_segments,
    segment_table,
)
from ldmseg_fast.native import _C
from ldmseg_fast.panoptic.format import MAX_ID

IDS = [0, 1, 2, 3, 7, 255, 256, 65535, 65536, MAX_ID - 1, MAX_ID]


def _blocks(rng, height, width, count):
    size = rng.integers(1, 8)
    small = rng.choice(IDS[:count], (height // size + 1, width // size + 1))
    return np.kron(small, np.ones((size, size), int))[:height, :width]


def _counts(matches, every_crowd):
    counts = {}
    for row in matches:
        count = counts.setdefault(int(row["category_id"]), [0, 0, 0, 0.0])
        if row["outcome"] == TRUE_POSITIVE:
            count[0] += 1
            count[3] += float(row["iou"])
        elif row["outcome"] == FALSE_NEGATIVE:
            count[2] += 1
        elif row["outcome"] == FALSE_POSITIVE or not every_crowd:
            count[1] += 1
    return {category: count for category, count in counts.items() if any(count)}


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), class_agnostic=st.booleans())
def test_equals_the_mask_by_mask_implementation(plain_pq, panoptic_images, data, class_agnostic):
    image = data.draw(panoptic_images)
    gt, gt_segments, pred, pred_segments = image
    tables = segment_table(gt_segments, class_agnostic), segment_table(pred_segments, class_agnostic)
    matches = match_segments(gt, tables[0], pred, tables[1], boundary=True)
    twin = matching._match_numpy(gt, tables[0], pred, tables[1], True)
    assert matches.dtype == twin.dtype == matching.MATCH_DTYPE
    for name in matching.MATCH_DTYPE.names:
        np.testing.assert_array_equal(matches[name], twin[name], err_msg=name)
    if class_agnostic:
        gt_segments = [segment | {"category_id": 1} for segment in gt_segments]
        pred_segments = [segment | {"category_id": 1} for segment in pred_segments]
    for every_crowd in (False, True):
        expected = plain_pq.match_by_masks(gt, gt_segments, pred, pred_segments, every_crowd)
        found = _counts(matches, every_crowd)
        assert found.keys() == expected.keys()
        for category, count in expected.items():
            assert found[category][:3] == count[:3]
            assert found[category][3] == pytest.approx(count[3], abs=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (63, 65), (64, 1), (37, 200)], ids=str)
@pytest.mark.parametrize("distance", [1, 2, 7, 16, 40, 70])
def test_boundary_mask_is_a_segment_minus_its_erosion(shape, distance):
    ids = _blocks(np.random.default_rng(0), *shape, 5).astype(np.int32)
    expected = np.zeros(shape, bool)
    for y, x in np.ndindex(shape):
        top, left = max(y - distance, 0), max(x - distance, 0)
        window = ids[top : y + distance + 1, left : x + distance + 1]
        expected[y, x] = window.size < (2 * distance + 1) ** 2 or (window != ids[y, x]).any()
    np.testing.assert_array_equal(matching._boundary_mask_numpy(ids, distance), expected)
    np.testing.assert_array_equal(matching.boundary_mask(ids, distance), expected)


def test_boundary_iou_by_hand():
    # one segment of 20 x 20, predicted one pixel to the right; boundary width 1: frames of 76 pixels
    gt, pred = np.zeros((40, 40), np.int32), np.zeros((40, 40), np.int32)
    gt[10:30, 10:30], pred[10:30, 11:31] = 1, 1
    segments = segment_table([{"id": 1, "category_id": 1}], False)
    gt[gt == 0], pred[pred == 0] = 2, 2
    segments = segment_table([{"id": 1, "category_id": 1}, {"id": 2, "category_id": 2}], False)
    (match,) = [row for row in match_segments(gt, segments, pred, segments, boundary=True) if row["gt_id"] == 1]
    assert matching.boundary_distance(40, 40) == 1
    assert match["iou"] == 380 / 420
    # shared: 19 pixels of the upper and lower sides; the left and right sides do not meet
    assert match["boundary_iou"] == 38 / (76 + 76 - 38)


def test_one_crowd_per_category_against_every_crowd():
    gt = np.array([[1, 1, 1, 2, 2, 2, 3, 3]], np.int32)
    pred = np.array([[9, 9, 9, 9, 9, 9, 0, 0]], np.int32)
    gt_segments = [{"id": i, "category_id": 1, "iscrowd": int(i != 3)} for i in (1, 2, 3)]
    matches = match_segments(
        gt, segment_table(gt_segments, False), pred, segment_table([{"id": 9, "category_id": 1}], False)
    )
    assert matches["outcome"].tolist() == [FALSE_NEGATIVE, FALSE_POSITIVE_ONE_CROWD]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    ("gt", "gt_ids", "pred", "pred_ids", "message"),
    [
        ([[1, 2]], [1], [[1, 1]], [1], "ground truth: ids in the map but not in segments_info: 2"),
        ([[1, 1]], [1, 5], [[1, 1]], [1], "ground truth: ids in segments_info but not in the map: 5"),
        ([[1, 1]], [1], [[4, 4]], [1], "prediction: ids in the map but not in segments_info: 4"),
        ([[1, 1]], [1], [[4, 4]], [4, 6], "prediction: ids in segments_info but not in the map: 6"),
        ([[1, 1]], [1], [[4, 4]], [4, 4], "prediction: segments_info lists an id twice"),
        ([[1, 1]], [1], [[-4, 4]], [4], "prediction: segment ids must lie in 0..16777215"),
        ([[1, 2**24]], [1], [[4, 4]], [4], "ground truth: segment ids must lie in 0..16777215"),
        ([[1, 1]], [1], [[4, 4, 4]], [4], "ground truth is 2x1, prediction is 3x1"),
        ([1, 1], [1], [[4, 4]], [4], "expected integer ids"),
        ([[1.0, 1.0]], [1], [[4, 4]], [4], "expected integer ids"),
    ],
)
def test_faults_are_named(monkeypatch, native, gt, gt_ids, pred, pred_ids, message):
    monkeypatch.setattr(matching, "_C", _C if native else None)
    tables = [segment_table([{"id": i, "category_id": 1} for i in ids], False) for ids in (gt_ids, pred_ids)]
    with pytest.raises(PanopticFormatError, match=message):
        match_segments(np.array(gt), tables[0], np.array(pred), tables[1])


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("given", [None, [[1, 1]], "map", torch.ones(1, 2, dtype=torch.int32)], ids=lambda value: "")
def test_maps_that_are_no_arrays_are_named(monkeypatch, native, given):
    monkeypatch.setattr(matching, "_C", _C if native else None)
    ids, table = np.ones((1, 2), np.int32), segment_table([{"id": 1, "category_id": 1}], False)
    with pytest.raises(PanopticFormatError, match="prediction: expected an array of integer ids"):
        match_segments(ids, table, given, table)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (None, "a list of objects with an `id` expected, got None"),
        ("text", "a list of objects"),
        ([3], r"a list of objects with an `id` expected, got \[3\]"),
        ([{"category_id": 1}], "segment None: "),
        ([{"id": 1}], "segment 1: `category_id` None"),
        ([{"id": 1.5, "category_id": 1}], "segment 1.5: .* whole numbers"),
        ([{"id": 1, "category_id": float("nan")}], "`category_id` nan"),
        ([{"id": [1], "category_id": 1}], r"segment \[1\]: "),
    ],
)
def test_segments_that_are_none_are_named(segments, message):
    with pytest.raises(PanopticFormatError, match=message):
        segment_table(segments, False)


def test_an_impossible_area_of_the_json_is_named():
    gt = np.ones((4, 4), np.int32)
    table = segment_table([{"id": 1, "category_id": 1, "area": 3}], False, use_area=True)
    with pytest.raises(PanopticFormatError, match="segment 1: area 3"):
        match_segments(gt, table, gt, segment_table([{"id": 1, "category_id": 1}], False))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.int64])
def test_any_integer_type_and_memory_order(dtype):
    ids = np.asfortranarray(np.random.default_rng(0).integers(1, 5, (30, 20)).astype(dtype))
    table = segment_table([{"id": i, "category_id": 1} for i in range(1, 5)], False)
    assert match_segments(ids, table, ids, table)["iou"].tolist() == [1.0] * 4


def test_without_the_extension_one_warning(monkeypatch):
    from ldmseg_fast.native import warn_slow

    monkeypatch.setattr(matching, "_C", None)
    warn_slow.cache_clear()
    ids, table = np.ones((2, 2), np.int32), segment_table([{"id": 1, "category_id": 1}], False)
    with pytest.warns(RuntimeWarning, match="_C is not built") as caught:
        match_segments(ids, table, ids, table)
        match_segments(ids, table, ids, table)
    assert len(caught) == 1


@pytest.mark.parametrize(
    "wrong", [{"iscrowd": None}, {"iscrowd": "0"}, {"iscrowd": 2}, {"iscrowd": float("nan")}, {"category_id": 2**40}]
)
def test_segments_that_are_no_numbers(wrong):
    with pytest.raises(PanopticFormatError, match=r"segment 7: .*`iscrowd`"):
        segment_table([{"id": 7, "category_id": 1} | wrong], False)
