"""Mapillary Vistas 1.2 and 2.0."""

import json

import numpy as np
import pytest

from ldmseg_fast.cli import main
from ldmseg_fast.panoptic.format import write_panoptic_png
from tests.formats.conftest import SIZE, same_partition

LABELS = [
    {"name": "animal--bird", "readable": "Bird", "instances": True, "evaluate": True, "color": [165, 42, 42]},
    {"name": "nature--sky", "readable": "Sky", "instances": False, "evaluate": True, "color": [70, 130, 180]},
    {"name": "void--unlabeled", "readable": "Unlabeled", "instances": False, "evaluate": False, "color": [0, 0, 0]},
]


def instances():
    values = np.full(SIZE, 256, np.uint16)
    values[:4, :4], values[:4, 4:8] = 0, 1
    values[20:] = 512
    return values


@pytest.fixture
def old(tmp_path, picture_at, png_at):
    root = tmp_path / "vistas"
    for split, names in (("training", "ab"), ("validation", "c")):
        for name in names:
            picture_at(root / split / "images" / f"{name}.jpg")
            png_at(root / split / "instances" / f"{name}.png", instances())
    picture_at(root / "testing" / "images" / "d.jpg")
    (root / "config.json").write_text(json.dumps({"labels": LABELS, "version": "1.1"}))
    return root


@pytest.fixture
def new(old):
    """2.0 beside 1.2, as the newer download has them."""
    (old / "config.json").rename(old / "config_v1.2.json")
    for split, name in (("training", "a"), ("validation", "c")):
        (old / split / "v1.2").mkdir()
        (old / split / "instances").rename(old / split / "v1.2" / "instances")
        folder = old / split / "v2.0" / "panoptic"
        folder.mkdir(parents=True)
        ids = instances().astype(np.int32) + 70_000
        ids[20:] = 0
        write_panoptic_png(folder / f"{name}.png", ids)
        infos = [
            {"id": key + 70_000, "category_id": key // 256 + 1, "iscrowd": 0, "area": 1, "bbox": [0, 0, 1, 1]}
            for key in (0, 1, 256, 300)
        ]
        content = {
            "images": [{"id": name, "file_name": f"{name}.jpg", "height": SIZE[0], "width": SIZE[1]}],
            "annotations": [{"image_id": name, "file_name": f"{name}.png", "segments_info": infos}],
            "categories": [
                {"id": 1, "name": "Bird", "supercategory": "animal", "isthing": 1, "color": [165, 42, 42]},
                {"id": 2, "name": "Sky", "supercategory": "nature", "isthing": 0, "color": [70, 130, 180]},
            ],
        }
        (folder / "panoptic_2020.json").write_text(json.dumps(content))
    return old


def check_1_2(root, out, imported):
    for split, names in (("training", "ab"), ("validation", "c")):
        maps = imported(out, split)
        assert [(each["id"], each["name"], each["isthing"]) for each in maps["categories"]] == [
            (0, "Bird", 1), (1, "Sky", 0)
        ]  # fmt: skip
        for name in names:
            values = instances().astype(int)
            found = maps[f"{name}.png"]
            assert np.array_equal(found["categories"], np.where(values == 512, -1, values // 256))
            assert same_partition(found["ids"], np.where(values == 512, 0, values + 1))


def test_1_2(old, tmp_path, imported, capsys):
    assert main(["data", "import", "mapillary", str(old), str(tmp_path / "out")]) == 0
    assert "1 pictures without annotation" in capsys.readouterr().out
    check_1_2(old, tmp_path / "out", imported)


def test_1_2_beside_2_0(new, tmp_path, imported):
    assert main(["data", "import", "mapillary", str(new), str(tmp_path / "out"), "--version", "1.2"]) == 0
    check_1_2(new, tmp_path / "out", imported)


def test_2_0(new, tmp_path, imported, capsys):
    assert main(["data", "import", "mapillary", str(new), str(tmp_path / "out")]) == 0
    assert "segments of the JSON that no pixel has, first in a.jpg" in capsys.readouterr().out
    for split, name in (("training", "a"), ("validation", "c")):
        maps = imported(tmp_path / "out", split)
        expected = instances().astype(int) + 70_000
        expected[20:] = 0
        assert np.array_equal(maps[f"{name}.png"]["ids"], expected) and len(maps) == 2
        assert maps[f"{name}.png"]["image"]["id"] == name and maps["categories"][0]["supercategory"] == "animal"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
        (lambda f: (f / "config.json").write_text("{}"), "labels is missing"),
        (lambda f: (f / "config.json").write_text('{"labels": [1]}'), "label 0 has no name"),
        (
            lambda f: (f / "config.json").write_text('{"labels": [{"name": "a", "evaluate": "false"}]}'),
            "must be true or false",
        ),
        (lambda f: (f / "validation" / "images" / "c.jpg").unlink(), "1 of 1 annotations have no picture"),
        (lambda f: [(f / s / "images").rename(f / s / "i") for s in ("training", "validation", "testing")], "is this"),
        (
            lambda f: [(f / s / "instances").rename(f / s / "i") for s in ("training", "validation")],
            "no maps of version",
        ),
    ],
    ids=["config", "labels", "label", "flag", "picture", "pictures", "maps"],
)
def test_faults_of_the_folder(old, tmp_path, capsys, break_it, message):
    break_it(old)
    assert main(["data", "import", "mapillary", str(old), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_faults_of_maps(old, tmp_path, png_at, capsys):
    png_at(old / "training" / "instances" / "a.png", np.full(SIZE, 3 * 256, np.uint16))
    png_at(old / "training" / "instances" / "b.png", np.zeros((3, 3), np.uint16))
    assert main(["data", "import", "mapillary", str(old), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "2 of 3 pictures" in error and "label 3 is no category; known are 0..2" in error and "3x3" in error


def rename(path, name):
    path.write_text(path.read_text().replace('"c.jpg"', name))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: next(f.rglob("validation/v2.0/panoptic/*.json")).unlink(), "no panoptic_YEAR.json"),
        (lambda f: (f / "validation" / "images" / "c.jpg").unlink(), "no picture c.jpg"),
        (lambda f: rename(next(f.rglob("validation/v2.0/panoptic/*.json")), '"."'), "no picture ."),
        (lambda f: next(f.rglob("validation/v2.0/panoptic/*.json")).write_text("{}"), "`images` is missing"),
        (lambda f: next(f.rglob("validation/v2.0/panoptic/*.png")).unlink(), "c.png"),
        (
            lambda f: write_panoptic_png(next(f.rglob("validation/v2.0/panoptic/*.png")), np.full(SIZE, 9, np.int32)),
            "id 9 is not in segments_info",
        ),
    ],
    ids=["json", "picture", "name", "content", "map", "id"],
)
def test_faults_of_2_0(new, tmp_path, capsys, break_it, message):
    break_it(new)
    arguments = ["data", "import", "mapillary", str(new), str(tmp_path / "out"), "--split", "validation"]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
