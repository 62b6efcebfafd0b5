"""Every kind that is written and read: what it can hold comes back, pixel for pixel."""

from __future__ import annotations

import importlib
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.cli import main
from ldmseg_fast.errors import DataError
from ldmseg_fast.formats.data_set import AnnotatedMap
from ldmseg_fast.formats.kinds import KINDS
from ldmseg_fast.formats.options import ReadOptions, WriteOptions
from ldmseg_fast.panoptic.format import read_panoptic_png
from tests.formats.conftest import same_partition
from tests.formats.drawing import CATEGORIES, annotated, coco_maps, data_set, described, noise

KEEPS_CROWDS = ("coco-instances", "labelme")
CASES = [
    ("coco-instances", "rle"),
    ("coco-instances", "polygon"),
    ("labelme", "rle"),
    ("labelme", "polygon"),
    ("cvat", "rle"),
    ("label-studio", "rle"),
]


def written(kind, source, out, shape="rle"):
    module = importlib.import_module(f"ldmseg_fast.formats.{KINDS[kind].module}")
    out.mkdir()
    summary = module.write(source, out, WriteOptions(shape=shape))
    return module, summary


def check(kind, shape, source, out):
    module, summary = written(kind, source, out, shape)
    back = module.read(out, ReadOptions())
    (split,) = source.splits
    assert list(back.splits) == [split]
    assert summary.pictures == len(source.splits[split]) == len(back.splits[split])
    found = {entry.name: entry for entry in back.splits[split]}
    for entry in source.splits[split]:
        expected, other = entry.read(), found[entry.name].read()
        crowd = kind in KEEPS_CROWDS
        assert described(other, back.categories, crowd) == described(expected, source.categories, crowd), entry.name
        assert other.left_out == {}
        picture = found[entry.name].picture
        assert Image.open(picture).size == expected.ids.shape[::-1] and picture.is_symlink()
        assert picture.read_bytes() == entry.picture.read_bytes()
    return summary, back


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_noise(tmp_path, kind, shape):
    maps = {
        f"{'deep/' * (seed % 2)}bild {seed}.png": annotated(noise(seed, 20 + seed, 31 - seed), seed, crowd=True)
        for seed in range(6)
    }
    maps["whole.png"] = annotated(np.full((5, 7), 4), 1)
    maps["one.png"] = annotated(np.eye(6, 8, dtype=int), 1)
    summary, back = check(kind, shape, data_set(tmp_path / "pictures", maps), tmp_path / "out")
    assert summary.segments == sum(len(each.segments) for each in maps.values())
    assert {(each["name"], each["isthing"]) for each in back.categories} == {
        (each["name"], each["isthing"]) for each in CATEGORIES
    }
    assert {each["id"] for each in back.categories} == {3, 5, 9}


@pytest.mark.parametrize(("name", "count"), [("panoptic_val2017", 18), ("panoptic_val2017_classes", 8)])
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_photographs(tmp_path, shared, kind, shape, name, count):
    """Maps of COCO with their void, holes, pieces and a crowd: 18 without classes, 8 with things and stuff."""
    maps, categories = coco_maps(shared, name)
    source = data_set(tmp_path / "pictures", maps, categories=categories)
    summary, _ = check(kind, shape, source, tmp_path / "out")
    assert len(maps) == summary.pictures == count
    assert any("crowd" in reason for reason in summary.left_out) == (kind not in KEEPS_CROWDS)


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_maps_without_a_segment(tmp_path, kind, shape):
    maps = {"void.png": annotated(np.zeros((9, 4), int)), "some.png": annotated(np.ones((9, 4), int))}
    check(kind, shape, data_set(tmp_path / "pictures", maps), tmp_path / "out")


@pytest.mark.parametrize("kind", ["coco-instances", "labelme", "label-studio"])
def test_scores_are_kept(tmp_path, kind):
    maps = {"a.png": annotated(noise(1, 12, 12), 1, scores=True), "void.png": annotated(np.zeros((9, 4), int))}
    module, _ = written(kind, data_set(tmp_path / "pictures", maps), tmp_path / "out")
    version = "predictions" if kind == "label-studio" else ""
    (entry, *_) = module.read(tmp_path / "out", ReadOptions(version=version)).splits["val"]
    expected = sorted(segment["score"] for segment in maps["a.png"].segments)
    assert sorted(segment["score"] for segment in entry.read().segments) == pytest.approx(expected)


def test_a_format_without_scores_says_so(tmp_path):
    maps = {"a.png": annotated(noise(1, 12, 12), 1, scores=True)}
    _, summary = written("cvat", data_set(tmp_path / "pictures", maps), tmp_path / "out")
    assert summary.left_out["scores of segments"] == len(maps["a.png"].segments)


@pytest.mark.parametrize("turn", range(2, 9))
@pytest.mark.parametrize("kind", ["labelme", "cvat", "label-studio"])
def test_tools_draw_on_pictures_as_they_are_shown(tmp_path, kind, turn):
    """A map of the stored pixels is written turned by the EXIF orientation, and read back to the stored pixels."""
    each = annotated(noise(turn, 9, 15), turn)
    source = data_set(tmp_path / "pictures", {"a.png": each})
    path = tmp_path / "pictures" / "a.png"
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.open(path).save(path, exif=exif)
    module, _ = written(kind, source, tmp_path / "out")
    back = module.read(tmp_path / "out", ReadOptions())
    assert described(back.splits["val"][0].read(), back.categories) == described(each, CATEGORIES)
    if kind == "labelme":
        height, width = each.ids.shape
        content = json.loads((tmp_path / "out" / "val" / "a.json").read_text())
        shown = (height, width) if turn < 5 else (width, height)
        assert (content["imageHeight"], content["imageWidth"]) == shown


def test_pieces_of_label_studios_polygons_are_counted(tmp_path):
    ids = np.array([[1, 0, 1], [0, 0, 0], [2, 2, 2]])
    segments = [{"id": number, "category_id": 3, "iscrowd": 0} for number in (1, 2)]
    source = data_set(tmp_path / "pictures", {"a.png": AnnotatedMap(ids.astype(np.int32), segments)})
    module, summary = written("label-studio", source, tmp_path / "out", "polygon")
    assert summary.left_out == {"segments of several pieces, each of which is a region of its own": 1}
    (entry,) = module.read(tmp_path / "out", ReadOptions()).splits["val"]
    other = entry.read()
    assert len(other.segments) == 3
    np.testing.assert_array_equal(other.ids > 0, ids > 0)


def test_more_than_255_segments(tmp_path):
    """CVAT's masks keep the largest; the others hold all."""
    ids = np.arange(20 * 15).reshape(20, 15).repeat(2, 0).repeat(2, 1)
    ids[:2, :2] = ids[0, 2]
    segments = [{"id": number, "category_id": 3, "iscrowd": 0} for number in range(1, 300)]
    each = AnnotatedMap(ids.astype(np.int32), segments)
    source = data_set(tmp_path / "pictures", {"a.png": each})
    module, summary = written("cvat", source, tmp_path / "out")
    assert summary.left_out == {"segments beyond the 255 largest of a picture, which become void": 44}
    other = module.read(tmp_path / "out", ReadOptions()).splits["val"][0].read()
    assert len(other.segments) == 255 and (other.ids > 0).sum() == 255 * 4 + 4
    for kind in ("coco-instances", "labelme", "label-studio"):
        check(kind, "rle", source, tmp_path / kind)


@pytest.mark.parametrize("kind", ["labelme", "cvat", "label-studio"])
def test_names_must_differ(tmp_path, kind):
    categories = [{"id": 1, "name": "dog", "isthing": 1}, {"id": 2, "name": "dog", "isthing": 1}]
    source = data_set(tmp_path / "pictures", {"a.png": AnnotatedMap(np.zeros((3, 3), np.int32), [])}, "val", categories)
    with pytest.raises(DataError, match="dog"):
        written(kind, source, tmp_path / "out")


@pytest.mark.parametrize("kind", ["labelme", "cvat", "label-studio"])
def test_things_are_chosen_where_a_tool_does_not_know_them(tmp_path, kind):
    """Without categories.json all labels are things; --things says otherwise, and stuff becomes one segment."""
    ids = np.array([[1, 2, 0], [1, 0, 3]], np.int32)
    segments = [{"id": number, "category_id": 3 if number < 3 else 9, "iscrowd": 0} for number in (1, 2, 3)]
    source = data_set(tmp_path / "pictures", {"a.png": AnnotatedMap(ids, segments)})
    module, _ = written(kind, source, tmp_path / "out")
    (tmp_path / "out" / "categories.json").unlink()
    back = module.read(tmp_path / "out", ReadOptions(things=("sky",)))
    assert {each["name"]: each["isthing"] for each in back.categories if each["name"] in ("dog", "sky")} == {
        "dog": 0,
        "sky": 1,
    }
    other = back.splits["val"][0].read()
    assert len(other.segments) == 2 and len(np.unique(other.ids[ids == 1])) == 1
    np.testing.assert_array_equal(other.ids == other.ids[0, 0], (ids == 1) | (ids == 2))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_commands(tmp_path, scenes, imported, kind, shape, packed, capsys):
    """`ldmseg data export` and `ldmseg data import`, of a zip too, give the maps back, and a training reads them."""
    choice = [] if kind == "cvat" else ["--shape", shape]
    assert main(["data", "export", kind, str(scenes), str(tmp_path / "out"), "--split", "val2017", *choice]) == 0
    source = tmp_path / "out"
    if packed:
        source = tmp_path / "out.zip"
        with zipfile.ZipFile(source, "w") as file:
            for path in sorted((tmp_path / "out").rglob("*")):
                if path.is_file():
                    file.write(path, path.relative_to(tmp_path / "out").as_posix())
    assert main(["data", "import", kind, str(source), str(tmp_path / "back")]) == 0
    assert capsys.readouterr().out.count("8 pictures with") == 2
    maps = imported(tmp_path / "back", "val2017")
    content = json.loads((scenes / "annotations" / "panoptic_val2017.json").read_text())
    assert [each["id"] for each in maps["categories"]] == [each["id"] for each in content["categories"]]
    for annotation in content["annotations"]:
        expected = read_panoptic_png(scenes / "panoptic_val2017" / annotation["file_name"])
        found = maps[annotation["file_name"]]
        assert same_partition(found["ids"], expected)
        categories = {segment["id"]: segment["category_id"] for segment in annotation["segments_info"]} | {0: -1}
        np.testing.assert_array_equal(found["categories"], np.vectorize(categories.get)(expected))
    for path in (scenes / "val2017").iterdir():
        assert (tmp_path / "back" / "val2017" / path.name).read_bytes() == path.read_bytes()
