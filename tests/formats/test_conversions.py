"""A result in the hands of other libraries."""

from __future__ import annotations

import builtins
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from transformers import ImageSegmentationPipeline

from ldmseg_fast.errors import ArgumentError, PanopticFormatError
from ldmseg_fast.panoptic.coco_masks import mask_of_rle
from ldmseg_fast.panoptic.outlines import fill
from ldmseg_fast.panoptic.results import PanopticResult
from ldmseg_fast.panoptic.shapes import segment_shapes

NAMES = {1: "dog", 7: "sky"}


@pytest.fixture
def result() -> PanopticResult:
    ids = np.zeros((20, 30), np.int32)
    ids[2:12, 3:15] = 5
    ids[5:8, 6:9] = 0  # a hole
    ids[15:, :] = 70_000
    ids[0, 29] = 70_000  # another piece
    categories = {5: (1, True, 0.75), 70_000: (7, False, 0.5)}
    segments = [
        {**shape, "category_id": category, "isthing": isthing, "iscrowd": 0, "score": score, "label_id": category}
        for shape in segment_shapes(ids)
        for category, isthing, score in [categories[shape["id"]]]
    ]
    return PanopticResult(ids, segments)


@pytest.fixture
def empty() -> PanopticResult:
    return PanopticResult(np.zeros((4, 6), np.int32), [])


def test_coco(result, empty):
    annotation = result.to_coco(9, "9.png")
    assert annotation["image_id"] == 9 and annotation["file_name"] == "9.png"
    assert annotation["segments_info"][0] == {
        "id": 5, "category_id": 1, "iscrowd": 0, "area": 111, "bbox": [3, 2, 12, 10], "score": 0.75
    }  # fmt: skip
    instances = result.to_coco_instances("a")
    for instance, segment in zip(instances, result.segments_info):
        assert instance["image_id"] == "a" and instance["category_id"] == segment["category_id"]
        mask = mask_of_rle(instance["segmentation"], "here")
        np.testing.assert_array_equal(mask, result.segmentation == segment["id"])
    assert empty.to_coco(1, "1.png")["segments_info"] == empty.to_coco_instances(1) == []


def test_transformers_pipeline_gives_the_same(result):
    """Its own code makes the list of the same map and segments."""
    outputs = {"segmentation": torch.from_numpy(result.segmentation), "segments_info": result.segments_info}
    pipe = ImageSegmentationPipeline.__new__(ImageSegmentationPipeline)
    pipe.image_processor = types.SimpleNamespace(post_process_panoptic_segmentation=lambda *_, **__: [outputs])
    pipe.model = types.SimpleNamespace(config=types.SimpleNamespace(id2label=NAMES))
    expected = pipe.postprocess({"target_size": None})
    found = result.to_transformers(NAMES)
    assert [sorted(each) for each in found] == [sorted(each) for each in expected]
    for one, other in zip(found, expected):
        assert (one["score"], one["label"], one["mask"].mode) == (other["score"], other["label"], other["mask"].mode)
        np.testing.assert_array_equal(np.asarray(one["mask"]), np.asarray(other["mask"]))


@pytest.mark.parametrize(
    "call", ["to_coco", "to_coco_instances", "to_transformers", "to_labelme", "to_label_studio", "to_geojson"]
)
def test_lists_that_are_not_the_maps(result, call):
    arguments = {"to_coco": (1, "1.png"), "to_coco_instances": (1,), "to_labelme": ("a",), "to_label_studio": ("a",)}
    result.segmentation[result.segmentation == 5] = 6
    with pytest.raises(PanopticFormatError, match=r"once in segments_info: \[5, 6\]"):
        getattr(result, call)(*arguments.get(call, ()))


def test_shapes_are_two(result):
    with pytest.raises(ArgumentError, match="shape='circle': 'rle' or 'polygon' expected"):
        result.to_labelme("a.jpg", shape="circle")


def test_names_have_a_default(result):
    assert [each["label"] for each in result.to_transformers()] == ["object", "category 7"]
    assert [each["label"] for each in result.to_transformers({7: "sky"})] == ["object", "sky"]
    result.segments_info[0]["name"] = "cat"
    assert [each["label"] for each in result.to_transformers({7: "sky"})] == ["cat", "sky"]
    assert [shape["label"] for shape in result.to_labelme("a.jpg")["shapes"]] == ["cat", "category 7"]


class Held:
    """Stands for a class of another library: what it was made with."""

    def __init__(self, **arguments):
        self.__dict__ = arguments


def test_supervision(result, empty, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", types.SimpleNamespace(Detections=Held))
    found = result.to_supervision(NAMES)
    assert found.xyxy.dtype == np.float32 and found.xyxy.tolist() == [[3, 2, 14, 11], [0, 0, 29, 19]]
    assert found.mask.dtype == bool and found.mask.shape == (2, 20, 30)
    for mask, segment in zip(found.mask, result.segments_info):
        np.testing.assert_array_equal(mask, result.segmentation == segment["id"])
    assert found.class_id.tolist() == [1, 7] and found.confidence.tolist() == [0.75, 0.5]
    assert found.data["class_name"].tolist() == ["dog", "sky"]
    assert found.data["segment_id"].tolist() == [5, 70_000] and found.data["isthing"].tolist() == [True, False]
    found = empty.to_supervision()
    assert found.xyxy.shape == (0, 4) and found.mask.shape == (0, 4, 6) and found.class_id.shape == (0,)


def test_fiftyone(result, empty, monkeypatch):
    monkeypatch.setitem(sys.modules, "fiftyone", types.SimpleNamespace(Detection=Held, Detections=Held))
    for detection, segment in zip(result.to_fiftyone(NAMES).detections, result.segments_info):
        x, y, w, h = (part * side for part, side in zip(detection.bounding_box, (30, 20, 30, 20)))
        ids = np.zeros((20, 30), bool)
        ids[round(y) : round(y + h), round(x) : round(x + w)] = detection.mask
        np.testing.assert_array_equal(ids, result.segmentation == segment["id"])
        assert detection.label == NAMES[segment["category_id"]] and detection.confidence == segment["score"]
        assert detection.segment_id == segment["id"] and detection.isthing == segment["isthing"]
    assert empty.to_fiftyone().detections == []


@pytest.mark.parametrize("library", ["supervision", "fiftyone"])
def test_a_missing_library_is_named(result, monkeypatch, library):
    real = builtins.__import__

    def refuse(name, *arguments, **named):
        if name.partition(".")[0] == library:
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments, **named)

    monkeypatch.delitem(sys.modules, library, raising=False)
    monkeypatch.setattr("importlib.import_module", lambda name: refuse(name))
    with pytest.raises(ArgumentError, match=rf"to_{library} needs {library}.*pip install 'ldmseg_fast\[{library}\]'"):
        getattr(result, f"to_{library}")()


def test_labelme_and_label_studio(result):
    content = result.to_labelme("a.jpg", NAMES)
    assert (content["imagePath"], content["imageHeight"], content["imageWidth"]) == ("a.jpg", 20, 30)
    assert [(shape["label"], shape["flags"]["stuff"]) for shape in content["shapes"]] == [("dog", False), ("sky", True)]
    task = result.to_label_studio("https://pictures/a.jpg", NAMES, shape="polygon")
    assert task["data"] == {"image": "https://pictures/a.jpg"}
    (prediction,) = task["predictions"]
    assert [each["value"]["polygonlabels"] for each in prediction["result"]] == [["dog"], ["sky"], ["sky"]]


def test_geojson_has_the_pixels(result):
    collection = result.to_geojson("a.jpg", NAMES)
    assert collection["image"] == {"file_name": "a.jpg", "height": 20, "width": 30}
    for feature, segment in zip(collection["features"], result.segments_info):
        rings = [np.array(ring) for polygon in feature["geometry"]["coordinates"] for ring in polygon]
        np.testing.assert_array_equal(fill(rings, 20, 30), result.segmentation == segment["id"])
        assert feature["properties"]["area"] == segment["area"] and feature["properties"]["score"] == segment["score"]
        assert feature["properties"]["classification"]["name"] == NAMES[segment["category_id"]]


def test_a_result_imports_nothing_of_it():
    code = "import sys; from ldmseg_fast.panoptic.results import PanopticResult; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"supervision", "fiftyone", "ldmseg_fast.formats.conversions"} & set(loaded)
