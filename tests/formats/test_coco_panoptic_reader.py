"""COCO-panoptic folders, result files and predictions as data sets."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.data.orientation import TURNS
from ldmseg_fast.data.picture_folders import FoundPicture
from ldmseg_fast.errors import DataError
from ldmseg_fast.formats.coco_panoptic_reader import read, read_predictions, read_results
from ldmseg_fast.formats.options import ReadOptions
from ldmseg_fast.panoptic.format import read_panoptic_png, write_panoptic_png
from tests.data.conftest import folder, quarters

__all__ = ["folder", "quarters"]


def test_splits(scenes):
    data_set = read(scenes, ReadOptions())
    assert {split: len(entries) for split, entries in data_set.splits.items()} == {"train2017": 24, "val2017": 8}
    listed = json.loads((scenes / "annotations" / "panoptic_val2017.json").read_text())["categories"]
    assert data_set.categories == listed
    data_set = read(scenes, ReadOptions(splits=("val2017",)))
    assert list(data_set.splits) == ["val2017"]
    for entry in data_set.splits["val2017"]:
        each = entry.read()
        assert entry.picture.is_file() and entry.sources[0].is_file()
        np.testing.assert_array_equal(each.ids, read_panoptic_png(entry.sources[0]))
        assert [segment["id"] for segment in each.segments] == [int(i) for i in np.unique(each.ids) if i]
        assert not each.left_out


def test_flags_scores_and_segments_without_pixels(folder, quarters):
    folder.add(np.zeros((10, 12, 3), np.uint8), quarters(10, 12), "png", crowd=(5,))
    segments = folder.content["annotations"][0]["segments_info"]
    segments.reverse()
    segments[0] |= {"score": 0.5, "iscrowd": False}
    segments.append({"id": 3, "category_id": 1})
    folder.save()
    (entry,) = read(folder.root, ReadOptions()).splits["val"]
    each = entry.read()
    assert [(segment["id"], segment["iscrowd"]) for segment in each.segments] == [
        (5, 1), (900, 0), (70_001, 0), (16_777_215, 0)
    ]  # fmt: skip
    assert each.segments[-1]["score"] == 0.5 and each.left_out == {"segments without a pixel": 1}


def test_what_does_not_fit(folder, quarters):
    folder.add(np.zeros((10, 12, 3), np.uint8), quarters(10, 12), "png")
    (entry,) = read(folder.root, ReadOptions()).splits["val"]
    Image.new("RGB", (12, 11)).save(folder.root / "val" / "0.png")
    with pytest.raises(DataError, match=r"panoptic_val/0\.png: 12x10 pixels, the picture .*val/0\.png has 12x11"):
        entry.read()
    Image.new("RGB", (12, 10)).save(folder.root / "val" / "0.png")
    folder.content["images"][0]["width"] = 13
    folder.save()
    (entry,) = read(folder.root, ReadOptions()).splits["val"]
    with pytest.raises(DataError, match="12x10 pixels, the JSON has 13x10"):
        entry.read()
    del folder.content["images"][0]["width"], folder.content["annotations"][0]["segments_info"][0]
    folder.save()
    (entry,) = read(folder.root, ReadOptions()).splits["val"]
    with pytest.raises(DataError, match=r"ids in the map that segments_info does not list: \[5\]"):
        entry.read()
    (folder.root / "panoptic_val" / "0.png").unlink()
    with pytest.raises(DataError, match=r"0\.png: No such file"):
        entry.read()
    with pytest.raises(DataError, match="1 of 1 maps"):
        read(folder.root, ReadOptions())
    with pytest.raises(DataError, match=r"splits found in .*: val"):
        read(folder.root, ReadOptions(splits=("test",)))
    (folder.root / "annotations" / "panoptic_val.json").unlink()
    with pytest.raises(DataError, match=r"no annotations/panoptic_SPLIT\.json"):
        read(folder.root, ReadOptions())


def test_splits_agree_on_their_categories(folder, quarters):
    folder.add(np.zeros((10, 12, 3), np.uint8), quarters(10, 12), "png")
    other = {**folder.content, "categories": [{"id": 1, "name": "object", "isthing": 0}]}
    (folder.root / "annotations" / "panoptic_val_stuff.json").write_text(json.dumps(other))
    with pytest.raises(DataError, match=r"category 1 is 'object' \(stuff\), in another split 'object' \(thing\)"):
        read(folder.root, ReadOptions())
    assert read(folder.root, ReadOptions(splits=("val_stuff",))).categories == other["categories"]


def test_keys_that_nobody_checks(folder, quarters):
    folder.add(np.zeros((10, 12, 3), np.uint8), quarters(10, 12), "png")
    folder.content["categories"] = [
        {"id": 1, "name": "object", "color": "red", "supercategory": 3},
        {"id": 2, "color": [1, 2, 300]},
        {"id": 3, "name": "c", "color": [1, 2, 3], "supercategory": "d"},
    ]
    for segment, score in zip(folder.content["annotations"][0]["segments_info"], ("high", None, True, 0.5)):
        segment["score"] = score
    folder.save()
    data_set = read(folder.root, ReadOptions())
    assert data_set.categories == [
        {"id": 1, "name": "object", "isthing": 1},
        {"id": 2, "name": "category 2", "isthing": 1},
        {"id": 3, "name": "c", "isthing": 1, "color": [1, 2, 3], "supercategory": "d"},
    ]
    assert [segment.get("score") for segment in data_set.splits["val"][0].read().segments] == [None, None, None, 0.5]


def test_result_files(folder, quarters, tmp_path):
    folder.add(np.zeros((10, 12, 3), np.uint8), quarters(10, 12), "png")
    results = tmp_path / "results"
    (results / "panoptic").mkdir(parents=True)
    write_panoptic_png(results / "panoptic" / "x.png", np.full((10, 12), 4, np.int32))
    content = {
        "images": folder.content["images"],
        "annotations": [{"image_id": 0, "file_name": "x.png", "segments_info": [{"id": 4, "category_id": 3}]}],
    }
    path = results / "panoptic.json"
    path.write_text(json.dumps(content))
    data_set = read_results(path, folder.root / "val")
    assert data_set.categories == [{"id": 3, "name": "category 3", "isthing": 1}]
    (entry,) = data_set.splits["predicted"]
    assert entry.name == "0.png" and entry.read().segments == [{"id": 4, "category_id": 3, "iscrowd": 0}]
    with pytest.raises(DataError, match="1 of 1 pictures of"):
        read_results(path, tmp_path)
    with pytest.raises(DataError, match="nowhere: no such folder"):
        read_results(path, tmp_path / "nowhere")
    path.write_text(json.dumps({"annotations": content["annotations"]}))
    with pytest.raises(DataError, match="`images` gives no file_name for 0"):
        read_results(path, folder.root / "val")


@pytest.mark.parametrize("exif", [True, False])
@pytest.mark.parametrize("orientation", [1, *TURNS])
def test_predictions_of_turned_pictures(tmp_path, orientation, exif):
    """A map of the picture as viewers show it becomes one of the stored pixels."""
    ids = np.arange(1, 3 * 5 + 1, dtype=np.int32).reshape(3, 5)
    tags = Image.Exif()
    tags[0x0112] = orientation
    picture = tmp_path / "in" / "a.png"
    picture.parent.mkdir()
    Image.new("RGB", (5, 3)).save(picture, exif=tags)
    shown = Image.fromarray(ids)
    if exif and orientation > 1:
        shown = shown.transpose(TURNS[orientation])
    out = tmp_path / "out" / "deep"
    out.mkdir(parents=True)
    write_panoptic_png(out / "a.png", np.asarray(shown))
    segments = [{"id": int(number), "category_id": 1, "score": 0.5} for number in ids.ravel()]
    (out / "a.json").write_text(json.dumps({"file_name": "a.png", "segments_info": segments}))
    found = FoundPicture(picture, folder=picture.parent.__class__("deep"))
    data_set = read_predictions(tmp_path / "out", [found], exif=exif)
    (entry,) = data_set.splits["predicted"]
    assert entry.name == "deep/a.png" and entry.picture == picture
    assert data_set.categories == [{"id": 1, "name": "object", "isthing": 1}]
    np.testing.assert_array_equal(entry.read().ids, ids)


def test_damaged_predictions(tmp_path):
    picture = tmp_path / "a.png"
    Image.new("RGB", (5, 3)).save(picture)
    for text in ("{", "[]", '{"file_name": "a.png"}', '{"file_name": 1, "segments_info": []}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(DataError, match=r"a\.json: no result of `ldmseg predict`, or damaged"):
            read_predictions(tmp_path, [FoundPicture(picture)])
    (tmp_path / "a.json").unlink()
    with pytest.raises(DataError, match=r"a\.json: No such file"):
        read_predictions(tmp_path, [FoundPicture(picture)])
