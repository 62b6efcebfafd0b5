"""Splits of several folders as one."""

import json

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.cli import main
from ldmseg_fast.commands.data_check import check_folder
from ldmseg_fast.commands.data_merge import merge_splits
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.data.pictures import read_image
from ldmseg_fast.errors import DataError, PanopticFormatError
from tests.data.test_orientation import save as save_turned


def test_items_are_those_of_the_sources(scenes, tmp_path, capsys):
    out = tmp_path / "mixed"
    assert main(["data", "merge", str(out), f"{scenes}:val2017", f"{scenes}:train2017:3"]) == 0
    first, second = (CocoPanoptic(scenes, split, 64) for split in ("val2017", "train2017"))
    mixed = CocoPanoptic(out, "train2017", 64)
    assert len(mixed) == len(first) + 3 and str(len(mixed)) in capsys.readouterr().out
    for index in range(len(mixed)):
        source, place = (first, index) if index < len(first) else (second, index - len(first))
        assert np.array_equal(mixed.load_image(index), source.load_image(place))
        assert np.array_equal(mixed.ground_truth(index)[0], source.ground_truth(place)[0])
    assert check_folder(out).ok
    content = json.loads((out / "annotations" / "panoptic_train2017.json").read_text())
    assert {s["category_id"] for entry in content["annotations"] for s in entry["segments_info"]} == {1}


def test_what_is_there_stays(scenes, tmp_path):
    merge_splits(tmp_path / "a", [f"{scenes}:val2017:2"])
    with pytest.raises(DataError, match="is there already"):
        merge_splits(tmp_path / "a", [f"{scenes}:val2017"])
    for source in ("nowhere", f"{scenes}:val2017:x", f"{scenes}:val2017:0", f"{scenes}:other", "a:b:1:2"):
        with pytest.raises(DataError):
            merge_splits(tmp_path / "b", [source])
    with pytest.raises(DataError, match=r"panoptic_val2017.json: 999 annotated maps are asked for and \d+ are there"):
        merge_splits(tmp_path / "b", [f"{scenes}:val2017:999"])
    for split in ("", "..", "../out", "a/b", "a\\b", ".hidden", "a\0b"):
        with pytest.raises(DataError, match=r"split .*: a name for a folder expected"):
            merge_splits(tmp_path / "b", [f"{scenes}:val2017:2"], split)
    assert not (tmp_path / "b").exists()


def test_sizes_come_from_the_pictures_and_sub_folders_stay(folder, quarters, tmp_path):
    for place in range(2):
        folder.add(np.full((20, 30, 3), place, np.uint8), quarters(20, 30), "png")
        for kind in ("val", "panoptic_val"):
            (folder.root / kind / f"city_{place}").mkdir()
            (folder.root / kind / f"{place}.png").rename(folder.root / kind / f"city_{place}" / "same.png")
        for entry in (folder.content["images"][place], folder.content["annotations"][place]):
            entry["file_name"] = f"city_{place}/same.png"
    del folder.content["images"][0]["height"], folder.content["images"][1]["width"]
    folder.save()
    merge_splits(tmp_path / "merged", [f"{folder.root}:val", f"{folder.root}:val:1"])
    assert check_folder(tmp_path / "merged").ok
    merged = CocoPanoptic(tmp_path / "merged", "train2017", 16)
    assert [int(merged.load_image(index).max()) for index in range(3)] == [0, 1, 0]
    content = json.loads((tmp_path / "merged" / "annotations" / "panoptic_train2017.json").read_text())
    assert {(image["height"], image["width"]) for image in content["images"]} == {(20, 30)}


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("suffix", ["tif", "jpg", "png", "ico"])
def test_sizes_are_those_of_the_stored_pixels(folder, quarters, tmp_path, suffix, orientation):
    folder.add(np.zeros((20, 30, 3), np.uint8), quarters(20, 30), "png")
    name = f"0.{suffix}"
    save_turned(folder.root / "val" / name, orientation)
    folder.content["images"] = [{"id": 0, "file_name": name}]
    folder.save()
    merge_splits(tmp_path / "merged", [f"{folder.root}:val"])
    image = json.loads((tmp_path / "merged" / "annotations" / "panoptic_train2017.json").read_text())["images"][0]
    assert (image["height"], image["width"]) == read_image(folder.root / "val" / name).shape[:2]


def test_a_picture_without_size_is_opened_as_every_reader_does(folder, quarters, tmp_path):
    folder.add(np.zeros((20, 30, 3), np.uint8), quarters(20, 30), "png")
    del folder.content["images"][0]["height"]
    folder.save()
    path = folder.root / "val" / "0.png"
    for save, message in (
        (lambda: path.write_bytes(b"no picture"), r"0\.png: not a readable picture .*the JSON does not give its size"),
        (lambda: Image.new("1", (9000, 9000)).save(path), r"0\.png: 9000x9000 is over \d+ pixels"),
    ):
        save()
        with pytest.raises(DataError, match=message):
            merge_splits(tmp_path / "merged", [f"{folder.root}:val"])


@pytest.mark.parametrize("name", ["../elsewhere/0.png", "/absolute"])
def test_links_stay_inside_the_new_folder(folder, quarters, tmp_path, name):
    folder.add(np.zeros((20, 30, 3), np.uint8), quarters(20, 30), "png")
    (folder.root / "elsewhere").mkdir()
    (folder.root / "val" / "0.png").rename(folder.root / "elsewhere" / "0.png")
    where = str(folder.root / "elsewhere" / "0.png") if name == "/absolute" else name
    folder.content["images"][0]["file_name"] = where
    folder.save()
    merge_splits(tmp_path / "merged", [f"{folder.root}:val"])
    assert check_folder(tmp_path / "merged").ok
    assert [path.name for path in (tmp_path / "merged" / "train2017").iterdir()] == ["0_0_0.png"]


def test_a_link_that_an_interrupted_merge_has_left_is_made_again(folder, quarters, tmp_path):
    folder.add(np.full((20, 30, 3), 9, np.uint8), quarters(20, 30), "png")
    link = tmp_path / "merged" / "train2017" / "0_0.png"
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "gone.png")
    merge_splits(tmp_path / "merged", [f"{folder.root}:val"])
    assert int(CocoPanoptic(tmp_path / "merged", "train2017", 16).load_image(0).max()) == 9


def test_sources_that_lack_something_make_no_folder(folder, quarters, tmp_path):
    folder.add(np.zeros((20, 30, 3), np.uint8), quarters(20, 30), "png")
    folder.content["images"][0]["file_name"] = "0.PNG"
    folder.save()
    with pytest.raises(DataError, match=r"1 of 1 pictures .*0\.png is there: upper and lower case differ"):
        merge_splits(tmp_path / "merged", [f"{folder.root}:val"])
    del folder.content["images"][0]["file_name"]
    folder.save()
    with pytest.raises(PanopticFormatError, match="image 0 has no file_name"):
        merge_splits(tmp_path / "merged", [f"{folder.root}:val"])
    assert not (tmp_path / "merged").exists()
