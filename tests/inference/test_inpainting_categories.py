"""Completing maps with a model that knows categories."""

import json

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.cli import main
from ldmseg_fast.commands.partial_maps import read_segments
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.config.categories import Category, CategoryTable
from ldmseg_fast.errors import ArgumentError, DataError
from ldmseg_fast.inference.given_maps import complete, prepare
from ldmseg_fast.panoptic.format import write_panoptic_png
from ldmseg_fast.panoptic.results import PanopticResult

OPEN = PostprocessConfig(mask_threshold=0.0, count_threshold=1, overlap_threshold=0.0)
TABLE = CategoryTable((Category(30, "sky", False, (0, 0, 0)), Category(10, "cat", True, (1, 1, 1))))


@pytest.fixture(scope="module")
def pipe(category_model):
    return LDMSegPipeline.from_pretrained(category_model)


def scene():
    ids = np.zeros((64, 64), np.int32)
    ids[:, :32], ids[:32, 32:] = 900, 5
    known = np.zeros((64, 64), bool)
    known[:48] = True
    return np.full((64, 64, 3), 90, np.uint8), ids, known


@pytest.mark.parametrize("edges", [0, 2])
@pytest.mark.parametrize("method", ["pixels", "estimate", "renoise"])
def test_given_segments_keep_their_category(pipe, method, edges):
    picture, ids, known = scene()
    given = [{"id": 900, "category_id": 14}, {"id": 5, "category_id": 3}]
    settings = {"num_inference_steps": 2, "method": method, "thresholds": OPEN, "edges": edges}
    result = pipe.inpaint(picture, ids, known, segments_info=[given], **settings)[0]
    assert np.array_equal(result.segmentation[known], ids[known])
    found = {segment["id"]: segment for segment in result.segments_info}
    for entry, name, isthing in zip(given, ("sky", "beetle"), (False, True)):
        segment = found[entry["id"]]
        assert segment["given"] and segment["category_id"] == segment["label_id"] == entry["category_id"]
        assert (segment["name"], segment["isthing"], segment["category_score"]) == (name, isthing, 1.0)
    for segment in found.values():
        assert segment["name"] and 1 <= segment["category_id"] <= 19


@pytest.mark.parametrize("draft_steps", [0, 1])
def test_without_word_of_them_the_model_finds_the_categories(pipe, draft_steps):
    picture, ids, known = scene()
    result = pipe.inpaint(picture, ids, known, num_inference_steps=1, draft_steps=draft_steps, thresholds=OPEN)[0]
    for segment in result.segments_info:
        assert draft_steps == 0 or segment["name"]
        assert 0 <= segment["category_id"] <= 19


def test_predicted_stuff_joins_the_given_stuff_of_its_category():
    known = np.zeros((4, 8), bool)
    known[:, :2] = True
    given_ids = np.where(known, 70, 0)
    given = prepare(given_ids, known, 8, 32, "position", np.random.default_rng(0), known_categories={70: 1})
    given.ids.clear()  # the model has other slots for it
    predicted = np.zeros((4, 8), np.int32)
    predicted[:, 4:6], predicted[:, 6:] = 9, 11
    entries = [
        {"id": 9, "category_id": 30, "name": "sky", "isthing": False},
        {"id": 11, "category_id": 10, "name": "cat", "isthing": True},
    ]
    entries = [entry | {"area": 8, "score": 0.5, "category_score": 0.25} for entry in entries]
    result = complete(PanopticResult(predicted, entries), given, 1, TABLE)
    assert result.segmentation[0].tolist() == [70, 70, 0, 0, 70, 70, 1, 1]
    sky, cat = sorted(result.segments_info, key=lambda segment: -segment["id"])
    assert (sky["name"], sky["category_score"], sky["area"], sky["given"]) == ("sky", 1.0, 16, True)
    assert (cat["name"], cat["category_score"], cat["given"]) == ("cat", 0.25, False)


def test_stuff_does_not_join_a_given_thing_that_looks_like_it():
    """The slot of the given cat is called sky: what is sky elsewhere stays sky, in one piece."""
    known = np.zeros((4, 8), bool)
    known[:, :2] = True
    slots = np.full((8, 8), 8)
    given = prepare(
        np.where(known, 70, 0), known, 8, 32, "position", np.random.default_rng(0),
        draft=slots, known_categories={70: 2},
    )  # fmt: skip
    predicted = np.full((4, 8), 9, np.int32)
    predicted[:, 4], predicted[:, 5], predicted[:, 6:] = 5, 7, 9
    predicted[3, 7] = 0
    entries = [{"id": i, "category_id": 30, "name": "sky", "isthing": False, "area": n} for i, n in ((5, 4), (7, 4))]
    entries.append({"id": 9, "category_id": 30, "name": "sky", "isthing": False, "area": 23})
    entries = [entry | {"score": 0.5, "category_score": 0.25} for entry in entries]
    result = complete(PanopticResult(predicted, entries), given, 5, TABLE)
    assert result.segmentation.tolist() == [[70] * 4 + [1] * 2 + [70] * 2] * 3 + [[70] * 4 + [1] * 2 + [70, 0]]
    sky, cat = result.segments_info
    assert (sky["id"], sky["name"], sky["was_fused"], sky["area"]) == (1, "sky", True, 8)
    assert (cat["id"], cat["name"], cat["was_fused"], cat["category_score"]) == (70, "cat", False, 1.0)


def test_command_keeps_a_category_0(tmp_path):
    entries = [{"id": 1, "category_id": 0}, {"id": 2, "category_id": 0, "category_score": 0.0}, {"id": 3}]
    (tmp_path / "map.json").write_text(json.dumps({"segments_info": entries}))
    assert read_segments(tmp_path / "map.json") == entries[:1]


def test_command_refuses_segments_of_two_categories(tmp_path):
    (tmp_path / "map.json").write_text('{"segments_info": [{"id": 1, "category_id": 2, "category_id": 3}]}')
    with pytest.raises(DataError, match=r"map\.json: not readable as JSON \(category_id is there twice"):
        read_segments(tmp_path / "map.json")


@pytest.mark.parametrize(
    ("segments_info", "message"),
    [
        (5, "a list of entries for each image"),
        ([5], "a list of entries for each image"),
        ([[{"id": 900, "category_id": [1]}]], "'category_id': [1]"),
        ([], "of 0 images, 1 are given"),
        ([[{"id": 900, "category_id": 77}]], "'category_id': 77"),
        ([[{"id": 900}]], "an id and a category_id"),
        ([[{"id": "900", "category_id": 1}]], "an id and a category_id"),
    ],
)
def test_wrong_categories_are_one_error(pipe, segments_info, message):
    with pytest.raises(ArgumentError) as raised:
        pipe.inpaint(*scene(), segments_info=segments_info)
    assert message in str(raised.value)


def test_models_without_categories_take_none(model_dir):
    with pytest.raises(ArgumentError, match="this model has no categories"):
        LDMSegPipeline.from_pretrained(model_dir).inpaint(*scene(), segments_info=[[]])


def test_command_takes_the_categories_of_a_result(category_model, tmp_path, capsys):
    picture, ids, known = scene()
    Image.fromarray(picture).save(tmp_path / "a.png")
    write_panoptic_png(tmp_path / "map.png", np.where(known, ids, 1234))
    (tmp_path / "map.json").write_text(json.dumps({"segments_info": [{"id": 900, "category_id": 14}]}))
    command = ["inpaint", str(category_model), "--image", str(tmp_path / "a.png"), "--map", str(tmp_path / "map.png")]
    command += ["--unknown-id", "1234", "--steps", "1", "--out", str(tmp_path / "out")]
    assert main([*command, "--segments", str(tmp_path / "map.json")]) == 0
    record = json.loads((tmp_path / "out" / "a.json").read_text())
    assert {s["id"]: s.get("name") for s in record["segments_info"]}[900] == "sky"
    (tmp_path / "map.json").write_text(json.dumps({"segments_info": [{"id": 900, "category_id": 99}]}))
    assert main([*command, "--segments", str(tmp_path / "map.json")]) == 2
    assert f"error: {tmp_path}/map.json: segments_info[0]: " in capsys.readouterr().err
    (tmp_path / "map.json").write_text("[]")
    assert main([*command, "--segments", str(tmp_path / "map.json")]) == 2
    assert "segments_info" in capsys.readouterr().err
