"""PanopticQuality: golden values, exact merging, what is derived from the matches."""

import json

import numpy as np
import pytest

from ldmseg_fast.errors import PanopticFormatError
from ldmseg_fast.metrics.pq import PanopticQuality
from ldmseg_fast.metrics.pq_report import image_qualities
from ldmseg_fast.metrics.resampling import bootstrap_interval
from ldmseg_fast.panoptic.format import load_panoptic_json, read_panoptic_png

CATEGORIES = [{"id": 1, "name": "cat", "isthing": 1}, {"id": 5, "name": "sky", "isthing": 0}]


@pytest.fixture(scope="module")
def golden(shared):
    """(categories, [(image id, gt ids, gt segments, pred ids, pred segments)], expected values)."""
    folder = shared / "golden" / "pq"
    gt, pred = load_panoptic_json(folder / "gt.json"), load_panoptic_json(folder / "pred.json", predictions=True)
    by_id = {entry["image_id"]: entry for entry in pred["annotations"]}
    images = []
    for entry in gt["annotations"]:
        other = by_id[entry["image_id"]]
        images.append(
            (
                entry["image_id"],
                read_panoptic_png(folder / "gt" / entry["file_name"]),
                entry["segments_info"],
                read_panoptic_png(folder / "pred" / other["file_name"]),
                other["segments_info"],
            )
        )
    return gt["categories"], images, json.loads((folder / "expected.json").read_text())


def _score(categories, images, **options):
    stat = PanopticQuality(categories, **options)
    for image_id, *maps in images:
        stat.add(*maps, image_id=image_id)
    return stat


def _equal(found, expected):
    for name, value in expected.items():
        assert found[name] == (value if isinstance(value, int) else pytest.approx(value, abs=1e-9)), name


def test_golden_class_aware(golden):
    categories, images, expected = golden
    result = _score(categories, images).compute()
    for group in ("All", "Things", "Stuff"):
        _equal(result[group], expected[group])
    assert result["per_category"].keys() == expected["per_category"].keys()
    for key, entry in expected["per_category"].items():
        _equal(result["per_category"][key], entry)


def test_golden_class_agnostic(golden):
    categories, images, expected = golden
    result = _score(categories, images, class_agnostic=True).compute()
    _equal(result["class_agnostic"], expected["class_agnostic"])
    assert result["All"]["pq"] == result["Things"]["pq"] == result["class_agnostic"]["pq"]
    assert result["Stuff"]["n"] == 0
    correct = {
        "pq": 0.5862819720502551,
        "sq": 0.8174123648777596,
        "rq": 0.7172413793103448,
        "tp": 52,
        "fp": 23,
        "fn": 18,
    }
    _equal(result["crowd_correct"], correct)
    assert result["pq_crowd_correct"] == result["crowd_correct"]["pq"]


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_ranks_merge_to_the_last_digit(golden, class_agnostic):
    categories, images, _ = golden
    options = {"class_agnostic": class_agnostic, "boundary": True}
    whole = _score(categories, images, **options)
    for ranks in (2, 3, 8):
        parts = [_score(categories, images[rank::ranks], **options) for rank in range(ranks)]
        merged = parts[-1]
        for part in parts[:-1]:
            merged.merge(part)
        assert merged.compute() == whole.compute()
        assert bootstrap_interval(merged, 50) == bootstrap_interval(whole, 50)
        assert sorted(image_qualities(merged), key=lambda image: image["image_id"]) == sorted(
            image_qualities(whole), key=lambda image: image["image_id"]
        )


def test_merging_twice_or_over_other_categories_is_an_error(golden):
    categories, images, _ = golden
    stat = _score(categories, images[:2])
    with pytest.raises(ValueError, match="images counted twice"):
        stat.merge(_score(categories, images[1:2]))
    with pytest.raises(ValueError, match="different categories"):
        stat.merge(PanopticQuality(CATEGORIES))


def test_only_statistics_are_merged():
    with pytest.raises(ValueError, match="a PanopticQuality expected, got dict"):
        PanopticQuality(CATEGORIES).merge({})


def test_boundary_pq_is_below_pq_and_equals_it_for_perfect_maps(golden):
    categories, images, _ = golden
    result = _score(categories, images, boundary=True).compute()
    assert 0 < result["All"]["boundary_pq"] < result["All"]["pq"]
    perfect = [(image_id, gt, segments, gt, segments) for image_id, gt, segments, _, _ in images]
    perfect = _score(categories, perfect, class_agnostic=True, boundary=True).compute()
    assert perfect["crowd_correct"]["boundary_pq"] == perfect["crowd_correct"]["pq"] == 1.0


def test_sizes_partition_the_counts(golden):
    categories, images, _ = golden
    stat = _score(categories, images, class_agnostic=True)
    sizes = stat.compute()["sizes"]
    assert set(sizes) == {"small", "medium", "large"}
    assert sizes["small"]["pq"] < sizes["large"]["pq"]


def test_empty_statistics_and_empty_images():
    stat = PanopticQuality(CATEGORIES)
    assert stat.compute()["All"] == {"pq": 0.0, "sq": 0.0, "rq": 0.0, "n": 0}
    assert bootstrap_interval(stat) is None
    void = np.zeros((4, 4), np.uint8)
    stat.add(void, [], void, [])
    assert stat.compute()["All"]["n"] == 0
    assert image_qualities(stat)[0]["pq"] is None


def test_things_and_stuff():
    ids = np.array([[1, 1, 2, 2]], np.int32)
    segments = [{"id": 1, "category_id": 1}, {"id": 2, "category_id": 5}]
    stat = PanopticQuality(CATEGORIES)
    stat.add(ids, segments, np.array([[1, 1, 2, 0]], np.int32), segments)
    stat.add(ids, segments, np.array([[1, 1, 0, 0]], np.int32), segments[:1])
    result = stat.compute()
    assert result["Things"] == {"pq": 1.0, "sq": 1.0, "rq": 1.0, "n": 1}
    assert result["per_category"]["5"]["fn"] == 2  # IoU 1/2 is no match
    assert result["per_category"]["5"]["name"] == "sky"
    assert result["All"]["pq"] == 0.5


def test_unknown_category_names_the_image():
    ids, segments = np.ones((2, 2), np.int32), [{"id": 1, "category_id": 77}]
    with pytest.raises(PanopticFormatError, match=r"image 12: ground truth: category ids \[77\]"):
        PanopticQuality(CATEGORIES).add(ids, segments, ids, segments, image_id=12)
    PanopticQuality(CATEGORIES, class_agnostic=True).add(ids, segments, ids, segments)


def test_bootstrap_interval_holds_the_value_and_follows_the_seed(golden):
    categories, images, _ = golden
    stat = _score(categories, images, class_agnostic=True)
    interval = bootstrap_interval(stat, 300, seed=1)
    low, high = interval["pq"]
    assert low < stat.compute()["All"]["pq"] < high
    assert interval == bootstrap_interval(stat, 300, seed=1) != bootstrap_interval(stat, 300, seed=2)
