"""LabelMe's JSONs, as LabelMe itself reads and writes them."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ldmseg_fast.commands.data_import import import_data
from ldmseg_fast.errors import DataError
from ldmseg_fast.formats import labelme, labelme_shapes
from ldmseg_fast.formats.options import ReadOptions, WriteOptions
from ldmseg_fast.formats.painting import EMPTY, HIDDEN, OVERLAP
from tests.formats.test_trees import zipped

HEIGHT, WIDTH = 24, 32  # of `picture_at`
TRIANGLE = [[2.5, 3.0], [12.9, 4.2], [6.1, 15.8]]


def png(mask: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def shape(points=TRIANGLE, label="dog", kind="polygon", **more) -> dict:
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}, **more}


def content(*shapes: dict, **more) -> dict:
    """As the tool writes it, here with `imageData` left out."""
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": list(shapes),
        "imagePath": "a.png",
        "imageData": None,
        "imageHeight": HEIGHT,
        "imageWidth": WIDTH,
    } | more


@pytest.fixture
def source(tmp_path, picture_at):
    def make(*contents):
        root = tmp_path / "labelme"
        picture_at(root / "a.png")
        for number, each in enumerate(contents):
            text = each if isinstance(each, bytes) else json.dumps(each).encode()
            (root / f"{number}.json").write_bytes(text)
        return root

    return make


def only_map(root):
    read = labelme.read(root, ReadOptions())
    ((entry,),) = read.splits.values()
    return entry.read(), read


def painted(draw_shape) -> np.ndarray:
    image = Image.new("L", (WIDTH, HEIGHT))
    draw_shape(ImageDraw.Draw(image))
    return np.array(image, bool)


def test_shapes_are_painted_as_labelme_paints_them(source):
    patch = np.array([[True, False], [False, True], [True, True]])
    found, read = only_map(
        source(
            content(
                shape(),
                shape([[20, 10], [15.5, 2.5]], "cat", "rectangle"),
                shape([[22, 16], [25, 16]], "cat", "circle"),
                shape([[28, 20], [29, 22]], "dog", "mask", mask=png(patch)),
                shape([[1, 1]], "dog", "point"),
                shape([[1, 1], [2, 2]], "dog", "line"),
                shape([[1, 1], [2, 2]], "dog", "polygon"),
            )
        )
    )
    assert read.categories == [{"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "dog", "isthing": 1}]
    expected = np.zeros((HEIGHT, WIDTH), int)
    for number, mask in enumerate(
        (
            painted(lambda draw: draw.polygon([tuple(point) for point in TRIANGLE], outline=1, fill=1)),
            painted(lambda draw: draw.rectangle([(15.5, 2.5), (20, 10)], outline=1, fill=1)),
            painted(lambda draw: draw.ellipse([19, 13, 25, 19], outline=1, fill=1)),
        ),
        1,
    ):
        expected[mask] = number
    expected[20:23, 28:30][patch] = 4
    np.testing.assert_array_equal(found.ids, expected)
    assert [each["category_id"] for each in found.segments] == [2, 1, 1, 2]
    assert found.left_out == {labelme_shapes.NO_AREA: 2, labelme_shapes.SHORT: 1}


def box(left, top, right, bottom, **more):
    return shape([[left, top], [right, bottom]], more.pop("label", "dog"), "rectangle", **more)


def test_later_shapes_lie_above_and_groups_are_one_segment(source):
    found, _ = only_map(
        source(
            content(
                box(0, 0, 3, 3, group_id=1),
                box(2, 2, 5, 5),
                box(8, 8, 9, 9, group_id=1),
                box(8, 8, 9, 9, group_id=1, label="cat"),
                box(0, 20, 1, 21),
                box(0, 20, 1, 21, label="__ignore__"),
                box(50, 50, 60, 60),
            )
        )
    )
    assert np.unique(found.ids[:4, :2]).tolist() == [1] and found.ids[2, 2] == 2
    assert [each["category_id"] for each in found.segments] == [2, 2, 1]
    assert (found.ids[8:10, 8:10] == 3).all() and not found.ids[20:22].any()
    assert found.left_out == {OVERLAP: 4 + 4 + 4, HIDDEN: 1, EMPTY: 1}


def test_a_mask_that_leaves_the_picture_is_cut(source):
    found, _ = only_map(source(content(shape([[-1, 22], [2, 25]], kind="mask", mask=png(np.ones((4, 4), bool))))))
    expected = np.zeros((HEIGHT, WIDTH), int)
    expected[22:, :3] = 1
    np.testing.assert_array_equal(found.ids, expected)


def test_pictures_are_found_or_embedded(tmp_path, picture_at, imported):
    """By a path of Windows, beside the JSON, or in it; folders are splits."""
    root = tmp_path / "labelme"
    picture = picture_at(root / "images" / "b.png")
    picture_at(root / "train" / "a.png")
    (root / "val").mkdir()
    data = base64.b64encode(picture.read_bytes()).decode()
    for name, each in (
        ("train/a.json", content(shape())),
        ("train/b.json", content(shape(), imagePath="..\\images\\b.png")),
        ("val/c.json", content(shape(), imagePath="C:\\me\\c.png", imageData=data, imageHeight=None, imageWidth=None)),
    ):
        (root / name).write_text(json.dumps(each))
    summary = import_data("labelme", root, tmp_path / "out", ReadOptions(), WriteOptions())
    assert (summary.pictures, summary.segments) == (3, 3)
    assert set(imported(tmp_path / "out", "train")) == {"a.png", "b.png", "categories"}
    assert (tmp_path / "out" / "val" / "c.png").read_bytes() == picture.read_bytes()


def test_pictures_and_jsons_in_folders_of_their_own(tmp_path, picture_at, imported):
    for split in ("train", "val"):
        picture_at(tmp_path / "in" / "images" / split / "a.png")
        (tmp_path / "in" / "annotations" / split).mkdir(parents=True)
        text = json.dumps(content(shape(), imagePath=f"../../images/{split}/a.png"))
        (tmp_path / "in" / "annotations" / split / "a.json").write_text(text)
    assert import_data("labelme", tmp_path / "in", tmp_path / "out", ReadOptions(), WriteOptions()).pictures == 2
    assert set(imported(tmp_path / "out", "val")) == {"a.png", "categories"}


def test_categories_beside_the_jsons(source):
    root = source(content(shape()))
    dog = {"id": 9, "name": "dog", "isthing": 0}
    for listed in ([dog], {"categories": [dog]}):
        (root / "categories.json").write_text(json.dumps(listed))
        assert labelme.read(root, ReadOptions()).categories == [dog]
    (root / "categories.json").write_text(json.dumps([dog | {"isthing": "0"}]))
    with pytest.raises(DataError, match=r"categories\.json: dog: isthing '0': 0 or 1 expected"):
        labelme.read(root, ReadOptions())


def test_nothing_is_labelled(source, tmp_path):
    with pytest.raises(DataError, match="labelme: nothing in it is labelled with a category"):
        import_data("labelme", source(content()), tmp_path / "out", ReadOptions(), WriteOptions())


def test_a_zip(tmp_path, picture_at):
    picture = picture_at(tmp_path / "a.png")
    files = {"x/a.json": json.dumps(content(shape())).encode("utf-8-sig"), "x/a.png": picture.read_bytes()}
    summary = import_data("labelme", zipped(tmp_path / "x.zip", files), tmp_path / "out", ReadOptions(), WriteOptions())
    assert summary.pictures == 1 and (tmp_path / "out" / "x" / "a.png").is_file()


BAD = {
    "no json": (b"{", "0.json: damaged, no JSON"),
    "latin": (json.dumps(content(shape(label="größe")), ensure_ascii=False).encode("latin-1"), "no UTF-8"),
    "nothing of labelme": ({"a": 1}, "no JSON of LabelMe"),
    "shapes": (content(shapes=5), "`shapes` must be a list"),
    "label": (content({"points": TRIANGLE}), r"shapes\[0\] has no label"),
    "points": (content(shape(points=5)), r"shapes\[0\] \(dog\): points must be a list"),
    "point": (content(shape(points=[[1, 2, 3]] * 3)), r"a point must be \[x, y\]"),
    "text": (content(shape(points=[["1", "2"]] * 3)), r"a point must be \[x, y\]"),
    "nan": (json.dumps(content(shape())).replace("2.5", "NaN").encode(), "no number, or far outside"),
    "far": (content(shape(points=[[1e300, 1], [2, 2], [3, 1]])), "no number, or far outside"),
    "circle": (content(shape(kind="circle")), "a circle has 2 points, got 3"),
    "mask": (content(shape([[1, 1], [2, 2]], kind="mask", mask="AAAA")), "mask: "),
    "mask's size": (
        content(shape([[1, 1], [2, 2]], kind="mask", mask=png(np.ones((9, 2), bool)))),
        "its mask is 2x9, the points are those of 2x2 pixels",
    ),
    "no mask": (content(shape([[1, 1], [2, 2]], kind="mask")), "a mask is a PNG in base64"),
    "group": (content(shape(group_id=[1])), "group_id must be a number"),
    "size": (content(shape(), imageHeight=25), "drawn on 32x25 pixels, its picture has 32x24"),
    "zero": (content(shape(), imageHeight=0, imageWidth=0), "drawn on 0x0 pixels"),
    "gone": (content(shape(), imagePath="gone.png"), "gone.png is not there, nor in `imageData`"),
    "data": (content(shape(), imagePath="gone.png", imageData="AAA"), "base64|no picture|cannot"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(source, tmp_path, case):
    value, message = BAD[case]
    with pytest.raises(DataError, match=message):
        import_data("labelme", source(value), tmp_path / "out", ReadOptions(), WriteOptions())
    assert not (tmp_path / "out" / "train").exists() and not list(tmp_path.glob("out/annotations/*"))


def test_a_bad_file_among_others_is_named(source, tmp_path):
    root = source(content(shape()), content(shape(), imageHeight=9, imagePath="b.png"))
    with pytest.raises(DataError, match=r"1 of 2 pictures"):
        import_data("labelme", root, tmp_path / "out", ReadOptions(), WriteOptions())
    summary = import_data("labelme", root, tmp_path / "out", ReadOptions(), WriteOptions(skip_bad=True))
    assert summary.pictures == 1 and "1.json" in summary.faults[0]
