"""Formats that are written and not read: what other programs find in them, pixel for pixel."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from ldmseg_fast.errors import DataError
from ldmseg_fast.formats import export as exporting
from ldmseg_fast.formats import semantic_folder
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet
from ldmseg_fast.formats.options import ReadOptions, Summary, WriteOptions
from ldmseg_fast.metrics.pq_files import evaluate_files
from ldmseg_fast.panoptic.outlines import fill
from tests.formats.drawing import CATEGORIES, annotated, coco_maps, data_set, noise


def export(source: DataSet, out: Path, kind: str) -> Summary:
    return exporting.export(source, kind, out, WriteOptions())


@pytest.fixture
def maps() -> dict[str, AnnotatedMap]:
    maps = {
        f"{'deep/' * (seed % 2)}bild {seed}.png": annotated(noise(seed, 20 + seed, 31 - seed), seed, True, seed > 2)
        for seed in range(5)
    }
    return {**maps, "void.png": annotated(np.zeros((9, 4), int)), "whole.png": annotated(np.full((5, 7), 4), 1)}


@pytest.fixture
def source(tmp_path, maps) -> DataSet:
    return data_set(tmp_path / "pictures", maps)


def of_categories(each: AnnotatedMap, values: dict[int, int]) -> np.ndarray:
    found = np.zeros(each.ids.shape, int)
    for segment in each.segments:
        found[each.ids == segment["id"]] = values[segment["category_id"]]
    return found


def check_geojson(out, split, name, each: AnnotatedMap):
    collection = json.loads((out / split / name).with_suffix(".geojson").read_text())
    assert (collection["type"], collection["image"]["file_name"]) == ("FeatureCollection", name)
    ids = np.zeros(each.ids.shape, int)
    for feature in collection["features"]:
        rings = [np.array(ring) for polygon in feature["geometry"]["coordinates"] for ring in polygon]
        assert all((ring[0] == ring[-1]).all() and len(ring) >= 5 for ring in rings)
        ids[fill(rings, *each.ids.shape)] = feature["id"]
        for outer, *holes in ([np.array(ring) for ring in each] for each in feature["geometry"]["coordinates"]):
            assert signed_area(outer) > 0 and all(signed_area(hole) < 0 for hole in holes)
    np.testing.assert_array_equal(ids, each.ids)
    assert [(f["id"], f["properties"]["category_id"], f["properties"]["iscrowd"]) for f in collection["features"]] == [
        (segment["id"], segment["category_id"], segment["iscrowd"]) for segment in each.segments
    ]


def signed_area(ring: np.ndarray) -> float:
    """Positive where a closed ring runs counter-clockwise in x and y."""
    x, y = ring.T
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum()) / 2


def test_geojson(tmp_path, source, maps):
    summary = export(source, tmp_path / "out", "geojson")
    assert summary.pictures == len(maps) and summary.segments == sum(len(each.segments) for each in maps.values())
    assert not summary.left_out
    for name, each in maps.items():
        check_geojson(tmp_path / "out", "val", name, each)


def test_palette(tmp_path, source, maps):
    summary = export(source, tmp_path / "out", "palette")
    assert summary.left_out["scores of segments"] and any("crowds" in reason for reason in summary.left_out)
    listed = json.loads((tmp_path / "out" / "categories.json").read_text())["categories"]
    values = {category["source_id"]: category["id"] for category in listed}
    assert values == {3: 3, 5: 5, 9: 9} and listed[1]["name"] == CATEGORIES[1]["name"]
    for name, each in maps.items():
        semantic = Image.open(tmp_path / "out" / "val" / "labels" / name)
        instances = Image.open(tmp_path / "out" / "val" / "instances" / name)
        assert semantic.mode == instances.mode == "P"
        assert semantic.getpalette()[15:18] == CATEGORIES[1]["color"] and semantic.getpalette()[:6] == [
            0,
            0,
            0,
            128,
            0,
            0,
        ]
        np.testing.assert_array_equal(np.asarray(semantic), of_categories(each, values))
        for place, segment in enumerate(each.segments, 1):
            np.testing.assert_array_equal(np.asarray(instances) == place, each.ids == segment["id"])


def test_palette_numbers_categories_where_ids_do_not_fit(tmp_path):
    categories = [{"id": 1000, "name": "a", "isthing": 1}, {"id": 0, "name": "b", "isthing": 0}]
    each = AnnotatedMap(np.array([[8, 9]], np.int32), [{"id": 8, "category_id": 0}, {"id": 9, "category_id": 1000}])
    source = data_set(tmp_path / "pictures", {"a.png": each}, categories=categories)
    export(source, tmp_path / "out", "palette")
    np.testing.assert_array_equal(Image.open(tmp_path / "out" / "val" / "labels" / "a.png"), [[2, 1]])
    many = [{"id": number, "name": str(number), "isthing": 1} for number in range(256)]
    with pytest.raises(DataError, match="256 categories"):
        export(data_set(tmp_path / "b", {"a.png": each}, categories=many), tmp_path / "many", "palette")


def test_palette_refuses_256_segments(tmp_path):
    ids = np.arange(1, 257, dtype=np.int32).reshape(16, 16)
    each = AnnotatedMap(ids, [{"id": number, "category_id": 3, "iscrowd": 0} for number in range(1, 257)])
    with pytest.raises(DataError, match=r"a\.png: 256 segments, a palette has 255"):
        export(data_set(tmp_path / "pictures", {"a.png": each}), tmp_path / "out", "palette")


def check_fiftyone(folder, maps):
    """By pycocotools, with which FiftyOne decodes the masks, and by the two rules of its folders."""
    coco = COCO(folder / "labels.json")
    assert sorted(image["file_name"] for image in coco.imgs.values()) == sorted(maps)
    targets = {int(value): name for value, name in json.loads((folder / "mask_targets.json").read_text()).items()}
    for image in coco.imgs.values():
        each = maps[image["file_name"]]
        with Image.open(folder / "data" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) == each.ids.shape[::-1]
        ids, semantic = np.zeros(each.ids.shape, int), np.zeros(each.ids.shape, int)
        for annotation in coco.imgToAnns[image["id"]]:
            ids[coco.annToMask(annotation) > 0] = annotation["segment_id"]
            semantic[coco.annToMask(annotation) > 0] = annotation["category_id"]
            assert targets[annotation["category_id"]] == coco.cats[annotation["category_id"]]["name"]
            x, y, w, h = annotation["bbox"]
            assert not coco.annToMask(annotation)[y : y + h, x : x + w].sum() - annotation["area"]
        np.testing.assert_array_equal(ids, each.ids)
        np.testing.assert_array_equal(
            Image.open((folder / "labels" / image["file_name"]).with_suffix(".png")), semantic
        )
        assert [annotation.get("score") for annotation in coco.imgToAnns[image["id"]]] == [
            segment.get("score") for segment in each.segments
        ]


def test_fiftyone(tmp_path, source, maps, capsys):
    summary = export(source, tmp_path / "out", "fiftyone")
    assert not summary.left_out and summary.pictures == len(maps)
    check_fiftyone(tmp_path / "out" / "val", maps)
    assert (tmp_path / "out" / "val" / "data" / "void.png").is_symlink()


def test_fiftyone_knows_masks_by_the_picture_without_its_ending(tmp_path):
    each = annotated(np.ones((4, 4), int))
    source = data_set(tmp_path / "pictures", {"a.png": each, "a.bmp": each})
    with pytest.raises(DataError, match=r"a\.png: it has several maps, or another picture differs in its ending alone"):
        export(source, tmp_path / "out", "fiftyone")


@pytest.mark.parametrize("kind", ["coco-instances", "labelme", "label-studio", "cvat", "geojson", "palette"])
def test_pictures_with_several_maps(tmp_path, kind):
    """Such as BSDS500's, of several annotators."""
    one, two = annotated(noise(1, 9, 12), 1), annotated(noise(2, 9, 12), 2)
    source = data_set(tmp_path / "pictures", {"a.png": one})
    (entry,) = source.splits["val"]
    several = [entry, replace(entry, read=lambda: two, image_id=2)]
    twice = replace(source, splits={"val": several})
    summary = export(twice, tmp_path / "out", kind)
    assert summary.pictures == 2 and summary.segments == len(one.segments) + len(two.segments)
    for refusing in ("fiftyone", "cityscapes-results"):
        with pytest.raises(DataError, match=r"a\.png: it has several maps|a\.png and a\.png: Cityscapes"):
            export(twice, tmp_path / refusing, refusing)
        assert not (tmp_path / refusing).exists()


CITY = [
    {"id": 1, "name": "road", "isthing": 0},
    {"id": 2, "name": "Car", "isthing": 1},
    {"id": 3, "name": "traffic_light", "isthing": 0},
    {"id": 4, "name": "ego vehicle", "isthing": 0},
]


@pytest.fixture
def city() -> AnnotatedMap:
    ids = np.zeros((20, 30), np.int32)
    ids[10:] = 70_000
    ids[12:18, 2:10], ids[11:15, 15:28], ids[:6, :6], ids[19] = 5, 6, 9, 11
    segments = [
        {"id": 5, "category_id": 2, "iscrowd": 0, "score": 0.25},
        {"id": 6, "category_id": 2, "iscrowd": 0},
        {"id": 9, "category_id": 3, "iscrowd": 0},
        {"id": 11, "category_id": 4, "iscrowd": 0},
        {"id": 70_000, "category_id": 1, "iscrowd": 0},
    ]
    return AnnotatedMap(ids, segments)


def test_cityscapes(tmp_path, city):
    name = "aachen/aachen_000000_000019_leftImg8bit.png"
    source = data_set(tmp_path / "pictures", {name: city}, categories=CITY)
    summary = export(source, tmp_path / "out", "cityscapes-results")
    assert summary.left_out == {"segments of categories that Cityscapes does not evaluate": 1} and summary.segments == 4
    path = tmp_path / "out" / "cityscapes_panoptic_val.json"
    content = json.loads(path.read_text())
    (annotation,) = content["annotations"]
    assert annotation["image_id"] == "aachen_000000_000019" and len(content["categories"]) == 19
    assert {each["id"]: each["category_id"] for each in annotation["segments_info"]} == {5: 26, 6: 26, 9: 19, 70_000: 7}
    truth = {**content, "images": [{"id": annotation["image_id"], "file_name": "a.png", "height": 20, "width": 30}]}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    result = evaluate_files(tmp_path / "truth.json", path, path.with_suffix(""), path.with_suffix(""))
    assert result is not None
    text = tmp_path / "out" / "instances" / "val" / "aachen_000000_000019.txt"
    lines = [line.split(" ") for line in text.read_text().splitlines()]
    assert [(label, float(score)) for _, label, score in lines] == [("26", 0.25), ("26", 1.0)]
    for (mask, _, _), segment in zip(lines, (5, 6)):
        np.testing.assert_array_equal(np.asarray(Image.open(text.parent / mask)) > 0, city.ids == segment)


def test_cityscapes_needs_its_categories_and_names(tmp_path, city):
    agnostic = [{"id": 1, "name": "object", "isthing": 1}]
    each = AnnotatedMap(np.ones((2, 2), np.int32), [{"id": 1, "category_id": 1}])
    source = data_set(tmp_path / "pictures", {"a.png": each}, categories=agnostic)
    with pytest.raises(
        DataError, match=r"none of the categories \(object\) is one of Cityscapes'; it has road, sidewalk"
    ):
        export(source, tmp_path / "out", "cityscapes-results")
    assert not (tmp_path / "out").exists()
    source = data_set(tmp_path / "pictures", {"a/x.png": city, "b/x.png": city}, categories=CITY)
    with pytest.raises(DataError, match=r"b/x\.png and a/x\.png: Cityscapes knows both as x"):
        export(source, tmp_path / "out", "cityscapes-results")


def test_photographs(tmp_path, shared):
    """Maps of COCO's photographs: every pixel is there in each of the formats."""
    maps, categories = coco_maps(shared, "panoptic_val2017")
    source = data_set(tmp_path / "pictures", maps, "val", categories)
    for kind in ("geojson", "palette", "fiftyone"):
        assert export(source, tmp_path / kind, kind).pictures == len(maps) == 18
    for name, each in maps.items():
        check_geojson(tmp_path / "geojson", "val", name, each)
        png = (tmp_path / "palette" / "val" / "instances" / name).with_suffix(".png")
        places = np.asarray(Image.open(png))
        for place, segment in enumerate(each.segments, 1):
            np.testing.assert_array_equal(places == place, each.ids == segment["id"])
    check_fiftyone(tmp_path / "fiftyone" / "val", maps)


def test_labels_of_palettes_are_read_again(tmp_path, source, maps):
    export(source, tmp_path / "out", "palette")
    back = semantic_folder.read(tmp_path / "out", ReadOptions())
    assert [(each["id"], each["name"], each["isthing"]) for each in back.categories] == [
        (each["id"], each["name"], each["isthing"]) for each in CATEGORIES
    ]
    assert sorted(entry.name for entry in back.splits["val"]) == sorted(maps)
    for entry in back.splits["val"]:
        ids = {each["id"]: each["id"] for each in CATEGORIES}
        np.testing.assert_array_equal(of_categories(entry.read(), ids), of_categories(maps[entry.name], ids))
