"""`ldmseg evaluate --class-aware`: categories by the vote of the truth, of semantic PNGs, of panoptic results."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.errors import DataError
from ldmseg_fast.evaluation import EvaluationOptions, evaluate, format_report
from ldmseg_fast.evaluation.categories import category_source, read_semantic_png
from ldmseg_fast.metrics.class_vote import category_map, merge_stuff
from ldmseg_fast.metrics.pq_files import evaluate_files

OPTIONS = {"limit": 4, "mask_threshold": 0.0, "count_threshold": 0, "overlap_threshold": 0.0, "baselines": False}


@pytest.fixture(scope="module")
def dataset(scenes):
    return CocoPanoptic(scenes, "val2017", 64)


@pytest.fixture
def semantic(dataset, tmp_path):
    """The truth's categories as semantic PNGs, 8- and 16-bit in turn."""
    folder = tmp_path / "semantic"
    folder.mkdir()
    for index in range(len(dataset)):
        categories = category_map(*dataset.ground_truth(index)).astype(np.uint16 if index % 2 else np.uint8)
        Image.fromarray(categories).save(folder / f"{dataset.paths(index)[0].stem}.png")
    return folder


def test_votes_of_equal_maps_are_equal(model_dir, scenes, semantic):
    autoencoder = f"{model_dir}-autoencoder"
    sources = ["GT", str(semantic), str(scenes / "annotations" / "panoptic_val2017.json")]
    options = [EvaluationOptions(class_aware=source, **OPTIONS) for source in sources]
    truth, *others = (evaluate(autoencoder, scenes, each) for each in options)
    numbers = truth["class_aware"]
    assert numbers["categories_from"] == "the ground truth (upper bound)" and numbers["upper_bound"]
    assert numbers["All"].keys() == {"pq", "sq", "rq", "n"} and numbers["Stuff"]["n"] and numbers["per_category"]
    for other, source in zip(others, sources[1:]):
        own = other["class_aware"]
        assert own["categories_from"] == source and not own["upper_bound"]
        assert {key: own[key] for key in ("All", "Things", "Stuff")} == {
            key: numbers[key] for key in ("All", "Things", "Stuff")
        }
    assert "voted by the ground truth (upper bound)" in format_report(truth)
    assert f"voted by {semantic}" in format_report(others[0])


def test_result_files_have_the_voted_categories(model_dir, scenes, tmp_path):
    options = EvaluationOptions(class_aware="GT", out=str(tmp_path), **(OPTIONS | {"limit": 0}))
    report = evaluate(f"{model_dir}-autoencoder", scenes, options)
    truth = json.loads((scenes / "annotations" / "panoptic_val2017.json").read_text())
    content = json.loads((tmp_path / "panoptic_classes.json").read_text())
    assert content["categories"] == truth["categories"]
    assert {s["category_id"] for a in content["annotations"] for s in a["segments_info"]} > {1}
    agnostic = json.loads((tmp_path / "panoptic.json").read_text())
    assert {s["category_id"] for a in agnostic["annotations"] for s in a["segments_info"]} == {1}
    scored = evaluate_files(scenes / "annotations" / "panoptic_val2017.json", tmp_path / "panoptic_classes.json")
    assert 100.0 * scored["All"]["pq"] == report["class_aware"]["All"]["pq"]


def test_stuff_of_one_category_is_one_segment():
    ids = np.array([[9, 9, 4], [7, 7, 7], [5, 5, 5]], np.int32)
    segments = [
        {"id": 9, "category_id": 2, "score": 0.5, "area": 2},
        {"id": 4, "category_id": 2, "score": 0.8, "area": 1},
        {"id": 7, "category_id": 1, "score": 0.1, "area": 3},
        {"id": 5, "category_id": 1, "score": 0.2, "area": 3},
    ]
    merged_ids, merged = merge_stuff(ids, segments, {2})
    assert merged_ids.tolist() == [[4, 4, 4], [7, 7, 7], [5, 5, 5]]
    assert merged[0] == {
        "id": 4, "category_id": 2, "score": pytest.approx(0.6), "area": 3, "bbox": [0, 0, 3, 1], "was_fused": True
    }  # fmt: skip
    assert merged[1:] == [segments[3], segments[2]]
    assert merge_stuff(ids, segments, {1, 2})[0].tolist() == [[4, 4, 4], [5, 5, 5], [5, 5, 5]]
    assert ids[0, 0] == 9, "the map given must not be changed"


def test_semantic_png_values(tmp_path):
    path, known = tmp_path / "a.png", np.array([1, 2, 133])
    Image.fromarray(np.array([[0, 1, 255, 133]], np.uint8)).save(path)
    assert read_semantic_png(path, known).tolist() == [[0, 1, 0, 133]]
    assert read_semantic_png(path, np.append(known, 255)).tolist() == [[0, 1, 255, 133]]
    Image.fromarray(np.array([[2, 65535]], np.uint16)).save(path)
    assert read_semantic_png(path, known).tolist() == [[2, 0]]
    Image.fromarray(np.array([[2, 77]], np.uint8)).save(path)
    with pytest.raises(DataError, match=r"a\.png: values \[77\]"):
        read_semantic_png(path, known)
    Image.new("RGB", (2, 2)).save(path)
    with pytest.raises(DataError, match=r"a\.png: RGB picture"):
        read_semantic_png(path, known)
    path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a\.png: not a readable PNG"):
        read_semantic_png(path, known)


def test_wrong_sources_are_named(dataset, semantic, tmp_path):
    with pytest.raises(DataError, match="nowhere: give GT, a folder"):
        category_source(str(tmp_path / "nowhere"), dataset)
    lost = semantic / f"{dataset.paths(3)[0].stem}.png"
    whole = lost.read_bytes()
    lost.unlink()
    with pytest.raises(DataError, match=f"1 of 8 pictures have no semantic PNG there, first {lost.name}"):
        category_source(str(semantic), dataset)
    Image.new("L", (5, 4), 1).save(lost)
    source = category_source(str(semantic), dataset)
    ids, segments = dataset.ground_truth(3)
    from ldmseg_fast.panoptic.results import PanopticResult

    with pytest.raises(DataError, match="5x4 and 64x64"):
        source.vote(3, PanopticResult(ids, segments))
    lost.write_bytes(whole)
    results = json.loads(Path(dataset.folders.annotations).read_text())
    results["annotations"].pop()
    (tmp_path / "few.json").write_text(json.dumps(results))
    with pytest.raises(DataError, match=r"few\.json: no result for 1 of 8 images"):
        category_source(str(tmp_path / "few.json"), dataset)


def test_a_data_set_without_categories(dataset, monkeypatch):
    monkeypatch.setattr(dataset, "categories", [{"id": 1, "name": "object", "isthing": 1}])
    with pytest.raises(DataError, match="--class-aware needs categories, and it lists object"):
        category_source("GT", dataset)
