"""Label Studio's JSON export, and tasks with predictions for it."""

from __future__ import annotations

import base64
import io
import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.commands.data_import import import_data
from ldmseg_fast.errors import DataError, UserError
from ldmseg_fast.formats import label_studio, label_studio_tasks
from ldmseg_fast.formats.brush import decode, encode
from ldmseg_fast.formats.options import ReadOptions, WriteOptions
from ldmseg_fast.formats.painting import OVERLAP
from tests.formats.drawing import CATEGORIES, annotated, data_set, noise
from tests.formats.test_trees import zipped

HEIGHT, WIDTH = 24, 32  # of `picture_at`


def region(kind: str, value: dict, label: str | None = "dog", **more) -> dict:
    labelled = {} if label is None else {f"{kind}labels": [label]}
    return {
        "id": "r1",
        "type": f"{kind}labels" if label else kind,
        "from_name": "tag",
        "to_name": "image",
        "original_width": WIDTH,
        "original_height": HEIGHT,
        "image_rotation": 0,
        "value": value | labelled,
        **more,
    }


def rectangle(x=25.0, y=50.0, width=50.0, height=25.0, **more):
    return region("rectangle", {"x": x, "y": y, "width": width, "height": height, "rotation": 0}, **more)


def task(*regions: dict, image="/data/upload/1/0123abcd-a.png", **more) -> dict:
    annotation = {"id": 1001, "result": list(regions), "was_cancelled": False, "ground_truth": False}
    return {"id": 1, "data": {"image": image}, "annotations": [annotation], "predictions": [], **more}


def data_url(values: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture
def source(tmp_path, picture_at):
    def make(*tasks, name="project-3-at-2026-05-01-10-00-abcdef12.json"):
        root = tmp_path / "studio"
        picture_at(root / "images" / "a.png")
        (root / name).write_text(json.dumps(list(tasks)))
        return root

    return make


def only_map(root, **options):
    read = label_studio.read(root, ReadOptions(**options))
    ((entry,),) = read.splits.values()
    return entry.read(), read


def test_all_kinds_of_regions(source):
    brushed = np.zeros((HEIGHT, WIDTH), bool)
    brushed[20:, 3:9] = True
    points = [[0.0, 0.0], [25.0, 0.0], [25.0, 25.0], [0.0, 25.0]]
    found, read = only_map(
        source(
            task(
                rectangle(),
                region("brush", {"format": "rle", "rle": encode(brushed)}, "größe"),
                region("polygon", {"points": points, "closed": True}),
                region("polygon", {"points": points[:2]}),
                region("ellipse", {"x": 80, "y": 20, "radiusX": 5, "radiusY": 5, "rotation": 0}, "cat"),
                region("keypoint", {"x": 1, "y": 1, "width": 0.4}),
                region("brush", {"format": "rle", "rle": encode(brushed)}, None, id="own"),
                region("labels", {"labels": ["cat"]}, None, id="own"),
                region("rectangle", {"x": 1, "y": 1, "width": 5, "height": 5}, None, id="bare"),
                {"id": "c", "type": "choices", "value": {"choices": ["night"]}, "from_name": "x", "to_name": "image"},
            )
        )
    )
    assert [each["name"] for each in read.categories] == ["cat", "dog", "größe"]
    expected = np.zeros((HEIGHT, WIDTH), int)
    expected[12:18, 8:24] = 1
    expected[:6, :8] = 2
    assert (found.ids[:, :24] == np.where(brushed, found.ids[22, 4], expected)[:, :24]).all()
    assert len(found.segments) == 4  # what was brushed first is wholly covered
    assert found.left_out[label_studio_tasks.NO_AREA] == found.left_out[label_studio_tasks.NO_LABEL] == 1
    assert found.left_out[label_studio_tasks.SHORT] == 1 and found.left_out[OVERLAP] == brushed.sum()
    assert list(read.splits) == ["train"]


def test_the_last_annotation_that_counts(source):
    first, second, third = rectangle(), rectangle(0, 0, 25, 25, label="cat"), rectangle(label="cow")
    many = task()
    many["annotations"] = [
        {"id": 1, "result": [first]},
        {"id": 2, "result": [second]},
        {"id": 3, "result": [third], "was_cancelled": True},
    ]
    undone = task(id=2) | {"annotations": []}
    found, read = only_map(source(many, undone))
    assert [each["name"] for each in read.categories] == ["cat"] and (found.ids > 0).sum() == 48
    assert read.left_out == {label_studio_tasks.EARLIER: 1, label_studio.UNDONE: 1}
    many["annotations"][0]["ground_truth"] = True
    assert [each["name"] for each in only_map(source(many, undone))[1].categories] == ["dog"]


def test_bitmasks_and_several_labels(source):
    drawn = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    drawn[3:7, 4:9, 3] = 255
    found, _ = only_map(
        source(task(region("bitmask", {"imageDataURL": data_url(drawn), "bitmasklabels": ["dog", "old"]}, None)))
    )
    np.testing.assert_array_equal(found.ids > 0, drawn[..., 3] > 0)
    assert found.left_out == {label_studio_tasks.MORE_LABELS: 1}


def test_what_is_turned_is_turned_in_pixels(source):
    """A rectangle about its upper left corner, an ellipse about its centre; 90 degrees are clockwise."""
    value = {"x": 50, "y": 25, "width": 25, "height": 50, "rotation": 90}  # 8x12 pixels at 16, 6
    found, _ = only_map(source(task(region("rectangle", value))))
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[6:14, 4:16] = True
    np.testing.assert_array_equal(found.ids > 0, expected)
    value = {"x": 50, "y": 50, "radiusX": 25, "radiusY": 12.5, "rotation": 90}  # 8 and 3 pixels
    found, _ = only_map(source(task(region("ellipse", value))))
    rows, columns = (np.flatnonzero((found.ids > 0).any(axis)) for axis in (1, 0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (4, 19, 13, 18)


def test_a_label_goes_before_a_choice_and_belongs_to_its_region(source):
    bare = {"x": 1, "y": 1, "width": 9, "height": 9}
    regions = [
        region("rectangle", bare, None),
        region("choices", {"choices": ["blurred"]}, None),
        region("labels", {"labels": ["cat"]}, None),
        region("rectangle", bare, None, id=None),
        rectangle(id=None),
    ]
    found, read = only_map(source(task(*regions)))
    assert [each["name"] for each in read.categories] == ["cat", "dog"]
    assert found.left_out == {label_studio_tasks.NO_LABEL: 1}
    regions = [region("rectangle", bare, None), region("choices", {"choices": ["blurred"]}, None)]
    assert only_map(source(task(*regions)))[1].categories[0]["name"] == "blurred"


def test_a_score_that_no_float_holds_is_none(source):
    text = json.dumps(task(rectangle(score=5))).replace('"score": 5', '"score": ' + "9" * 400)
    found, _ = only_map(source(json.loads(text)))
    assert "score" not in found.segments[0]


def test_predictions_are_asked_for(source):
    predicted = task(predictions=[{"model_version": "x", "score": 0.5, "result": [rectangle(score=0.25)]}])
    predicted["annotations"] = []
    root = source(predicted)
    with pytest.raises(DataError, match="1 tasks have no annotations"):
        label_studio.read(root, ReadOptions())
    assert only_map(root, version="predictions")[0].segments[0]["score"] == 0.25
    with pytest.raises(UserError, match="--version drafts"):
        label_studio.read(root, ReadOptions(version="drafts"))


def test_a_picture_has_the_ending_of_one(source):
    root = source(task(rectangle()) | {"data": {"text": "Hello. You", "version": "v1.2", "photo": "s3://b/a.png"}})
    assert len(only_map(root)[0].segments) == 1


@pytest.mark.parametrize(
    "address",
    [
        "/data/upload/1/0123abcd-a.png",
        "/data/local-files/?d=studio/images/a.png",
        "/data/local-files/?d=images%2Fa.png",
        "s3://bucket/far/a.png",
        "https://example.com/x/a.png?token=1",
        "C:\\me\\images\\a.png",
        "a.png",
    ],
)
def test_pictures_are_found_by_their_address(source, tmp_path, address):
    summary = import_data(
        "label-studio", source(task(rectangle(), image=address)), tmp_path / "out", ReadOptions(), WriteOptions()
    )
    assert summary.segments == 1 and (tmp_path / "out" / "train" / "a.png").is_file()


def test_a_zip_and_a_picture_within_the_task(tmp_path, picture_at, imported):
    path = picture_at(tmp_path / "a.png")
    inline = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    tasks = [task(rectangle(), image=inline), task(rectangle(), image="a.png", id=2)]
    files = {"mine.json": json.dumps(tasks).encode("utf-8-sig"), "a.png": path.read_bytes(), "notes.json": b"{}"}
    source = zipped(tmp_path / "x.zip", files)
    summary = import_data("label-studio", source, tmp_path / "out", ReadOptions(), WriteOptions())
    assert summary.pictures == 2 and summary.left_out == {"JSONs of other kinds": 1}
    assert set(imported(tmp_path / "out", "mine")) == {"a.png", "task-1.png", "categories"}


@pytest.mark.parametrize("shape", ["rle", "polygon"])
def test_what_is_written(tmp_path, shape):
    """Tasks, as the guide shows predictions, and a labelling interface that has their names."""
    each = annotated(noise(4, 20, 30), 4, scores=True)
    out = tmp_path / "out"
    out.mkdir()
    maps = {"deep/ä b.png": each, "void.png": annotated(np.zeros((4, 5), int))}
    label_studio.write(data_set(tmp_path / "pictures", maps), out, WriteOptions(shape=shape))
    first, second = json.loads((out / "val.json").read_text())
    assert second == {"data": {"image": "/data/local-files/?d=val/void.png"}, "predictions": []}
    assert first["data"] == {"image": "/data/local-files/?d=val/deep/%C3%A4%20b.png"}
    assert (out / "val" / "deep" / "ä b.png").is_file()
    (prediction,) = first["predictions"]
    assert prediction["score"] == pytest.approx(np.mean([segment["score"] for segment in each.segments]))
    interface = ElementTree.fromstring((out / "labels.xml").read_text())
    (labels,) = interface.iter("BrushLabels" if shape == "rle" else "PolygonLabels")
    assert [label.get("value") for label in labels] == [category["name"] for category in CATEGORIES]
    assert len({result["id"] for result in prediction["result"]}) == len(prediction["result"])
    for result in prediction["result"]:
        assert (
            (result["from_name"], result["to_name"]) == (labels.get("name"), labels.get("toName")) == ("label", "image")
        )
        assert (result["original_width"], result["original_height"], result["image_rotation"]) == (30, 20, 0)
        number = int(result["id"].split("-")[0])
        assert result["score"] in [segment["score"] for segment in each.segments if segment["id"] == number]
        if shape == "rle":
            mask = decode(result["value"]["rle"], 20, 30, "x")
            np.testing.assert_array_equal(mask, each.ids == number)
        else:
            assert np.max(result["value"]["points"]) <= 100


SQUARE = [[0, 0], [25, 0], [25, 25]]
BAD = {
    "no json": ("[", "damaged, no JSON"),
    "min": ([{"image": "a.png", "tag": []}], "no annotated task"),
    "annotations": ([task() | {"annotations": 5}], "annotations must be a list"),
    "result": ([task() | {"annotations": [{"result": 5}]}], "result must be a list of regions"),
    "value": ([task(rectangle() | {"value": 5})], "value must be an object"),
    "no picture": ([task(rectangle(), image=5)], "no picture in its data"),
    "gone": ([task(rectangle(), image="gone.png")], "gone.png: No such file|gone.png: no such"),
    "size": ([task(rectangle(original_width=31))], "drawn on 31x24 pixels, its picture has 32x24"),
    "no size": ([task(rectangle(original_width=None))], "drawn on Nonex24"),
    "turned": ([task(rectangle(image_rotation=90))], "a picture turned by 90"),
    "no address": ([task(rectangle(), image="http://[a/b.png")], "no picture in its data"),
    "bitmask": ([task(region("bitmask", {"imageDataURL": "x"}))], "a PNG as a data URL"),
    "opaque": ([task(region("bitmask", {"imageDataURL": data_url(np.zeros((24, 32, 3)))}))], "without transparency"),
    "small": ([task(region("bitmask", {"imageDataURL": data_url(np.zeros((2, 3, 4)))}))], "is 3x2, its picture 32x24"),
    "nan": (json.dumps([task(rectangle())]).replace("50.0", "NaN"), "a coordinate is no number"),
    "huge": (json.dumps([task(rectangle())]).replace("50.0", "9" * 400), "a coordinate is no number"),
    "text": ([task(rectangle(x="1"))], "a coordinate is no number"),
    "points": ([task(region("polygon", {"points": [1, 2, 3]}))], "points must be a list"),
    "infinite": (json.dumps([task(region("polygon", {"points": SQUARE}))]).replace("25", "1e999"), "no number"),
    "rle": ([task(region("brush", {"rle": [1, 2]}))], "the rle ends early"),
    "other picture": ([task(region("brush", {"rle": encode(np.ones((3, 4), bool))}))], "has 48 values"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(source, tmp_path, case):
    value, message = BAD[case]
    root = source(name="mine.json")
    (root / "mine.json").write_text(value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(UserError, match=message):
        import_data("label-studio", root, tmp_path / "out", ReadOptions(), WriteOptions())
    assert not (tmp_path / "out" / "mine").exists()
    with pytest.raises(UserError):
        import_data("label-studio", root / "mine.json", tmp_path / "out", ReadOptions(), WriteOptions())
