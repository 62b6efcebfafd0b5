"""Files that a JSON names in other case, separators, Unicode form, folder or format than they have."""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ldmseg_fast.commands.data_check import check_folder
from ldmseg_fast.commands.data_merge import merge_splits
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.errors import DataError, PanopticFormatError
from ldmseg_fast.metrics.pq_files import evaluate_files
from ldmseg_fast.panoptic.near_files import NearFiles
from tests.data.conftest import Folder, folder, quarters

__all__ = ["folder", "quarters"]

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("named", "there", "said"),
    [
        ("0001.jpg", "0001.JPG", "0001.JPG is there: upper and lower case differ; write its `file_name` as '0001.JPG'"),
        ("city\\1.png", "city/1.png", "its separators are / and not the \\ of Windows; write its .* as 'city/1.png'"),
        ("City\\1.png", "city/1.png", "its separators are .* and upper and lower case differ"),
        (f"{COMPOSED}.png", f"{DECOMPOSED}.png", "its Unicode form is another"),
        ("1.png ", "1.png", "spaces around the name differ"),
        ("1.png", "city/1.png", "city/1.png is there, in another folder; write its `file_name` as 'city/1.png'"),
        ("val/1.png", "1.png", "1.png is there, in another folder"),
        ("C:\\data\\val\\1.png", "1.png", "1.png is there, in another folder; write its `file_name` as '1.png'"),
        ("/data/val/1.png", "1.png", "1.png is there, in another folder"),
        ("1.jpg", "1.png", "1.png is there, in another format"),
        ("1.png", "../train/1.png", "train/1.png is there, in another folder; move it to"),
    ],
)
def test_the_nearest_file_is_named(tmp_path: Path, named: str, there: str, said: str) -> None:
    near = tmp_path / "val" / there
    (tmp_path / "val").mkdir()
    near.parent.mkdir(exist_ok=True, parents=True)
    near.write_bytes(b"")
    files = NearFiles(tmp_path / "val", tmp_path)
    assert all(part in files.nearest(named) for part in said.split(".*")), files.nearest(named)
    assert "fetch" not in files.explain(["lost.png", named])


def test_files_of_the_other_kind_are_no_near_files(tmp_path: Path) -> None:
    for name in ("val", "panoptic_val"):
        (tmp_path / name).mkdir()
    (tmp_path / "val" / "1.png").write_bytes(b"")
    maps = NearFiles(tmp_path / "panoptic_val", tmp_path, [tmp_path / "val"])
    assert maps.nearest("1.png") == "" and maps.explain(["1.png", "2.png"]) == "first 1.png: fetch them again"


def test_every_command_names_the_near_file(folder: Folder, quarters: Callable[[int, int], np.ndarray], tmp_path: Path):
    for _ in range(2):
        folder.add(np.zeros((8, 8, 3), np.uint8), quarters(8, 8), "png")
    (folder.root / "panoptic_val" / "city").mkdir()
    (folder.root / "panoptic_val" / "1.png").rename(folder.root / "panoptic_val" / "city" / "1.png")
    folder.content["annotations"][1]["file_name"] = "city\\1.png"
    folder.save()
    prediction = tmp_path / "prediction.json"
    prediction.write_text(json.dumps(folder.content))
    said = r"city/1\.png is there: its separators are /"
    with pytest.raises(DataError, match=rf"1 of 2 maps .*first city\\1\.png: .*{said}.*ldmseg data check"):
        CocoPanoptic(folder.root, "val", 8)
    with pytest.raises(DataError, match=said):
        merge_splits(tmp_path / "merged", [f"{folder.root}:val"])
    assert not (tmp_path / "merged").exists()
    with pytest.raises(PanopticFormatError, match=f"there is no such file; .*{said}"):
        evaluate_files(folder.json, prediction, pred_folder=folder.root / "panoptic_val")
    report = check_folder(folder.root)
    assert report.counts() == {"missing map": 1} and "its separators are /" in report.table()
