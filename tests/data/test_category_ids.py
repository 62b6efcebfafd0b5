"""Maps of categories beside maps of ids: the same crop, mirror and resize, from the cache too."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.data.coco_panoptic import CocoPanoptic, collate
from ldmseg_fast.data.transforms import Augmentation
from ldmseg_fast.errors import DataError
from ldmseg_fast.panoptic.format import write_panoptic_png


def make_split(root: Path, categories: list[dict], ids: np.ndarray, segments: list[dict]) -> Path:
    for folder in ("train2017", "panoptic_train2017", "annotations"):
        (root / folder).mkdir(parents=True)
    height, width = ids.shape
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(root / "train2017" / "1.png")
    write_panoptic_png(root / "panoptic_train2017" / "1.png", ids)
    content = {
        "images": [{"id": 1, "file_name": "1.png", "height": height, "width": width}],
        "annotations": [{"image_id": 1, "file_name": "1.png", "segments_info": segments}],
        "categories": categories,
    }
    (root / "annotations" / "panoptic_train2017.json").write_text(json.dumps(content))
    return root


def table_of(dataset: CocoPanoptic) -> CategoryTable:
    return CategoryTable.of_data_set(dataset.categories, "data")


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("augmented", [False, True])
def test_every_pixel_has_the_category_of_its_segment(category_scenes: Path, cache: bool, augmented: bool) -> None:
    augmentation = Augmentation(flip=0.5, scale_min=0.5 if augmented and not cache else 1.0)
    dataset = CocoPanoptic(category_scenes, "train2017", 48, train=augmented, augmentation=augmentation, cache=cache)
    dataset.use_categories(table_of(dataset))
    for epoch in range(3):
        for index in range(6):
            item = dataset[epoch, index]
            ids, categories = item["segment_ids"].numpy(), item["category_ids"].numpy()
            assert categories.dtype == np.uint8 and categories.shape == ids.shape
            assert np.array_equal(ids == 0, categories == 0)
            found = {int(number): set(categories[ids == number].tolist()) for number in np.unique(ids) if number}
            assert all(len(kinds) == 1 for kinds in found.values())
            own = {dataset._numbers[s["category_id"]] for s in dataset.segments_info(index)}
            assert set.union(*found.values()) <= own
    batch = collate([dataset[0, 0], dataset[0, 1]])
    assert batch["category_ids"].shape == (2, 48, 48)


def test_right_segments_have_the_right_category(tmp_path: Path) -> None:
    """Other ids, another order, a crowd that is void in training, and a crumb."""
    ids = np.zeros((8, 8), np.int32)
    ids[:4, :4], ids[:4, 4:], ids[4:, :4], ids[7, 7] = 500, 70000, 3, 9
    segments = [
        {"id": 3, "category_id": 40, "iscrowd": 1},
        {"id": 500, "category_id": 7},
        {"id": 70000, "category_id": 40},
        {"id": 9, "category_id": 7},
    ]
    categories = [{"id": 40, "name": "tree", "isthing": 1}, {"id": 7, "name": "sky", "isthing": 0}]
    root = make_split(tmp_path, categories, ids, segments)
    table = CategoryTable.of_data_set([categories[1], categories[0]], "model")  # sky 1, tree 2
    train = CocoPanoptic(root, "train2017", 8, train=True, augmentation=Augmentation(flip=0), min_area=2)
    train.use_categories(table)
    expected = np.zeros((8, 8), int)
    expected[:4, :4], expected[:4, 4:] = 1, 2
    assert np.array_equal(train[0]["category_ids"].numpy(), expected)
    whole = CocoPanoptic(root, "train2017", 8)
    whole.use_categories(table)
    expected[4:, :4], expected[7, 7] = 2, 1
    assert np.array_equal(whole[0]["category_ids"].numpy(), expected)
    assert "category_ids" not in CocoPanoptic(root, "train2017", 8)[0]


@pytest.mark.parametrize(("count", "dtype"), [(255, np.uint8), (256, np.int16), (4095, np.int16)])
def test_many_categories_take_two_bytes(tmp_path: Path, count: int, dtype: type) -> None:
    ids = np.repeat(np.arange(1, 65, dtype=np.int32).reshape(8, 8), 2, 0).repeat(2, 1)
    segments = [{"id": n, "category_id": count - n} for n in range(1, 65)]
    categories = [{"id": n, "name": f"kind {n}", "isthing": 1} for n in range(count)]
    root = make_split(tmp_path, categories, ids, segments)
    dataset = CocoPanoptic(root, "train2017", 16)
    dataset.use_categories(table_of(dataset))
    found = dataset[0]["category_ids"].numpy()
    assert found.dtype == dtype and np.array_equal(found, count - ids + 1)


def test_void_only_and_a_data_set_that_does_not_fit(tmp_path: Path) -> None:
    categories = [{"id": 1, "name": "sky", "isthing": 0}]
    root = make_split(tmp_path, categories, np.zeros((8, 8), np.int32), [])
    dataset = CocoPanoptic(root, "train2017", 8)
    dataset.use_categories(table_of(dataset))
    assert not dataset[0]["category_ids"].any()
    with pytest.raises(DataError, match=r"panoptic_train2017\.json: the model has no category 'sky'"):
        dataset.use_categories(CategoryTable.of_data_set([{"id": 1, "name": "sea", "isthing": 0}], "model"))
