"""A file of a tool in which one value is anything else is read, or refused in one line, never with a traceback."""

from __future__ import annotations

import copy
import importlib
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ldmseg_fast.errors import UserError
from ldmseg_fast.formats.brush import encode
from ldmseg_fast.formats.kinds import KINDS
from ldmseg_fast.formats.options import ReadOptions
from ldmseg_fast.panoptic.coco_masks import rle_of_mask
from tests.formats import test_coco_instances as coco
from tests.formats import test_cvat as cvat
from tests.formats import test_label_studio as studio
from tests.formats import test_labelme as labelme

MASK = np.zeros((24, 32), bool)
MASK[3:9, 4:20] = True
RLE = {"size": [24, 32], "counts": [5, 7, 756]}
FILES = {
    "coco-instances": (
        "annotations/instances_val.json",
        coco.content(
            {"segmentation": [coco.SQUARE], "iscrowd": 0, "score": 0.5},
            {"segmentation": RLE, "iscrowd": 1},
            {"segmentation": rle_of_mask(MASK)},
        ),
    ),
    "roboflow": ("_annotations.coco.json", coco.roboflow_content({"segmentation": [coco.SQUARE], "category_id": 2})),
    "labelme": (
        "a.json",
        labelme.content(
            labelme.shape(group_id=3),
            labelme.shape([[2, 2], [4, 4]], kind="circle", flags={"stuff": True}),
            labelme.shape([[28, 20], [29, 21]], "dog", "mask", mask=labelme.png(np.ones((2, 2), bool))),
        ),
    ),
    "label-studio": (
        "mine.json",
        [
            studio.task(
                studio.rectangle(score=0.5),
                studio.region("brush", {"format": "rle", "rle": encode(MASK)}),
                studio.region("polygon", {"points": [[0, 0], [25, 0], [25, 25]]}),
                studio.region("ellipse", {"x": 80, "y": 20, "radiusX": 5, "radiusY": 5, "rotation": 0}),
                studio.region("labels", {"labels": ["cat"]}, None),
            )
        ],
    ),
}
VALUES = (
    *(None, True, 0, -1, 7, 2**31, 2**64, -1e308, 0.5, float("nan"), float("inf"), "", "x", "..", "\0", "ä\ud800"),
    *([], {}, [None], ["x"], [[]], [{}], [1, 2, 3], {"x": []}, {"size": 5}, [[[1, 2], [3]]]),
)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value[:6]) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*path, key))


def changed(value: Any, path: tuple, new: Any) -> Any:
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = copy.deepcopy(new)
    return value


def read_all(kind: str, root: Any) -> str:
    """What became of it: "read", or the error."""
    module = importlib.import_module(f"ldmseg_fast.formats.{KINDS[kind].module}")
    try:
        data_set = module.read(root, ReadOptions())
        for entries in data_set.splits.values():
            for entry in entries:
                found = entry.read()
                assert found.ids.dtype == np.int32 and found.ids.ndim == 2
                assert [each["id"] for each in found.segments] == [int(i) for i in np.unique(found.ids) if i]
                assert {each["category_id"] for each in found.segments} <= {each["id"] for each in data_set.categories}
                json.dumps(found.segments, allow_nan=False)
        return "read"
    except UserError as error:
        assert len(str(error)) < 1500 and "\n" not in str(error), str(error)
        return str(error)


@pytest.mark.parametrize("kind", FILES)
def test_any_value_anywhere(tmp_path, picture_at, kind):
    name, content = FILES[kind]
    picture_at(tmp_path / "a.png")
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    assert read_all(kind, tmp_path) == "read"
    rng = random.Random(0)
    cases = [(place, value) for place in places(content) for value in VALUES]
    results = set()
    for place, value in rng.sample(cases, min(len(cases), 150)):
        path.write_text(json.dumps(changed(content, place, value)))
        try:
            results.add(read_all(kind, tmp_path))
        except Exception as error:
            raise AssertionError(f"{place} = {value!r}: {type(error).__name__}: {error}") from error
    assert len(results) > 10


@pytest.mark.parametrize("kind", FILES)
def test_a_missing_key(tmp_path, picture_at, kind):
    name, content = FILES[kind]
    picture_at(tmp_path / "a.png")
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for place in places(content):
        value = copy.deepcopy(content)
        inner = value
        for key in place[:-1]:
            inner = inner[key]
        del inner[place[-1]]
        path.write_text(json.dumps(value))
        try:
            read_all(kind, tmp_path)
        except Exception as error:
            raise AssertionError(f"without {place}: {type(error).__name__}: {error}") from error


def test_any_attribute_of_cvats_xml(tmp_path, picture_at):
    picture_at(tmp_path / "images" / "deep" / "a.png")
    text = cvat.XML.replace("{shapes}", cvat.SHAPES).replace("{subset}", "")
    parts = text.split('"')
    for place in range(3, len(parts), 2):
        for value in ("", "x", "-1", "nan", "1e999", "99999999999999999999", "1,2;3", "..", "3"):
            changed_text = '"'.join([*parts[:place], value, *parts[place + 1 :]])
            (tmp_path / "annotations.xml").write_text(changed_text)
            try:
                read_all("cvat", tmp_path)
            except Exception as error:
                where = parts[place - 1].split()[-1:]
                raise AssertionError(f"{where} = {value!r}: {type(error).__name__}: {error}") from error
