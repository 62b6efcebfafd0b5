"""Splits of several folders as one."""

import json

import numpy as np
import pytest

from ldmseg_fast.cli import main
from ldmseg_fast.commands.data_check import check_folder
from ldmseg_fast.commands.data_merge import merge_splits
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.errors import DataError


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
    for source in ("nowhere", f"{scenes}:val2017:x", f"{scenes}:other", "a:b:1:2"):
        with pytest.raises(DataError):
            merge_splits(tmp_path / "b", [source])
    assert not (tmp_path / "b").exists()
