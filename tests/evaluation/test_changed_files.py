"""`evaluate --out` over files that change between runs, and the files that its errors name."""

import errno
import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.errors import DataError, PanopticFormatError
from ldmseg_fast.evaluation import EvaluationOptions, evaluate
from ldmseg_fast.evaluation.categories import category_source
from ldmseg_fast.panoptic.format import read_panoptic_png, write_panoptic_png
from ldmseg_fast.panoptic.postprocess import PanopticResult
from ldmseg_fast.panoptic.results import ResultsWriter

OPTIONS = EvaluationOptions(
    steps=1, batch_size=1, limit=3, baselines=False, mask_threshold=0.0, count_threshold=0, overlap_threshold=0.0
)


@pytest.fixture
def data(scenes: Path, tmp_path: Path) -> Path:
    """A copy of the scenes that a test may change."""
    return Path(shutil.copytree(scenes, tmp_path / "data"))


def repaint(path: Path) -> None:
    """Changes a picture but neither its size in bytes nor its time."""
    before, content = path.stat(), Path(path).read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        Image.fromarray(255 - np.asarray(image.convert("RGB"))).save(path)
    path.write_bytes(path.read_bytes()[: len(content)].ljust(len(content), b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("class_aware", [None, "GT"])
def test_results_of_pictures_that_have_changed_are_made_again(model_dir, data, tmp_path, monkeypatch, class_aware):
    options = replace(OPTIONS, out=str(tmp_path / "out"), class_aware=class_aware)
    evaluate(model_dir, data, options)
    name = "panoptic_classes" if class_aware else "panoptic"
    results = sorted((tmp_path / "out" / name).iterdir())
    before = [path.stat().st_mtime_ns for path in results]
    dataset = CocoPanoptic(data, "val2017", 64, limit=3)
    picture = dataset.paths(1)[0]
    Image.fromarray(255 - dataset.load_image(1)).save(picture)
    calls, call = [], LDMSegPipeline.__call__
    monkeypatch.setattr(LDMSegPipeline, "__call__", lambda *a, **k: calls.append(len(a[1])) or call(*a, **k))
    again = evaluate(model_dir, data, options)
    assert calls == [1], "one picture alone"
    assert [path.stat().st_mtime_ns == time for path, time in zip(results, before)] == [True, False, True]
    fresh = evaluate(model_dir, data, replace(options, out=str(tmp_path / "fresh")))
    assert again["class_agnostic"] == fresh["class_agnostic"]
    read = [json.loads((tmp_path / folder / f"{name}.json").read_text()) for folder in ("out", "fresh")]
    assert read[0] == read[1]
    calls.clear()
    assert evaluate(model_dir, data, options)["seconds_per_image"] == 0.0 and not calls, "read back again"


def test_a_change_that_leaves_size_and_time_is_found(model_dir, data, tmp_path):
    options = replace(OPTIONS, out=str(tmp_path / "out"), limit=1)
    evaluate(model_dir, data, options)
    repaint(CocoPanoptic(data, "val2017", 64).paths(0)[0])
    assert evaluate(model_dir, data, options)["seconds_per_image"] > 0


def test_classes_of_changed_semantic_maps_are_written_again(model_dir, data, tmp_path):
    semantic, dataset = tmp_path / "semantic", CocoPanoptic(data, "val2017", 64)
    semantic.mkdir()
    for index in range(len(dataset)):
        shape = dataset.ground_truth(index)[0].shape
        Image.fromarray(np.full(shape, dataset.categories[0]["id"], np.uint8)).save(
            semantic / f"{dataset.paths(index)[0].stem}.png"
        )
    options = replace(OPTIONS, out=str(tmp_path / "out"), class_aware=str(semantic), limit=1)
    evaluate(model_dir, data, options)
    file, other = semantic / f"{dataset.paths(0)[0].stem}.png", dataset.categories[1]["id"]
    Image.fromarray(np.full(dataset.ground_truth(0)[0].shape, other, np.uint8)).save(file)
    evaluate(model_dir, data, options)
    content = json.loads((tmp_path / "out" / "panoptic_classes.json").read_text())
    assert {s["category_id"] for entry in content["annotations"] for s in entry["segments_info"]} == {other}


def test_a_new_version_counts_whichever_rank_wrote_it(tmp_path):
    old, new = (PanopticResult(np.full((4, 4), value, np.int32), [{"id": value, "category_id": 1}]) for value in (1, 2))
    with ResultsWriter(tmp_path, "val", rank=1) as writer:
        writer.add(7, old, made_from="a")
    with ResultsWriter(tmp_path, "val", rank=0) as writer:
        assert writer.made_from == {7: "a"}
        writer.add(7, new, made_from="b")
    with ResultsWriter(tmp_path, "val", rank=1) as writer:
        assert writer.made_from == {7: "b"} and writer.read(7).segments_info[0]["id"] == 2
        content = json.loads(writer.finish().read_text())
    assert [segment["id"] for segment in content["annotations"][0]["segments_info"]] == [2]


@pytest.mark.parametrize(
    ("image_id", "name"), [("../out", "..%2Fout.png"), ("a\\b", "a%5Cb.png"), ("köln 1", "köln 1.png")]
)
def test_results_stay_in_their_folder(tmp_path, image_id, name):
    with ResultsWriter(tmp_path / "out", "val") as writer:
        writer.add(image_id, PanopticResult(np.ones((4, 4), np.int32), [{"id": 1, "category_id": 1}]))
        writer.finish()
        assert writer.read(image_id).segmentation.tolist() == np.ones((4, 4)).tolist()
    assert [path.name for path in (tmp_path / "out" / "val").iterdir()] == [name]


def test_a_full_disk_names_the_journal(tmp_path, monkeypatch):
    with ResultsWriter(tmp_path, "val") as writer:

        class Full:
            def write(self, text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            def close(self):
                pass

        monkeypatch.setattr(writer, "_journal", Full())
        with pytest.raises(OSError, match=r"No space left on device: '.*\.val\.0\.jsonl'"):
            writer.add(1, PanopticResult(np.ones((4, 4), np.int32), [{"id": 1, "category_id": 1}]))


def spoil(data: Path, index: int, fault: str) -> Path:
    ids = CocoPanoptic(data, "val2017", 64).paths(index)[1]
    if fault == "unlisted id":
        changed = read_panoptic_png(ids)
        changed[0, 0] = 4711
        write_panoptic_png(ids, changed)
    else:
        write_panoptic_png(ids, read_panoptic_png(ids)[:-1])
    return ids


@pytest.mark.parametrize("inpainting", [False, True])
@pytest.mark.parametrize("fault", ["unlisted id", "other size"])
def test_errors_name_the_files(model_dir, data, fault, inpainting):
    ids = spoil(data, 1, fault)
    options = replace(OPTIONS, inpainting=inpainting, blocks=(8,), probabilities=(0.5,))
    with pytest.raises((PanopticFormatError, DataError)) as caught:
        evaluate(model_dir, data, options)
    assert str(ids) in str(caught.value) and "[1]" not in str(caught.value)
    assert ("4711" if fault == "unlisted id" else "64x63") in str(caught.value)


def test_categories_that_a_map_cannot_hold(data):
    path = data / "annotations" / "panoptic_val2017.json"
    content = json.loads(path.read_text())
    content["categories"].append({"id": 0, "name": "nothing"})
    path.write_text(json.dumps(content))
    category_source("GT", CocoPanoptic(data, "val2017", 64))
    content["annotations"][2]["segments_info"][0]["category_id"] = 0
    path.write_text(json.dumps(content))
    with pytest.raises(
        DataError, match=r"panoptic_val2017\.json: image .* has the category 0, and --class-aware needs"
    ):
        category_source("GT", CocoPanoptic(data, "val2017", 64))
