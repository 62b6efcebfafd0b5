"""Classical segmentation as a baseline."""

import numpy as np
import pytest

from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.metrics.classical import GRIDS, Classical, load_items, score, tune

pytest.importorskip("skimage")
SETTINGS = {
    "felzenszwalb": {"scale": 800.0, "sigma": 0.0, "min_share": 0.01},
    "slic": {"n_segments": 4, "compactness": 1.0, "sigma": 0.0},
    "merged slic": {"n_segments": 40, "compactness": 10.0, "threshold": 12.0, "min_share": 0.03},
}


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("size", [(64, 64), (150, 300)])
def test_two_colours_are_found(method, size):
    image = np.full((*size, 3), 20, np.uint8)
    image[:, size[1] // 2 :] = (200, 180, 60)
    ids = Classical(method, SETTINGS[method])(image)
    assert ids.dtype == np.int32 and ids.shape == size and ids.min() == 1
    assert ids[5, 5] != ids[5, -5]
    if method != "slic":
        assert ids.max() == 2


def test_small_regions_join_the_nearest_neighbour_in_colour():
    image = np.full((60, 60, 3), 20, np.uint8)
    image[:, 30:] = (200, 180, 60)
    image[25:31, 40:46] = (190, 190, 90)
    settings = {"n_segments": 100, "compactness": 10.0, "threshold": 5.0}
    fine = Classical("merged slic", settings | {"min_share": 0.0025})(image)
    coarse = Classical("merged slic", settings | {"min_share": 0.1})(image)
    assert fine.max() > 2 and coarse.max() == 2
    assert coarse[28, 43] == coarse[5, 50] != coarse[5, 5]
    assert Classical("merged slic", settings | {"min_share": 0.1})(np.zeros((8, 8, 3), np.uint8)).max() == 1


def test_the_grids_reach_a_tenth_of_the_picture():
    assert max(GRIDS["felzenszwalb"]["min_share"]) == max(GRIDS["merged slic"]["min_share"]) == 0.1


def test_the_best_setting_is_the_one_with_the_highest_score(scenes, monkeypatch):
    monkeypatch.setitem(GRIDS, "slic", {"n_segments": (2, 12), "compactness": (10.0,), "sigma": (1.0,)})
    items = list(load_items(CocoPanoptic(scenes, "train2017", 64, limit=6)))
    chosen, value = tune("slic", items)
    scores = [
        100
        * score(Classical("slic", {"n_segments": n, "compactness": 10.0, "sigma": 1.0}), items).compute()["All"]["pq"]
        for n in (2, 12)
    ]
    assert value == max(scores) and chosen.parameters["n_segments"] == (2, 12)[int(np.argmax(scores))]
    assert str(chosen) == f"slic n_segments {chosen.parameters['n_segments']}, compactness 10, sigma 1"


def test_a_picture_with_several_annotations_is_segmented_once(scenes):
    (image, truth), *_ = load_items(CocoPanoptic(scenes, "train2017", 64, limit=1))
    calls = []

    def segment(picture):
        calls.append(picture)
        return np.ones(picture.shape[:2], np.int32)

    stat = score(segment, [(image, truth)] * 3)
    assert len(calls) == 1 and stat.compute()["class_agnostic"]["fn"] % 3 == 0
