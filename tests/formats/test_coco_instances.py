"""COCO's instances and stuff, and Roboflow's export of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from ldmseg_fast.commands.data_import import import_data
from ldmseg_fast.errors import DataError, UserError
from ldmseg_fast.formats import coco_instances, roboflow
from ldmseg_fast.formats.coco_files import NO_MASK, OTHER, SHORT
from ldmseg_fast.formats.options import ReadOptions, WriteOptions
from ldmseg_fast.formats.painting import EMPTY, HIDDEN, OVERLAP
from tests.formats.drawing import annotated, data_set, noise
from tests.formats.test_trees import zipped

SQUARE = [2, 3, 8, 3, 8, 9, 2, 9]
HEIGHT, WIDTH = 24, 32  # of `picture_at`


def content(*annotations: dict, categories: list | None = None, images: list | None = None) -> dict:
    listed = [{"id": number, "image_id": 1, "category_id": 1, **each} for number, each in enumerate(annotations, 1)]
    return {
        "images": images or [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
        "annotations": listed,
        "categories": categories or [{"id": 1, "name": "dog", "supercategory": "animal"}, {"id": 2, "name": "cat"}],
    }


@pytest.fixture
def source(tmp_path, picture_at):
    """Makes a folder with a picture and one JSON."""

    def make(value, name="instances_val2017", picture="val2017/a.png"):
        root = tmp_path / "coco"
        picture_at(root / picture)
        (root / "annotations").mkdir(exist_ok=True)
        text = value if isinstance(value, str) else json.dumps(value)
        (root / "annotations" / f"{name}.json").write_text(text)
        return root

    return make


def only_map(source: Path, **options):
    read = coco_instances.read(source, ReadOptions(**options))
    ((entry,),) = read.splits.values()
    return entry.read(), read


def test_all_forms_of_a_mask(source):
    """A polygon of several parts, run lengths of both forms, a crowd, a box without a mask, and stuff beside them."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[12:20, 20:30] = True
    compressed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    counts = [0, 5, HEIGHT * WIDTH - 5]
    root = source(
        content(
            {"segmentation": [SQUARE, [10, 3, 12, 3, 12, 5, 10, 5], [1, 1, 2, 2]], "iscrowd": 0},
            {"segmentation": {"size": [HEIGHT, WIDTH], "counts": compressed["counts"].decode()}, "category_id": 2},
            {"segmentation": {"size": [HEIGHT, WIDTH], "counts": counts}, "iscrowd": 1},
            {"bbox": [1, 1, 3, 3]},
            {"segmentation": []},
            {"segmentation": SQUARE, "category_id": 2},
        )
    )
    whole = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}
    stuff = content(
        {"segmentation": whole, "category_id": 93},
        {"segmentation": whole, "category_id": 183},
        categories=[
            {"id": 93, "name": "sky", "supercategory": "sky-stuff"},
            {"id": 183, "name": "other", "supercategory": "other"},
        ],
    )
    (root / "annotations" / "stuff_val2017.json").write_text(json.dumps(stuff))
    (root / "annotations" / "captions_val2017.json").write_text(json.dumps({"images": [], "annotations": []}))
    found, read = only_map(root)
    assert [(each["id"], each["isthing"]) for each in read.categories] == [(1, 1), (2, 1), (93, 0), (183, 0)]
    assert read.categories[0]["supercategory"] == "animal"
    assert read.left_out == {OTHER: 1, "JSONs of other kinds": 1}
    square = np.zeros((HEIGHT, WIDTH), bool)
    square[3:9, 2:8] = True
    small = np.zeros((HEIGHT, WIDTH), bool)
    small[3:5, 10:12] = True
    crowd = np.zeros((HEIGHT, WIDTH), bool)
    crowd[:5, 0] = True
    expected = np.full((HEIGHT, WIDTH), 5)
    expected[crowd], expected[mask], expected[square | small], expected[square] = 3, 2, 1, 4
    np.testing.assert_array_equal(found.ids, expected)
    assert [each["iscrowd"] for each in found.segments] == [0, 0, 1, 0, 0]
    assert [each["category_id"] for each in found.segments] == [1, 2, 1, 2, 93]
    covered = mask.sum() + crowd.sum() + (square | small).sum() + square.sum()
    assert found.left_out == {OVERLAP: covered, SHORT: 1, NO_MASK: 2}


@pytest.mark.parametrize("shape", ["rle", "polygon"])
def test_pycocotools_reads_what_is_written(tmp_path, shape, capsys):
    maps = {"a.png": annotated(noise(2, 40, 30), 2, crowd=True), "b.png": annotated(noise(3, 21, 33), 3)}
    out = tmp_path / "out"
    out.mkdir()
    coco_instances.write(data_set(tmp_path / "pictures", maps), out, WriteOptions(shape=shape))
    found: dict[tuple, set] = {}
    for kind in ("instances", "stuff"):
        read = COCO(out / "annotations" / f"{kind}_val.json")
        assert {each["isthing"] for each in read.loadCats(read.getCatIds())} == {int(kind == "instances")}
        for annotation in read.loadAnns(read.getAnnIds()):
            mask = read.annToMask(annotation).astype(bool)
            assert annotation["area"] == mask.sum()
            assert (
                annotation["bbox"]
                == coco_mask.toBbox(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))).tolist()
            )
            name = read.loadImgs(annotation["image_id"])[0]["file_name"]
            is_list = isinstance(annotation["segmentation"], list)
            assert is_list == (shape == "polygon" and not annotation["iscrowd"])
            pixels = mask.tobytes(), annotation["category_id"], annotation["iscrowd"]
            found.setdefault(name, set()).add(pixels)
    for name, each in maps.items():
        assert found[name] == {
            ((each.ids == segment["id"]).tobytes(), segment["category_id"], segment["iscrowd"])
            for segment in each.segments
        }


def test_an_export_of_cvat(tmp_path, picture_at, imported):
    """CVAT's COCO: a zip with annotations/instances_default.json and images/, names with folders."""
    path = picture_at(tmp_path / "a.png")
    images = [{"id": 1, "file_name": "deep/a.png", "height": HEIGHT, "width": WIDTH}]
    attributes = {"occluded": False}
    whole = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH - 5, 5]}  # CVAT calls every such mask a crowd
    value = content(
        {"segmentation": [SQUARE], "iscrowd": 0, "attributes": attributes},
        {"segmentation": whole, "iscrowd": 1, "attributes": attributes},
        images=images,
    )
    source = zipped(
        tmp_path / "task.zip",
        {
            "annotations/instances_default.json": json.dumps(value).encode("utf-8-sig"),
            "images/deep/a.png": path.read_bytes(),
        },
    )
    summary = import_data("coco-instances", source, tmp_path / "out", ReadOptions(), WriteOptions())
    assert (summary.pictures, summary.segments) == (1, 2)
    assert not imported(tmp_path / "out", "default")["deep/a.png"]["crowd"].any()
    assert (tmp_path / "out" / "default" / "deep" / "a.png").read_bytes() == path.read_bytes()


def test_one_json_and_pictures_without_annotation(source, imported, tmp_path, picture_at):
    images = [{"id": "one", "file_name": "a.png"}, {"id": "two", "file_name": "sub\\b.png", "height": 24, "width": 32}]
    root = source(content({"segmentation": [SQUARE], "image_id": "one"}, images=images), name="mine", picture="a.png")
    picture_at(root / "sub" / "b.png")
    summary = import_data(
        "coco-instances", root / "annotations" / "mine.json", tmp_path / "out", ReadOptions(), WriteOptions()
    )
    assert summary.left_out["pictures without a segment, which stay with an empty map"] == 1
    maps = imported(tmp_path / "out", "mine")
    assert (maps["a.png"]["categories"] == 1).sum() == 36 and not maps["sub/b.png"]["ids"].any()


def test_what_has_no_pixel_is_counted(source):
    far = [x + 100 for x in SQUARE]
    flat = [2, 3, 2, 3, 2, 3]
    found, _ = only_map(source(content(*({"segmentation": [each]} for each in (far, flat, SQUARE, SQUARE)))))
    assert len(found.segments) == 1
    assert found.left_out == {EMPTY: 2, HIDDEN: 1, OVERLAP: 36}


def test_things_and_connected_are_options(source):
    root = source(content({"segmentation": [SQUARE]}, {"segmentation": [[10, 3, 12, 3, 12, 5, 10, 5]]}))
    found, read = only_map(root, things=("cat",))
    assert [each["isthing"] for each in read.categories] == [0, 1] and len(found.segments) == 1


def test_a_json_of_another_kind_is_none(tmp_path):
    (tmp_path / "other.json").write_text(json.dumps({"images": [], "annotations": [5], "categories": []}))
    with pytest.raises(DataError, match="no JSON of COCO's instances"):
        coco_instances.read(tmp_path, ReadOptions())


def test_polygons_of_pairs(source):
    found, _ = only_map(source(content({"segmentation": [np.reshape(SQUARE, (4, 2)).tolist(), [[1, 1], [2, 2]]]})))
    assert (found.ids > 0).sum() == 36 and found.left_out == {SHORT: 1}


BAD = {
    "no json": ("{", "damaged, no JSON"),
    "latin": (json.dumps(content(categories=[{"id": 1, "name": "\u00e9"}]), ensure_ascii=False), "no UTF-8"),
    "results": ([{"image_id": 1}], "a list, as results are"),
    "no lists": ({"images": []}, "no list `annotations`"),
    "no object": (content() | {"images": [5]}, r"images\[0\] must be an object"),
    "no id": (content(images=[{"file_name": "a.png"}]), r"images\[0\]: id None"),
    "id twice": (content(images=[{"id": 1, "file_name": "a.png"}] * 2), r"images\[1\]: id 1"),
    "no file name": (content(images=[{"id": 1}]), "file_name None"),
    "no category": (content({"category_id": 9}, {"category_id": 9}), "2 annotations.*annotation 1 has category_id 9"),
    "no image": (content({"image_id": 9}), "1 annotations.*has image_id 9"),
    "category twice": (content(categories=[{"id": 1, "name": "dog"}] * 2), r"categories\[1\]: id 1"),
    "iscrowd": (content({"segmentation": [SQUARE], "iscrowd": "1"}), "annotation 1: iscrowd '1': 0 or 1 expected"),
    "segmentation": (content({"segmentation": "x"}), "segmentation must be polygons or run lengths, got 'x'"),
    "nameless": (content(images=[{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "."}]), "it has no name"),
    "isthing": (content(categories=[{"id": 1, "name": "dog", "isthing": "0"}]), "isthing '0': 0 or 1 expected"),
    "category without name": (content(categories=[{"id": 1}]), r"categories\[0\]: name None"),
    "size of a mask": (
        content({"segmentation": {"size": [2, 3], "counts": [0, 6]}}),
        "annotation 1: its mask is 3x2, the picture 32x24",
    ),
    "size of the picture": (
        content(images=[{"id": 1, "file_name": "a.png", "height": 24, "width": 31}]) | {"annotations": []},
        "32x24",
    ),
    "size of nothing": (content(images=[{"id": 1, "file_name": "a.png", "height": 0, "width": -1}]), "height 0"),
    "huge": (content(images=[{"id": 1, "file_name": "a.png", "height": 60000, "width": 60000}]), "67108864 pixels"),
    "nan": (json.dumps(content({"segmentation": [SQUARE]})).replace("[2, 3,", "[2, NaN,"), "annotation 1.*finite"),
    "odd": (content({"segmentation": [[*SQUARE, 1]]}), "annotation 1.*polygon 0 has 9 values"),
    "text": (content({"segmentation": [["a"] * 6]}), "annotation 1.*numbers"),
    "counts": (content({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [5]}}), "annotation 1.*768 pixels"),
    "missing pictures": (content(images=[{"id": 1, "file_name": "gone.png"}]), "none of its 1 pictures is there"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(source, tmp_path, case):
    value, message = BAD[case]
    root = source("" if case == "latin" else value)
    if case == "latin":
        (root / "annotations" / "instances_val2017.json").write_bytes(value.encode("latin-1"))
    with pytest.raises(UserError, match=message) as error:
        import_data("coco-instances", root, tmp_path / "out", ReadOptions(), WriteOptions())
    assert "instances_val2017.json" in str(error.value) or case in ("size of the picture", "nameless")
    assert not (tmp_path / "out" / "val2017").exists() and not list(tmp_path.glob("out/annotations/*"))


def test_files_that_contradict_each_other(source, tmp_path):
    root = source(content())
    other = content(categories=[{"id": 1, "name": "cow"}])
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(other))
    with pytest.raises(DataError, match="category 1 is 'dog', in another file 'cow'"):
        coco_instances.read(root, ReadOptions())
    with pytest.raises(DataError, match="no JSON of COCO"):
        coco_instances.read(root / "val2017", ReadOptions())
    with pytest.raises(DataError, match="no such file or folder"):
        coco_instances.read(root / "gone", ReadOptions())


def test_a_picture_that_is_missing_among_others(source, tmp_path):
    images = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "gone.png"}]
    root = source(content({"segmentation": [SQUARE]}, images=images))
    with pytest.raises(DataError, match=r"(?s)1 of 2 pictures.*gone\.png: No such file"):
        import_data("coco-instances", root, tmp_path / "out", ReadOptions(), WriteOptions())
    summary = import_data("coco-instances", root, tmp_path / "out", ReadOptions(), WriteOptions(skip_bad=True))
    assert summary.pictures == 1 and len(summary.faults) == 1


def roboflow_content(*annotations: dict) -> dict:
    categories = [
        {"id": 0, "name": "animals", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "animals"},
        {"id": 2, "name": "dog", "supercategory": "animals"},
    ]
    return content(*annotations, categories=categories) | {"info": {"description": "Exported from roboflow.com"}}


def test_roboflow(tmp_path, picture_at, imported):
    """Folders with their JSON; the placeholder goes, unless something is called by it."""
    for split in ("train", "valid", "test"):
        picture_at(tmp_path / "robo" / split / "a.png")
        value = roboflow_content({"segmentation": [SQUARE], "category_id": 2})
        (tmp_path / "robo" / split / "_annotations.coco.json").write_text(json.dumps(value))
    summary = import_data("roboflow", tmp_path / "robo", tmp_path / "out", ReadOptions(), WriteOptions())
    assert summary.pictures == summary.segments == 3
    maps = imported(tmp_path / "out", "valid")
    assert [each["name"] for each in maps["categories"]] == ["cat", "dog"]
    assert (maps["a.png"]["categories"] == 2).sum() == 36
    used = roboflow_content({"segmentation": [SQUARE], "category_id": 0})
    (tmp_path / "robo" / "valid" / "_annotations.coco.json").write_text(json.dumps(used))
    read = roboflow.read(tmp_path / "robo", ReadOptions(splits=("valid",)))
    assert [each["id"] for each in read.categories] == [0, 1, 2]
    with pytest.raises(DataError, match="COCO Segmentation"):
        roboflow.read(tmp_path / "out", ReadOptions())
