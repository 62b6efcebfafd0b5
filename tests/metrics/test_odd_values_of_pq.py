"""Odd values that `PanopticQuality` is given: one clear error, or the right number."""

import copy

import numpy as np
import pytest
import torch

from ldmseg_fast.errors import ArgumentError, PanopticFormatError
from ldmseg_fast.metrics import PanopticQuality

CATEGORIES = [{"id": 5, "isthing": 0}]
IMAGE = (np.ones((4, 4), np.int32), [{"id": 1, "category_id": 5}])


def counted(image_ids=None):
    metric = PanopticQuality(CATEGORIES)
    metric.update(IMAGE, IMAGE, image_ids)
    return metric


def test_a_bfloat16_map_is_refused_by_name():
    with pytest.raises(PanopticFormatError, match=r"prediction: expected integer ids, got torch.bfloat16"):
        PanopticQuality(class_agnostic=True).update(torch.ones(2, 4, 4, dtype=torch.bfloat16), np.ones((2, 4, 4), int))


def test_an_array_of_objects_is_refused():
    with pytest.raises(PanopticFormatError, match="object"):
        PanopticQuality(class_agnostic=True).update(np.array([[None]]), np.ones((1, 1), int))


@pytest.mark.parametrize("isthing", ["1", None, float("nan"), 2], ids=str)
def test_what_is_neither_thing_nor_stuff_is_refused(isthing):
    with pytest.raises(PanopticFormatError, match=r"categories\[0\]: `isthing` must be 0 or 1, got"):
        PanopticQuality([{"id": 5, "isthing": isthing}])


@pytest.mark.parametrize("void", [3, "0", ["0"], [float("nan")]], ids=str)
def test_void_that_is_no_list_of_numbers_is_refused(void):
    with pytest.raises(PanopticFormatError, match=r"void=.*: .*category numbers expected"):
        PanopticQuality(CATEGORIES, void=void)


@pytest.mark.parametrize("height", ["4", -4, 4.5, 0, True])
def test_a_height_that_is_no_number_of_pixels_is_refused(height):
    with pytest.raises(PanopticFormatError, match="`height` and `width` must be whole numbers"):
        PanopticQuality(CATEGORIES).update(IMAGE, {"annotations": [], "height": height, "width": 4})


def test_a_size_of_none_is_that_of_the_other_side():
    metric = PanopticQuality(CATEGORIES)
    metric.update({"annotations": [], "height": None, "width": None}, IMAGE)
    assert metric.compute()["per_category"]["5"]["fn"] == 1


@pytest.mark.parametrize("image_ids", [7, "a", [float("nan")], [[1]], [True]], ids=str)
def test_image_ids_that_are_none_are_refused(image_ids):
    with pytest.raises(ArgumentError, match="image"):
        counted(image_ids)


@pytest.mark.parametrize("image_ids", [np.array([7]), torch.tensor([7])], ids=["numpy", "torch"])
def test_image_ids_of_an_array_are_numbers(image_ids):
    assert [type(each) for each in counted(image_ids).image_ids] == [int]
    with pytest.raises(ArgumentError, match="counted twice"):
        counted(image_ids).merge(counted([7]))


def test_a_numpy_id_of_a_row_is_kept():
    metric = PanopticQuality(CATEGORIES)
    metric.update(IMAGE, {"segmentation": IMAGE[0], "segments_info": IMAGE[1], "image_id": np.int64(12)})
    assert metric.image_ids == [12]


def test_a_metric_merges_with_itself():
    metric = counted()
    assert metric.merge(metric).compute()["per_category"]["5"]["tp"] == 2


@pytest.mark.parametrize(
    "column, value",
    [
        ("area", np.array([1, 1])),
        ("area", np.array(1)),
        ("category_id", np.array([77])),
        ("iou", np.array([np.nan])),
        ("iou", np.array([1.5])),
    ],
)
def test_a_state_that_contradicts_itself_is_refused(column, value):
    state = copy.deepcopy(counted().state())
    state["matches"][column] = value
    with pytest.raises(ArgumentError, match="this is no state"):
        PanopticQuality.from_state(state)


def test_a_category_id_of_true_is_refused():
    with pytest.raises(PanopticFormatError, match=r"categories\[0\]"):
        PanopticQuality([{"id": True}])
