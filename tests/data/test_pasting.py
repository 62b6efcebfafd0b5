"""Things of another picture of the set, pasted in training."""

from __future__ import annotations

import numpy as np
import pytest

from ldmseg_fast.config import load_config
from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.data.latent_cache import why_not
from ldmseg_fast.data.transforms import Augmentation, paste
from ldmseg_fast.errors import ArgumentError

THING, STUFF = (200, 0, 0), (0, 0, 200)


@pytest.fixture
def pictures(folder) -> CocoPanoptic:
    """Three pictures, grey above and of a colour below: red is a thing, blue is stuff."""
    ids = np.ones((32, 32), np.int32)
    ids[16:] = 2
    categories = [{"id": 1, "name": "wall", "isthing": 0}, {"id": 5, "name": "car", "isthing": 1}]
    folder.content["categories"] = [*categories, {"id": 9, "name": "road", "isthing": 0}]
    for grey, (colour, category) in enumerate([(STUFF, 9), (STUFF, 9), (THING, 5)]):
        picture = np.full((32, 32, 3), 50 * grey, np.uint8)
        picture[16:] = colour
        index = folder.add(picture, ids, suffix="png")
        folder.content["annotations"][index]["segments_info"][1]["category_id"] = category
    folder.save()
    augmentation = Augmentation(flip=0.5, paste=1.0)
    dataset = CocoPanoptic(folder.root, "val", 16, train=True, augmentation=augmentation, picture_size=32)
    dataset.use_categories(CategoryTable.of_data_set(dataset.categories, "data"))
    return dataset


def test_paste_covers_picture_and_map() -> None:
    rgb, other = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 9, np.uint8)
    ids = np.array([[1, 1], [2, 2]], np.uint8)
    coarse = np.array([[0, 1], [2, 1]], np.uint8)
    fine = coarse.repeat(2, 0).repeat(2, 1)
    found, pasted = paste(rgb, ids, other, (fine, coarse), np.array([0, 3, 0], np.int32))
    assert pasted.dtype == np.int32 and pasted.tolist() == [[1, 3], [2, 3]]
    assert np.array_equal(found[..., 0] == 9, fine == 1) and found.dtype == np.uint8
    assert not rgb.any()


def test_only_things_are_pasted_and_they_bring_their_category(pictures: CocoPanoptic) -> None:
    numbers = dict(zip((1, 5, 9), range(1, 4), strict=True))
    pasted = 0
    for epoch in range(40):
        item = pictures[epoch, 0]
        rgb = item["image"].permute(1, 2, 0).numpy()[::2, ::2]
        ids, categories = item["segment_ids"].numpy(), item["category_ids"].numpy()
        red = (rgb == THING).all(-1)
        assert np.array_equal(categories == numbers[5], red)
        assert set(np.unique(categories)) <= {1, 2, 3}
        assert set(np.unique(ids)) == set(range(1, item["num_segments"] + 1))
        assert red.sum() in (0, 128), "the stuff of other pictures stays there"
        pasted += bool(red.any())
    assert 0 < pasted < 40  # a third of the others is red, and half of the things are taken


def test_random_numbers_come_from_seed_epoch_and_index(pictures: CocoPanoptic) -> None:
    for epoch in range(5):
        first, second = pictures[epoch, 1], pictures[epoch, 1]
        assert all(np.array_equal(first[name], second[name]) for name in ("image", "segment_ids", "category_ids"))


def test_evaluation_pastes_nothing(pictures: CocoPanoptic) -> None:
    augmentation = Augmentation(paste=1.0)
    dataset = CocoPanoptic(pictures.root, "val", 16, augmentation=augmentation, picture_size=32)
    assert all(not (dataset[index]["image"][0] == 200).any() for index in range(2))


def test_what_excludes_it_is_named(pictures: CocoPanoptic) -> None:
    with pytest.raises(ArgumentError, match="paste=0"):
        CocoPanoptic(pictures.root, "val", 16, train=True, augmentation=Augmentation(paste=0.5), cache=True)
    with pytest.raises(ArgumentError, match=r"paste=1\.5"):
        Augmentation(paste=1.5)
    assert "data.paste=0.5 changes pictures" in why_not(load_config("coco", ["data.paste=0.5"]))
