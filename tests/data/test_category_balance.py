"""Weights of categories by how rare they are: their mean, joined sets, and what cannot be weighed."""

import json

import numpy as np
import pytest

from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.data.category_balance import category_weights
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.errors import DataError
from ldmseg_fast.panoptic.format import write_panoptic_png

NAMES = ("sky", "car", "sheep")


def make_set(root, maps, names=NAMES, **changes):
    """A data set of 4x8 maps, each a list of (category, pixels, further keys) one after the other."""
    from PIL import Image

    (root / "train").mkdir(parents=True)
    (root / "annotations" / "panoptic_train").mkdir(parents=True)
    content = {"images": [], "annotations": []}
    content["categories"] = [{"id": 10 + n, "name": name, "isthing": 1} for n, name in enumerate(names)]
    for number, segments in enumerate(maps, 1):
        ids = np.repeat(np.arange(1, len(segments) + 1, dtype=np.int32), [area for _, area, _ in segments])
        ids = np.concatenate([ids, np.zeros(32 - len(ids), np.int32)]).reshape(4, 8)
        Image.new("RGB", (8, 4)).save(root / "train" / f"{number}.jpg")
        write_panoptic_png(root / "annotations" / "panoptic_train" / f"{number}.png", ids)
        infos = [
            {"id": place, "category_id": 10 + names.index(name), "iscrowd": 0, "area": area} | more
            for place, (name, area, more) in enumerate(segments, 1)
        ]
        content["images"].append({"id": number, "file_name": f"{number}.jpg", "height": 4, "width": 8})
        content["annotations"].append({"image_id": number, "file_name": f"{number}.png", "segments_info": infos})
    (root / "annotations" / "panoptic_train.json").write_text(json.dumps(content | changes))
    return CocoPanoptic(root, "train", 8, train=True, min_area=2)


@pytest.fixture
def first(tmp_path):
    maps = [[("sky", 18, {}), ("car", 2, {})], [("sky", 10, {}), ("car", 9, {"iscrowd": 1}), ("sky", 1, {})]]
    return make_set(tmp_path / "first", maps)  # sky 28, car 2; a crowd and a crumb do not count


def test_the_mean_weight_of_a_pixel_is_one(first):
    table = CategoryTable.of_data_set(first.categories, "")
    for balance in (0.25, 0.5, 1.0):
        weights = category_weights([first], table, balance)
        assert weights.dtype == np.float32 and weights.shape == (4,)
        assert weights[0] == 0 and weights[3] == 1, "void, and a category without pixels"
        assert weights[2] / weights[1] == pytest.approx(14**balance)
        assert (28 * weights[1] + 2 * weights[2]) / 30 == pytest.approx(1)
    assert category_weights([first], table, 0.0).tolist() == [0, 1, 1, 1]


def test_sets_count_as_often_as_they_are_drawn(first, tmp_path):
    other = make_set(tmp_path / "other", [[("sheep", 8, {}), ("sky", 8, {})]], names=("sheep", "sky"))
    table = CategoryTable.of_data_sets([(first.categories, "one"), (other.categories, "two")])
    share = {"sky": 3 / 4 * 28 / 30 + 1 / 4 / 2, "car": 3 / 4 * 2 / 30, "sheep": 1 / 4 / 2}
    weights = category_weights([first, other], table, 1.0, [3.0, 1.0])
    assert weights[1:] == pytest.approx([1 / share[name] / 3 for name in NAMES])
    by_size, equal = category_weights([first, other], table, 1.0), category_weights([first, other], table, 1.0, [2, 1])
    assert np.array_equal(by_size, equal), "two items and one"
    assert np.array_equal(category_weights([first, other], table, 1.0, [1, 0]), category_weights([first], table, 1.0))


def test_what_cannot_be_weighed(first, tmp_path):
    table = CategoryTable.of_data_set(first.categories, "")
    content = json.loads(first.folders.annotations.read_text())
    del content["annotations"][1]["segments_info"][0]["area"]
    first.folders.annotations.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"panoptic_train.json: segment 1 of 2 .*has no area.*loss.category_balance=0"):
        category_weights([CocoPanoptic(first.root, "train", 8, train=True)], table, 0.5)
    void = make_set(tmp_path / "void", [[("sky", 1, {})]])
    with pytest.raises(DataError, match=r"no labelled pixels.*loss.category_balance=0"):
        category_weights([void], table, 0.5)
