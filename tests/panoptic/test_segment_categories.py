"""A category for each segment, and one segment for all stuff of a category."""

import numpy as np
import pytest
import torch

from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.config.categories import Category, CategoryTable
from ldmseg_fast.metrics.class_vote import merge_stuff
from ldmseg_fast.panoptic import segment_categories
from ldmseg_fast.panoptic.postprocess import postprocess
from ldmseg_fast.panoptic.results import PanopticResult
from ldmseg_fast.panoptic.segment_categories import name_segments, slot_categories
from ldmseg_fast.panoptic.shapes import segment_shapes

TABLE = CategoryTable((Category(30, "sky", False, (0, 0, 0)), Category(10, "cat", True, (1, 1, 1))))


def test_votes_are_the_sum_over_pixels():
    slots, categories = torch.randn(2, 5, 3, 4), torch.randn(2, 4, 3, 4)
    number, score = slot_categories(slots, categories)
    for image in range(2):
        s = slots[image].double().softmax(0).flatten(1).numpy()
        c = categories[image].double().softmax(0).flatten(1).numpy()
        for slot in range(5):
            votes = [(s[slot] * c[category]).sum() for category in range(4)]
            best = 1 + int(np.argmax(votes[1:]))
            assert number[image, slot] == best
            assert score[image, slot] == pytest.approx(votes[best] / s[slot].sum(), rel=1e-5)


def test_coarse_categories_are_those_of_the_nearest_pixel():
    slots, categories = torch.randn(2, 5, 6, 8), torch.randn(2, 4, 3, 4)
    number, score = slot_categories(slots, categories)
    fine = slot_categories(slots, categories.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert torch.equal(number, fine[0])
    torch.testing.assert_close(score, fine[1])


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("slots", [None, [4, 1]])
def test_parts_of_the_pixels_give_what_all_give(slots, factor, monkeypatch):
    slots = slots and torch.tensor(slots)
    logits = torch.randn(3, 5, 6 * factor, 7 * factor), torch.randn(3, 4, 6, 7)
    whole = slot_categories(*logits, slots)
    for pixels in (0, 5, 41, 42):
        monkeypatch.setattr(segment_categories, "CACHED", 27 * pixels)
        number, score = slot_categories(*logits, slots)
        assert torch.equal(number, whole[0])
        torch.testing.assert_close(score, whole[1], rtol=1e-5, atol=0)


def test_void_is_no_category():
    logits = torch.zeros(1, 3, 2, 2)
    logits[:, 0] = 100.0
    number, score = slot_categories(torch.zeros(1, 4, 2, 2), logits)
    assert number.min() >= 1 and score.max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_added_up_in_float32(dtype):
    slots, categories = torch.randn(1, 8, 64, 64).to(dtype), torch.randn(1, 5, 64, 64).to(dtype)
    exact = slot_categories(slots.double().float(), categories.double().float())
    number, score = slot_categories(slots, categories)
    assert torch.equal(number, exact[0]) and torch.equal(score, exact[1])


def result_of(ids):
    segments = [
        {**shape, "category_id": 1, "label_id": 1, "isthing": True, "iscrowd": 0, "was_fused": False, "score": 0.1 * n}
        for n, shape in enumerate(segment_shapes(ids), 1)
    ]
    return PanopticResult(ids, segments)


def test_stuff_of_a_category_becomes_one_segment_and_things_stay_apart():
    ids = np.array([[1, 1, 2, 0], [3, 4, 2, 0], [3, 4, 4, 5]], np.int32)
    before = result_of(ids.copy())
    numbers, scores = [1, 2, 1, 2, 1], [0.9, 0.8, 0.6, 0.7, 0.3]
    after = name_segments(before, numbers, scores, TABLE)
    assert after.segmentation.tolist() == [[1, 1, 2, 0], [1, 4, 2, 0], [1, 4, 4, 1]]
    assert np.array_equal(before.segmentation, ids), "the given map must not be changed"
    named = [s | {"category_id": TABLE[numbers[s["id"] - 1]].id} for s in before.segments_info]
    expected_ids, expected = merge_stuff(ids, named, {30})
    assert np.array_equal(expected_ids, after.segmentation)
    for ours, theirs in zip(after.segments_info, expected, strict=True):
        for key in ("id", "category_id", "area", "bbox", "was_fused"):
            assert ours[key] == theirs[key]
        assert ours["score"] == pytest.approx(theirs["score"])
    sky = after.segments_info[0]
    assert (sky["name"], sky["isthing"], sky["label_id"], sky["was_fused"]) == ("sky", False, 30, True)
    assert sky["category_score"] == pytest.approx((0.9 * 2 + 0.6 * 2 + 0.3 * 1) / 5)
    assert [s["name"] for s in after.segments_info[1:]] == ["cat", "cat"]
    for shape, segment in zip(segment_shapes(after.segmentation), after.segments_info, strict=True):
        assert (shape["id"], shape["area"], shape["bbox"]) == (segment["id"], segment["area"], segment["bbox"])


def test_void_only():
    result = name_segments(result_of(np.zeros((2, 3), np.int32)), [1] * 4, [0.5] * 4, TABLE)
    assert result.segments_info == [] and not result.segmentation.any()


def test_postprocess_names_segments_and_leaves_maps_alone_without_categories():
    slots = torch.full((2, 4, 8, 8), -5.0)
    slots[:, 1, :, :4], slots[:, 2, :, 4:] = 5.0, 5.0
    categories = torch.full((2, 3, 8, 8), -5.0)
    categories[0, 1] = 5.0  # all of the first image is sky
    categories[1, 2] = 5.0
    thresholds = PostprocessConfig(count_threshold=1)
    sizes = [(16, 16), (8, 8)]
    plain = postprocess(slots, (16, 16), sizes, thresholds)
    named = postprocess(slots, (16, 16), sizes, thresholds, categories, TABLE)
    assert [len(result.segments_info) for result in plain] == [2, 2]
    assert [[s["name"] for s in result.segments_info] for result in named] == [["sky"], ["cat", "cat"]]
    assert named[0].segments_info[0]["area"] == 256 and set(np.unique(named[0].segmentation)) == {2}
    assert np.array_equal(named[1].segmentation, plain[1].segmentation)
    assert all("name" not in s and s["category_id"] == 1 for result in plain for s in result.segments_info)
