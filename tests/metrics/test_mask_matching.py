"""Masks matched by their spans: the rows and the overlaps of the maps that they paint."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmseg_fast.errors import PanopticFormatError
from ldmseg_fast.metrics.file_pair import FilePair
from ldmseg_fast.metrics.matching import TRUE_POSITIVE
from ldmseg_fast.native import _C
from ldmseg_fast.panoptic.coco_masks import rle_of_mask

pytestmark = pytest.mark.skipif(_C is None, reason="the extension is not built")
HEIGHT, WIDTH = 9, 13
CATEGORIES = [{"id": k, "name": str(k), "isthing": k % 2} for k in (1, 2, 3)]
boxes = st.lists(
    st.tuples(st.integers(0, 99), st.integers(0, 9), st.integers(0, 13), st.integers(1, 12), st.integers(1, 12)),
    max_size=6,
)


def write(folder, gt, pred, size=(HEIGHT, WIDTH)):
    paths = folder / "gt.json", folder / "pred.json"
    images = [{"id": k, "height": size[0], "width": size[1]} for k in (7, 8)]
    for path, annotations in zip(paths, (gt, pred)):
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))
    return paths


@given(boxes, boxes, st.booleans(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_masks_are_matched_as_their_maps(tmp_path_factory, gt, pred, disjoint, class_agnostic):
    """Without maps or with them: the same rows and the same overlaps, for masks that overlap, touch or are empty."""
    folder = tmp_path_factory.mktemp("masks")
    sides = []
    for masks in (gt, pred):
        free, entries = np.ones((HEIGHT, WIDTH), bool), []
        for number, top, left, height, width in masks:
            mask = np.zeros((HEIGHT, WIDTH), bool)
            mask[top : top + height, left : left + width] = True
            mask &= free if disjoint else True
            free &= ~mask
            segmentation = rle_of_mask(mask)
            entries.append({"image_id": 7, "category_id": number % 3 + 1, "segmentation": segmentation})
        sides.append(entries)
    for entry, (number, *_) in zip(sides[0], gt):
        entry["iscrowd"] = int(number % 7 == 0)
    whole = {"image_id": 8, "category_id": 1, "segmentation": rle_of_mask(np.ones((HEIGHT, WIDTH), bool))}
    paths = write(folder, *([*entries, whole] for entries in sides))
    quick, slow = FilePair(*paths, class_agnostic=class_agnostic), FilePair(*paths, class_agnostic=class_agnostic)
    slow._match_streamed = lambda k: None
    for k in range(2):
        assert quick._match_streamed(k) is not None
        assert repr(quick.match(k).tolist()) == repr(slow.match(k).tolist())  # NaN too
    assert {name: count // 2 for name, count in quick.overlaps.items()} == dict(slow.overlaps)


@pytest.mark.parametrize("count", [255, 256, 300])
def test_many_masks(tmp_path, count):
    """A side of more masks than a byte can number is painted."""
    masks = np.eye(count, 20 * 15, dtype=bool).reshape(count, 15, 20)
    entries = [{"image_id": 7, "category_id": 1, "segmentation": rle_of_mask(mask)} for mask in masks]
    pair = FilePair(*write(tmp_path, entries, entries[:200], size=(15, 20)))
    assert (pair._match_streamed(0) is None) == (count > 255)
    matches = pair.match(0)
    assert (matches["outcome"] == TRUE_POSITIVE).sum() == 200 and len(matches) == count


def test_what_is_no_pair_of_masks_is_told(tmp_path):
    entry = {"image_id": 7, "category_id": 1, "segmentation": rle_of_mask(np.ones((HEIGHT, WIDTH), bool))}
    other = entry | {"segmentation": rle_of_mask(np.ones((WIDTH, HEIGHT), bool))}
    broken = entry | {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "1"}}
    foreign = entry | {"category_id": 9}
    for changed, message in (
        (other, "ground truth is 13x9, prediction is 9x13"),
        (broken, "`counts` covers 1 of the 117 pixels"),
        (foreign, "category ids \\[9\\] are not among"),
    ):
        paths = write(tmp_path, [entry], [changed])
        paths[1].write_text(json.dumps([changed]))  # results, which say nothing else of images
        with pytest.raises(PanopticFormatError, match=message):
            FilePair(*paths).match(0)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_ground_truth_is_blamed_first(tmp_path, threads):
    for name in ("gt", "pred"):
        (tmp_path / f"{name}.json").write_text('{"annotations": [{"segmentation": 1}]}')
    with pytest.raises(PanopticFormatError, match=r"gt\.json: `images` is missing"):
        FilePair(tmp_path / "gt.json", tmp_path / "pred.json", threads=threads)
