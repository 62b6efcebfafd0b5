"""The strict reader of annotations: what is taken, what is refused and in which words, and that C++ agrees."""

import codecs
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldmseg_fast.errors import PanopticFormatError
from ldmseg_fast.metrics.annotation_index import index_annotations
from ldmseg_fast.native import _C
from ldmseg_fast.panoptic import annotations
from ldmseg_fast.panoptic.annotations import check_panoptic_json, load_panoptic_json, stream_panoptic_json

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def content() -> dict[str, Any]:
    segments = [
        {"id": 7, "category_id": 1, "iscrowd": 0, "area": 30, "bbox": [0, 0, 5, 6]},
        {"id": 2**24 - 1, "category_id": 5, "iscrowd": 1, "area": 12, "bbox": [0, 0, 3, 4]},
    ]
    return {
        "images": [{"id": 12, "file_name": "a.jpg", "height": 6, "width": 7}],
        "annotations": [{"image_id": 12, "file_name": "a.png", "segments_info": segments}],
        "categories": [{"id": 1, "name": "cup", "isthing": 1}, {"id": 5, "name": "desk", "isthing": 0}],
    }


def segment(**values: Any) -> Change:
    return lambda content: content["annotations"][0]["segments_info"][0].update(values)


def image(**values: Any) -> Change:
    return lambda content: content["images"][0].update(values)


def annotation(**values: Any) -> Change:
    return lambda content: content["annotations"][0].update(values)


def category(**values: Any) -> Change:
    return lambda content: content["categories"][0].update(values)


def other_id(value: Any) -> Change:
    return lambda content: (image(id=value)(content), annotation(image_id=value)(content))


def write(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "panoptic_val.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (segment(iscrowd="0"), "iscrowd that is not 0 or 1", "image 12: segment 7: `iscrowd` must be 0 or 1, got '0'"),
        (segment(iscrowd="false"), "iscrowd that is not 0 or 1", "got 'false'; write it as a number, without quotes"),
        (segment(iscrowd=None), "iscrowd that is not 0 or 1", "got None; give its number, or leave the key out"),
        (segment(iscrowd=2), "iscrowd that is not 0 or 1", "got 2"),
        (segment(iscrowd=-1), "iscrowd that is not 0 or 1", "got -1"),
        (segment(iscrowd=0.5), "iscrowd that is not 0 or 1", "got 0.5"),
        (segment(iscrowd=float("nan")), "iscrowd that is not 0 or 1", "got nan"),
        (segment(iscrowd=[]), "iscrowd that is not 0 or 1", r"got \[\]"),
        (segment(id="7"), "segment id outside 1..2^24-1", "an integer in 1..16777215, got '7'"),
        (segment(id=7.0), "segment id outside 1..2^24-1", "got 7.0"),
        (segment(id=True), "segment id outside 1..2^24-1", "got True"),
        (segment(id=2**24), "segment id outside 1..2^24-1", "got 16777216; renumber it"),
        (segment(category_id="1"), "unknown category id", "segment 7 has unknown category_id '1'; write it as a"),
        (segment(category_id=1.0), "unknown category id", "unknown category_id 1.0"),
        (segment(category_id=True), "unknown category id", "unknown category_id True"),
        (segment(category_id=2**40), "unknown category id", "unknown category_id 1099511627776; give it one of"),
        (segment(area="30"), "area that is no number of pixels", "segment 7: `area` must be a whole number of pixels"),
        (segment(area=None), "area that is no number of pixels", "got None"),
        (segment(area=30.5), "area that is no number of pixels", "got 30.5"),
        (segment(area=-1), "area that is no number of pixels", "got -1"),
        (segment(area=2**40), "area that is no number of pixels", "got 1099511627776"),
        (segment(area=float("inf")), "area that is no number of pixels", "got inf"),
        (image(height="6"), "size that is no number of pixels", "image 12: `height` must be a whole number of pixels"),
        (image(width=None), "size that is no number of pixels", "`width` must be .* got None"),
        (image(width=0), "size that is no number of pixels", "got 0"),
        (image(width=6.5), "size that is no number of pixels", "got 6.5"),
        (image(file_name=None), "image without file name", "image 12 has no file_name of a picture, got None"),
        (image(file_name="a\0.jpg"), "image without file name", "has no file_name"),
        (image(file_name="\ud800.jpg"), "image without file name", "has no file_name"),
        (lambda c: c["images"][0].pop("file_name"), "image without file name", "has no file_name"),
        (annotation(file_name=5), "incomplete annotation", "`file_name` must name a PNG, got 5"),
        (annotation(image_id="12"), "annotation without image", "does not list: '12'; there it is 12: write both"),
        (other_id(12.0), "image id that is no number or text", r"images\[0\] has no usable `id` \(got 12.0\)"),
        (other_id(None), "image id that is no number or text", "got None"),
        (other_id(""), "image id that is no number or text", "got ''"),
        (other_id(2**63), "image id that is no number or text", "got 9223372036854775808"),
        (other_id(True), "image id that is no number or text", "got True"),
        (category(id=2**40), "category id outside 0..2^31-1", r"categories\[0\] has no usable `id` \(got 10995116"),
        (category(id="1"), "category id outside 0..2^31-1", "got '1'"),
        (category(id=-1), "category id outside 0..2^31-1", "got -1"),
        (category(isthing="1"), "isthing that is not 0 or 1", "category 1: `isthing` must be 0 or 1, got '1'"),
        (category(isthing=None), "isthing that is not 0 or 1", "got None"),
        (category(name=None), "category name that is no text", "`name` must be a text, got None"),
        (lambda c: c.update(annotations=[]), "empty split", "the split is empty"),
        (lambda c: c.update(info={"x": [float("nan")]}), "NaN or infinity", "line 1: NaN is no JSON value"),
        (segment(bbox=float("inf")), "NaN or infinity", '"bbox": Infinity is no JSON value; write a number or'),
    ],
)
def test_what_is_refused(tmp_path: Path, content: dict[str, Any], change: Change, kind: str, message: str) -> None:
    change(content)
    path = write(tmp_path, content)
    for read in (load_panoptic_json, index_annotations):
        with pytest.raises(PanopticFormatError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)
    assert kind in {fault.kind for fault in check_panoptic_json(path)[1]}
    assert stream_panoptic_json(path) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda content: None,
        segment(iscrowd=True),
        segment(iscrowd=0.0),
        segment(area=30.0),
        segment(bbox=None, score="high"),
        lambda content: content["annotations"][0]["segments_info"][0].pop("iscrowd"),
        lambda content: content["annotations"][0]["segments_info"][0].pop("area"),
        lambda content: (content["images"][0].pop("height"), content["images"][0].pop("width")),
        image(height=6.0),
        other_id("a name"),
        other_id("städte/ä"),
        other_id(-(2**63)),
        category(isthing=True),
        category(id=0),
        category(name="Tür"),
        lambda content: [entry.pop("isthing") for entry in content["categories"]],
        lambda content: [entry.pop("name") for entry in content["categories"]],
    ],
)
def test_what_is_taken(tmp_path: Path, content: dict[str, Any], change: Change, monkeypatch) -> None:
    change(content)
    for entry in content["annotations"][0]["segments_info"][:1]:
        entry["category_id"] = content["categories"][0]["id"]
    path = write(tmp_path, content)
    assert load_panoptic_json(path) == content
    assert list(check_panoptic_json(path)[1]) == []
    fast = index_annotations(path)
    monkeypatch.setattr(annotations, "_C", None)
    assert load_panoptic_json(path) == content
    slow = index_annotations(path)
    assert fast.image_ids == slow.image_ids and fast.categories == slow.categories
    assert fast.annotation(0)[0] == slow.annotation(0)[0]
    assert fast.annotation(0)[1].tolist() == slow.annotation(0)[1].tolist()


@pytest.mark.parametrize("key", ["images", "id", "image_id", "file_name", "segments_info", "iscrowd", "area", "name"])
def test_a_key_that_is_there_twice(tmp_path: Path, content: dict[str, Any], key: str) -> None:
    text = json.dumps(content)
    place = text.index(f'"{key}"')
    path = tmp_path / "panoptic_val.json"
    path.write_text(f'{text[:place]}"{key}": 0, {text[place:]}')
    with pytest.raises(PanopticFormatError, match=f"has the key `{key}` twice; keep one"):
        load_panoptic_json(path)
    assert stream_panoptic_json(path) is None


def test_a_repeated_key_that_nothing_reads_is_taken(tmp_path: Path, content: dict[str, Any], monkeypatch) -> None:
    path = tmp_path / "panoptic_val.json"
    path.write_text(json.dumps(content).replace('"bbox"', '"note": 1, "note": 2, "bbox"'))
    assert load_panoptic_json(path)["annotations"][0]["segments_info"][0]["note"] == 2
    monkeypatch.setattr(annotations, "_C", None)
    assert load_panoptic_json(path)["annotations"][0]["segments_info"][0]["note"] == 2


def test_more_of_a_kind_are_counted(tmp_path: Path, content: dict[str, Any]) -> None:
    for entry in content["annotations"][0]["segments_info"]:
        entry["iscrowd"] = "0"
    with pytest.raises(PanopticFormatError, match=r"\(1 more of this kind\)$"):
        load_panoptic_json(write(tmp_path, content))


def test_predictions_have_the_same_rules(tmp_path: Path, content: dict[str, Any]) -> None:
    del content["images"], content["categories"]
    path = write(tmp_path, content)
    assert load_panoptic_json(path, predictions=True) == content
    assert index_annotations(path, predictions=True).annotation(0)[1][:, 3].tolist() == [-1, -1], "areas are counted"
    for change in (segment(iscrowd=None), segment(area="1"), segment(category_id=2**31), segment(category_id=-1)):
        wrong = json.loads(json.dumps(content))
        change(wrong)
        with pytest.raises(PanopticFormatError, match="image 12"):
            load_panoptic_json(write(tmp_path, wrong), predictions=True)
        with pytest.raises(PanopticFormatError, match="image 12"):
            index_annotations(path, predictions=True)


MANY = 20_000


def many_ids(content: dict[str, Any]) -> None:
    entry = content["annotations"][0]
    content["images"] = [{"id": str(number), "file_name": "a.jpg"} for number in range(MANY)]
    content["annotations"] = [entry | {"image_id": number, "segments_info": []} for number in range(MANY)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (many_ids, "annotations of images that `images` does not list: 0; there it is '0': write both alike"),
        (segment(scores=[float("nan")] * MANY), "NaN is no JSON value"),
    ],
    ids=["ids as text", "scores that are NaN"],
)
def test_many_faults_are_told_in_seconds(change: Change, message: str, content: dict[str, Any], tmp_path: Path) -> None:
    change(content)
    path = tmp_path / "panoptic_val.json"
    path.write_text(json.dumps(content))
    begun = time.process_time()
    with pytest.raises(PanopticFormatError, match=message):
        load_panoptic_json(path)
    assert time.process_time() - begun < 10


def test_a_large_object_with_a_key_twice(content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "panoptic_val.json"
    more = ", ".join(f'"key {number}": 0' for number in range(MANY))
    path.write_text(f'{{{more}, "images": [], {json.dumps(content)[1:]}')
    begun = time.process_time()
    with pytest.raises(PanopticFormatError, match="the file has the key `images` twice"):
        load_panoptic_json(path)
    assert time.process_time() - begun < 10


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "panoptic_val.json")
    for read in (load_panoptic_json, index_annotations, check_panoptic_json):
        with pytest.raises(PanopticFormatError, match=r"panoptic_val\.json: .*not a readable JSON file"):
            read(tmp_path / "panoptic_val.json")
    with pytest.raises(FileNotFoundError):
        load_panoptic_json(tmp_path / "none.json")


def test_encodings(tmp_path: Path, content: dict[str, Any]) -> None:
    path, text = tmp_path / "panoptic_val.json", json.dumps(content)
    path.write_bytes(codecs.BOM_UTF8 + text.encode())
    assert load_panoptic_json(path) == content
    for encoding, name in (("utf-16", "UTF-16"), ("utf-16-le", "UTF-16"), ("utf-32", "UTF-32")):
        path.write_bytes(text.encode(encoding))
        with pytest.raises(PanopticFormatError, match=f"{name}.*save it as UTF-8"):
            load_panoptic_json(path)
    path.write_bytes(text.replace("cup", "é").encode("latin-1"))
    with pytest.raises(PanopticFormatError, match="not a JSON file"):
        load_panoptic_json(path)


@pytest.mark.skipif(_C is None, reason="the extension is not built")
def test_plain_files_are_read_by_the_stream(tmp_path: Path, content: dict[str, Any]) -> None:
    assert stream_panoptic_json(write(tmp_path, content)) is not None
