"""Maps of real photographs go through other formats and come back, pixel for pixel."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from ldmseg_fast.cli import main
from ldmseg_fast.data.folders import find_split
from ldmseg_fast.panoptic.annotations import load_panoptic_json
from ldmseg_fast.panoptic.format import read_panoptic_png
from tests.formats.conftest import same_partition


def real_maps(root: Path, split: str, limit: int):
    """Yields picture, dense ids [H, W] with 0 void, and categories [H, W] of annotated maps."""
    folders = find_split(root, split)
    content = load_panoptic_json(folders.annotations)
    images = {image["id"]: image["file_name"] for image in content["images"]}
    for annotation in content["annotations"][:limit]:
        ids = read_panoptic_png(folders.maps / annotation["file_name"])
        present, dense = np.unique(ids, return_inverse=True)
        categories = np.zeros(ids.shape, np.int32)
        for segment in annotation["segments_info"]:
            categories[ids == segment["id"]] = segment["category_id"]
        yield folders.images / images[annotation["image_id"]], dense.reshape(ids.shape) + (present[0] != 0), categories


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def as_voc(root, png_at, picture, ids, categories):
    classes = 1 + categories % 20
    link(root / "JPEGImages" / picture.name, picture)
    for kind, values in (("Object", ids), ("Class", classes)):
        path = root / f"Segmentation{kind}" / f"{picture.stem}.png"
        png_at(path, np.where(ids == 0, 255, values).astype(np.uint8), palette=True)
    return f"train/{picture.stem}.png", classes


def as_ade20k(root, png_at, picture, ids, categories):
    classes = np.where(ids == 0, 0, categories + 700)
    path = root / "images" / "ADE" / "training" / picture.name
    link(path, picture)
    colours = np.stack([classes // 256 * 10, classes % 256, ids], -1).astype(np.uint8)
    png_at(path.with_name(f"{picture.stem}_seg.png"), colours)
    objects = [{"name": f"name {number}", "name_ndx": number} for number in np.unique(classes).tolist() if number]
    path.with_suffix(".json").write_text(json.dumps({"annotation": {"object": objects}}))
    return f"training/{picture.stem}.png", classes


def as_mapillary(root, png_at, picture, ids, categories):
    classes = categories % 200
    (root / "config.json").write_text(
        json.dumps({"labels": [{"name": f"name {number}", "instances": True} for number in range(256)]})
        .replace('"name 255", "instances": true', '"void", "evaluate": false')
    )  # fmt: skip
    link(root / "training" / "images" / picture.name, picture)
    values = np.where(ids == 0, 255 * 256, classes * 256 + ids)
    png_at(root / "training" / "instances" / f"{picture.stem}.png", values.astype(np.uint16))
    return f"training/{picture.stem}.png", classes


def as_kitti_360(root, png_at, picture, ids, categories):
    classes = np.array([24, 26, 33, 41])[categories % 4]
    drive = Path("2013_05_28_drive_0000_sync") / "image_00"
    link(root / "data_2d_raw" / drive / "data_rect" / f"{picture.stem}.png", picture)  # read by its content
    path = root / "data_2d_semantics" / "train" / drive / "instance" / f"{picture.stem}.png"
    png_at(path, np.where(ids == 0, 0, classes * 1000 + ids).astype(np.uint16))
    return f"train/{drive}/data_rect/{picture.stem}.png", classes


def as_bsds500(root, png_at, picture, ids, categories):
    link(root / "images" / "train" / picture.name, picture)
    cells = np.empty((1, 1), object)
    cells[0, 0] = {"Segmentation": ids.astype(np.uint16)}
    path = root / "groundTruth" / "train" / f"{picture.stem}.mat"
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"groundTruth": cells})
    return f"train/{picture.stem}.png", np.ones_like(ids)


@pytest.mark.parametrize(
    ("kind", "write"),
    [
        ("voc", as_voc),
        ("ade20k", as_ade20k),
        ("mapillary", as_mapillary),
        ("kitti-360", as_kitti_360),
        ("bsds500", as_bsds500),
    ],
    ids=["voc", "ade20k", "mapillary", "kitti-360", "bsds500"],
)
@pytest.mark.parametrize(
    ("data_set", "split"), [("coco_mini", "val2017"), ("camvid", "val_classes")], ids=["coco_mini", "camvid"]
)
def test_there_and_back(shared, tmp_path, png_at, imported, kind: str, write: Callable, data_set: str, split: str):
    root, expected = tmp_path / "source", {}
    root.mkdir()
    for picture, ids, categories in real_maps(shared / "data" / data_set, split, 18):
        name, classes = write(root, png_at, picture, ids, categories)
        expected[name] = ids, np.where(ids == 0, -1, classes)
    assert main(["data", "import", kind, str(root), str(tmp_path / "out")]) == 0
    found = {
        f"{each.name}/{name}": content
        for each in (tmp_path / "out").iterdir()
        if not each.name.startswith(("panoptic_", "annotations"))
        for name, content in imported(tmp_path / "out", each.name, checked=False).items()
        if name != "categories"
    }
    assert found.keys() == expected.keys() and len(found) == 18
    for name, (ids, categories) in expected.items():
        assert same_partition(found[name]["ids"], ids) and np.array_equal(found[name]["categories"], categories)
