"""CVAT's segmentation masks 1.1 and its XML of images."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.commands.data_import import import_data
from ldmseg_fast.errors import DataError, UserError
from ldmseg_fast.formats import cvat_masks
from ldmseg_fast.formats.cvat_xml import NO_AREA
from ldmseg_fast.formats.data_set import AnnotatedMap
from ldmseg_fast.formats.drawn import voc_colours
from ldmseg_fast.formats.options import ReadOptions, WriteOptions
from ldmseg_fast.formats.painting import OVERLAP
from tests.formats.drawing import CATEGORIES, annotated, data_set, noise

HEIGHT, WIDTH = 24, 32  # of `picture_at`
LABELS = "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncar:64,0,128::\nroad sign:10,20,30:a,b:c\n"
COLOURS = {"background": (0, 0, 0), "car": (64, 0, 128), "road sign": (10, 20, 30)}


@pytest.fixture
def export(tmp_path, picture_at, png_at):
    """Makes an export as CVAT's documentation shows it: two cars, a sign and a sign without an instance."""

    def make(classes=None, objects=None, labels=LABELS, names="deep/a b\n", picture="JPEGImages/deep/a b.png"):
        root = tmp_path / "task"
        kinds = np.array(["background", "car", "road sign"])
        places = np.zeros((HEIGHT, WIDTH), int)
        places[2:8, 2:8], places[2:8, 12:20], places[20:22, :5] = 1, 1, 2
        numbers = np.zeros((HEIGHT, WIDTH), int)
        numbers[2:8, 2:8], numbers[2:8, 12:20] = 1, 2
        rgb = np.array([COLOURS[kind] for kind in kinds], np.uint8)[places]
        png_at(root / "SegmentationClass/deep/a b.png", rgb if classes is None else classes)
        instances = np.array(voc_colours(4), np.uint8)[numbers]
        png_at(root / "SegmentationObject/deep/a b.png", instances if objects is None else objects)
        (root / "ImageSets/Segmentation").mkdir(parents=True)
        (root / "ImageSets/Segmentation/default.txt").write_text(names)
        if labels is not None:
            (root / "labelmap.txt").write_text(labels)
        if picture:
            picture_at(root / picture)
        return root, places, numbers

    return make


def zip_of(root, path):
    with zipfile.ZipFile(path, "w") as file:
        for each in sorted(root.rglob("*")):
            file.write(each, each.relative_to(root).as_posix())
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_an_export(export, tmp_path, imported, packed):
    root, places, numbers = export()
    source = zip_of(root, tmp_path / "task.zip") if packed else root
    summary = import_data("cvat", source, tmp_path / "out", ReadOptions(), WriteOptions())
    assert (summary.pictures, summary.segments, dict(summary.left_out)) == (1, 3, {})
    maps = imported(tmp_path / "out", "default")
    assert [(each["id"], each["name"]) for each in maps["categories"]] == [(1, "car"), (2, "road sign")]
    found = maps["deep/a b.png"]
    np.testing.assert_array_equal(found["categories"], np.where(places == 0, -1, places))
    assert len(np.unique(found["ids"][numbers > 0])) == 2
    stuff = cvat_masks.read(root, ReadOptions(things=("road sign",))).splits["default"][0].read()
    assert len(stuff.segments) == 2  # both cars are one segment


def test_voc_without_a_label_map(export, png_at):
    """Palette PNGs with VOC's own labels and its border, and grey ones with the places of labels."""
    root, places, _ = export(labels=None)
    palette = np.array(voc_colours(), np.uint8)
    for name, values in (("SegmentationClass", np.where(places == 2, 255, places * 7)), ("SegmentationObject", places)):
        image = Image.fromarray(values.astype(np.uint8)).convert("P")
        image.putpalette(palette.tobytes())
        image.save(root / name / "deep/a b.png")
    read = cvat_masks.read(root, ReadOptions())
    named = {each["id"]: each["name"] for each in read.categories}
    found = read.splits["default"][0].read()
    assert [named[each["category_id"]] for each in found.segments] == ["car"] and len(named) == 20
    np.testing.assert_array_equal(found.ids > 0, places == 1)
    png_at(root / "SegmentationClass/deep/a b.png", places.astype(np.uint8))
    (root / "labelmap.txt").write_text(LABELS)
    read = cvat_masks.read(root, ReadOptions())
    assert [each["category_id"] for each in read.splits["default"][0].read().segments] == [1, 2]


def test_pictures_without_annotation(export, tmp_path, picture_at):
    root, *_ = export(names="deep/a b\nempty\n")
    picture_at(root / "JPEGImages" / "empty.png")
    summary = import_data("cvat", root, tmp_path / "out", ReadOptions(), WriteOptions())
    assert summary.pictures == 2 and summary.left_out[cvat_masks.UNDONE] == 1


def test_lists_that_do_not_name_all_or_one_twice(export, png_at, tmp_path):
    root, *_ = export(names="deep/a b\ndeep/a b\n")
    png_at(root / "SegmentationClass/more.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    read = cvat_masks.read(root, ReadOptions())
    assert len(read.splits["default"]) == 1 and read.left_out == {cvat_masks.UNLISTED: 1}


def test_a_mask_of_objects_that_is_missing(export, png_at, tmp_path):
    root, *_ = export()
    (root / "SegmentationObject/deep/a b.png").rename(root / "SegmentationObject/deep/other.png")
    with pytest.raises(DataError, match=r"SegmentationObject/deep/a b\.png: No such file"):
        import_data("cvat", root, tmp_path / "out", ReadOptions(), WriteOptions())
    (root / "SegmentationObject/deep/other.png").unlink()
    assert len(cvat_masks.read(root, ReadOptions()).splits["default"][0].read().segments) == 2


def test_what_is_written(tmp_path):
    """The zip holds what CVAT imports; colours differ, and those of categories are kept."""
    maps = {"deep/a.png": annotated(noise(1, 20, 30), 1)}
    (tmp_path / "out").mkdir()
    cvat_masks.write(data_set(tmp_path / "pictures", maps), tmp_path / "out", WriteOptions())
    with zipfile.ZipFile(tmp_path / "out" / "val.zip") as file:
        assert file.namelist() == [
            "ImageSets/Segmentation/val.txt",
            "SegmentationClass/deep/a.png",
            "SegmentationObject/deep/a.png",
            "labelmap.txt",
        ]
        assert file.read("ImageSets/Segmentation/val.txt") == b"deep/a\n"
        rows = [line.split(":") for line in file.read("labelmap.txt").decode().splitlines()]
    assert [row[0] for row in rows] == ["background", *(each["name"] for each in CATEGORIES)]
    assert all(len(row) == 4 for row in rows) and len({row[1] for row in rows}) == 4 and rows[2][1] == "10,200,30"
    objects = np.array(Image.open(tmp_path / "out/val/SegmentationObject/deep/a.png"))
    colours = {tuple(colour) for colour in objects.reshape(-1, 3).tolist()}
    assert colours == set(voc_colours()[: len(maps["deep/a.png"].segments) + 1])


def test_more_labels_than_vocs_palette_has_colours(tmp_path):
    categories = [{"id": number, "name": f"label {number}", "isthing": 1} for number in range(1, 301)]
    each = AnnotatedMap(np.array([[1, 2]], np.int32), [{"id": n, "category_id": 149 + n, "iscrowd": 0} for n in (1, 2)])
    (tmp_path / "out").mkdir()
    cvat_masks.write(
        data_set(tmp_path / "pictures", {"a.png": each}, "val", categories), tmp_path / "out", WriteOptions()
    )
    back = cvat_masks.read(tmp_path / "out", ReadOptions())
    assert [segment["category_id"] for segment in back.splits["val"][0].read().segments] == [150, 151]


@pytest.mark.parametrize("name", ["a:b", "#a", "a\nb", " a", "background"])
def test_names_that_a_label_map_cannot_hold(tmp_path, name):
    source = data_set(
        tmp_path / "pictures", {"a.png": annotated(np.zeros((3, 3), int))}, "val", [{**CATEGORIES[0], "name": name}]
    )
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=r"labelmap\.txt"):
        cvat_masks.write(source, tmp_path / "out", WriteOptions())


BAD = {
    "colour": ({"labels": LABELS.replace("64", "65")}, r"has the colour \[64, 0, 128\], which labelmap.txt lacks"),
    "two labels": ({"labels": LABELS + "x:64,0,128::\n"}, "line 5: x has the colour of car"),
    "line": ({"labels": LABELS + "x:64,0\n"}, "line 5.*expected label:red,green,blue"),
    "range": ({"labels": LABELS + "x:64,0,256::\n"}, "line 5"),
    "no label": ({"labels": "# nothing\n"}, "no label in it"),
    "latin": ({"labels": "größe"}, "no UTF-8"),
    "size": ({"classes": np.zeros((4, 5, 3), np.uint8)}, "drawn on 5x4 pixels, its picture has 32x24"),
    "size of objects": ({"objects": np.zeros((4, 5, 3), np.uint8)}, "drawn on 5x4 pixels"),
    "no picture": ({"picture": ""}, "none of its 1 pictures is there"),
    "number": ({"classes": np.full((HEIGHT, WIDTH), 9, np.uint8)}, "has the number 9, which labelmap.txt lacks"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(export, tmp_path, case):
    arguments, message = BAD[case]
    root, *_ = export(**arguments)
    if case == "latin":
        (root / "labelmap.txt").write_bytes("größe:1,2,3::".encode("latin-1"))
    with pytest.raises(UserError, match=message):
        import_data("cvat", root, tmp_path / "out", ReadOptions(), WriteOptions())
    assert not (tmp_path / "out" / "default").exists()


def test_damaged_masks_and_no_export(export, tmp_path):
    root, *_ = export()
    path = root / "SegmentationClass/deep/a b.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"SegmentationClass/deep/a b\.png"):
        cvat_masks.read(root, ReadOptions()).splits["default"][0].read()
    with pytest.raises(DataError, match="no SegmentationClass/"):
        cvat_masks.read(root / "JPEGImages", ReadOptions())


XML = """<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta><task><labels>
    <label><name>car</name><color>#c06060</color></label>
    <label><name>sky</name></label><label><name>un used</name></label>
  </labels></task></meta>
  <image id="0" name="deep/a.png" width="32" height="24"{subset}>
    {shapes}
  </image>
</annotations>
"""
SHAPES = """
<polygon label="car" source="manual" occluded="0" points="2.00,3.00;8.00,3.00;8.00,9.00;2.00,9.00" z_order="1"/>
<mask label="car" source="manual" occluded="0" rle="1, 3, 1, 1" left="20" top="4" width="3" height="2" z_order="0"/>
<box label="sky" occluded="0" xtl="0.0" ytl="0.0" xbr="32.0" ybr="5.0" z_order="0"></box>
<box label="car" occluded="0" xtl="10.0" ytl="10.0" xbr="14.0" ybr="18.0" rotation="90.0" z_order="0" group_id="4"/>
<ellipse label="car" cx="26" cy="16" rx="4" ry="3" z_order="0" group_id="4"><attribute name="x">1</attribute></ellipse>
<polyline label="car" points="1,2;3,4" z_order="0"/>
<tag label="car" source="manual"></tag>
"""


@pytest.fixture
def xml(tmp_path, picture_at):
    def make(shapes=SHAPES, subset="", text=XML):
        root = tmp_path / "task"
        picture_at(root / "images" / "deep" / "a.png")
        (root / "annotations.xml").write_text(text.replace("{shapes}", shapes).replace("{subset}", subset))
        return root

    return make


def test_xml_of_images(xml, tmp_path, imported):
    root = xml(subset=' subset="train"')
    read = cvat_masks.read(root, ReadOptions(things=("car",)))
    assert [each["name"] for each in read.categories] == ["car", "sky", "un used"]
    assert [each["isthing"] for each in read.categories] == [1, 0, 0]
    found = read.splits["train"][0].read()
    expected = np.zeros((HEIGHT, WIDTH), int)
    patch = np.array([[0, 1, 1], [1, 0, 1]], bool)
    expected[4:6, 20:23][patch] = 1
    expected[:5] = 2
    expected[12:16, 8:16] = 3  # turned by 90 degrees about (12, 14)
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    ellipse = ((x - 26) / 4) ** 2 + ((y - 16) / 3) ** 2 < 1
    expected[ellipse] = 3
    expected[3:9, 2:8] = 4  # z_order 1
    assert (found.ids != expected).sum() <= 6  # the ellipse is a polygon
    same = ~ellipse & (expected != 3) | (expected == 3) & ~ellipse
    np.testing.assert_array_equal(np.where(same, expected, 0)[:12], np.where(same, found.ids, 0)[:12])
    assert found.left_out == {NO_AREA: 1, OVERLAP: 2 + 12}
    zipped = zip_of(root, tmp_path / "task.zip")
    summary = import_data("cvat", zipped, tmp_path / "out", ReadOptions(), WriteOptions())
    assert summary.segments == 4 and "deep/a.png" in imported(tmp_path / "out", "train")


def test_a_last_run_of_zeros_may_be_missing(xml):
    root = xml('<mask label="car" rle="1, 1" left="4" top="5" width="2" height="2"/>')
    found = cvat_masks.read(root, ReadOptions()).splits["default"][0].read()
    assert np.argwhere(found.ids).tolist() == [[5, 5]]


SQUARE = '<polygon label="car" points="2,3;8,3;8,9" z_order="0"/>'
BAD_XML = {
    "damaged": (XML[:90], "", "damaged XML"),
    "other": ("<x/>", "", "is not CVAT's"),
    "video": (XML.replace("</annotations>", "<track id='0'/></annotations>"), "", "tracks of CVAT for video"),
    "entities": ('<!DOCTYPE x [<!ENTITY a "aaaa">]>' + XML.split("\n", 1)[1], "", "declares entities"),
    "no image": ("<annotations></annotations>", "", "no images in it"),
    "size": (XML.replace('"32"', '"31"'), SQUARE, "drawn on 31x24 pixels, its picture has 32x24"),
    "no size": (XML.replace('"32"', '"many"'), SQUARE, "width must be a whole number, got 'many'"),
    "nan": (XML, SQUARE.replace("2,3", "NaN,3"), "no number: 'NaN'"),
    "pairs": (XML, SQUARE.replace("2,3", "2,3,4"), "points must be"),
    "short": (XML, SQUARE.replace(";8,9", ""), "at least 3 points"),
    "no label": (XML, SQUARE.replace('label="car" ', ""), "has no label"),
    "rle": (XML, '<mask label="car" rle="1, x" left="0" top="0" width="1" height="1"/>', "whole numbers"),
    "few runs": (XML, '<mask label="car" rle="1, 1, 1" left="0" top="0" width="2" height="2"/>', "4 pixels of its box"),
    "runs": (XML, '<mask label="car" rle="1, 4" left="0" top="0" width="2" height="2"/>', "4 pixels of its box"),
    "outside": (XML, '<mask label="car" rle="0, 4" left="31" top="0" width="2" height="2"/>', "leaves the picture"),
    "huge": (XML, '<mask label="car" rle="99999999999999999999" left="0" top="0" width="1" height="1"/>', "whole"),
}


def test_entities_in_another_encoding(tmp_path):
    text = '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE x [<!ENTITY a "aaaa">]><annotations>&a;</annotations>'
    (tmp_path / "annotations.xml").write_bytes(text.encode("utf-16"))
    with pytest.raises(DataError, match="declares entities"):
        cvat_masks.read(tmp_path, ReadOptions())


@pytest.mark.parametrize("case", BAD_XML)
def test_bad_xml(xml, tmp_path, case):
    text, shapes, message = BAD_XML[case]
    with pytest.raises(UserError, match=message) as error:
        import_data("cvat", xml(shapes, text=text), tmp_path / "out", ReadOptions(), WriteOptions())
    assert "annotations.xml" in str(error.value)
    assert not (tmp_path / "out" / "default").exists()
