"""`ldmseg evaluate` of models that give categories themselves."""

import json
import shutil

import numpy as np
import pytest

from ldmseg_fast.checkpoints.categories_file import load_categories
from ldmseg_fast.checkpoints.model_folder import load_component_config
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.data.scenes import CATEGORIES
from ldmseg_fast.errors import ArgumentError, DataError
from ldmseg_fast.evaluation import EvaluationOptions, evaluate, format_report
from ldmseg_fast.evaluation.categories import model_categories
from ldmseg_fast.evaluation.scores import SegmentationScores
from ldmseg_fast.evaluation.semantic import SemanticIoU
from ldmseg_fast.metrics.pq_files import evaluate_files
from ldmseg_fast.panoptic.results import PanopticResult
from ldmseg_fast.pipeline import LDMSegPipeline

OPTIONS = {"limit": 4, "mask_threshold": 0.0, "count_threshold": 0, "overlap_threshold": 0.0, "baselines": False}


@pytest.fixture(scope="module")
def table(category_model):
    return load_categories(category_model, load_component_config(category_model, "mask_vae")[0])


@pytest.fixture
def renamed(category_scenes, tmp_path):
    """The scenes with other category ids, 0 among them, in another order; `edit` changes the list further."""

    def make(edit=lambda categories: categories):
        root = tmp_path / "renamed"
        shutil.copytree(category_scenes, root)
        for path in (root / "annotations").glob("*.json"):
            content = json.loads(path.read_text())
            content["categories"] = edit([c | {"id": 19 - c["id"]} for c in reversed(content["categories"])])
            for annotation in content["annotations"]:
                for segment in annotation["segments_info"]:
                    segment["category_id"] = 19 - segment["category_id"]
            path.write_text(json.dumps(content))
        return root

    return make


@pytest.mark.parametrize("kind", ["", "-autoencoder"])
def test_one_pass_gives_both_qualities_and_files_that_score_the_same(category_model, category_scenes, tmp_path, kind):
    options = EvaluationOptions(out=str(tmp_path), **OPTIONS | {"limit": 0})
    report = evaluate(f"{category_model}{kind}", category_scenes, options)
    aware = report["class_aware"]
    assert aware["categories_from"] == "the model" and not aware["upper_bound"]
    assert {"All", "Things", "Stuff", "per_category", "miou"} <= aware.keys()
    assert report["mode"] == ("reconstruction" if kind else "class-aware")
    assert report["class_agnostic"].keys() >= {"pq", "sq", "rq", "tp"}
    names = {category["name"] for category in CATEGORIES[2]}
    assert {entry["name"] for entry in aware["per_category"].values()} <= names
    truth = category_scenes / "annotations" / "panoptic_val2017.json"
    found = evaluate_files(truth, tmp_path / "panoptic.json")
    assert 100 * found["All"]["pq"] == pytest.approx(aware["All"]["pq"])
    again = evaluate(f"{category_model}{kind}", category_scenes, options)
    assert again["class_aware"] == aware, "results that are read back count the same"
    text = format_report(report)
    assert "\nclass-agnostic      PQ" in text
    assert "categories of the model" in text and "mIoU over categories" in text and "triangle" in text


def test_results_do_not_hang_on_the_data_sets_ids(category_model, category_scenes, renamed):
    one = evaluate(category_model, category_scenes, EvaluationOptions(**OPTIONS))["class_aware"]
    other = evaluate(category_model, renamed(), EvaluationOptions(**OPTIONS))["class_aware"]
    assert (one["All"], one["miou"]) == (other["All"], other["miou"])
    assert {e["name"]: e["tp"] for e in one["per_category"].values()} == {
        e["name"]: e["tp"] for e in other["per_category"].values()
    }


def test_data_sets_that_do_not_fit_are_refused_by_name(category_model, renamed):
    root = renamed(lambda categories: [c | {"name": "lion"} if c["name"] == "star" else c for c in categories])
    with pytest.raises(DataError, match=r"no category 'lion'.*--class-agnostic"):
        evaluate(category_model, root, EvaluationOptions(**OPTIONS))
    report = evaluate(category_model, root, EvaluationOptions(class_agnostic=True, **OPTIONS))
    assert report["mode"] == "class-agnostic" and "class_aware" not in report
    with pytest.raises(ArgumentError, match="give one of them"):
        EvaluationOptions(class_agnostic=True, class_aware="GT")
    with pytest.raises(ArgumentError, match=r"--unfused.*give --class-agnostic"):
        EvaluationOptions(unfused=True)


@pytest.mark.parametrize("edges", [0, 2])
def test_categories_that_are_left_out_fuse_nothing(category_model, category_scenes, tmp_path, edges):
    """Stuff of one category is one segment of a model with categories, and stays apart without them."""
    data = CocoPanoptic(category_scenes, "val2017", 32)
    pictures = [data.load_image(index) for index in range(4)]
    settings = {"thresholds": PostprocessConfig(0.0, 0, 0.0)} | ({"edges": edges} if edges else {})
    stuff = shutil.copytree(category_model, tmp_path / "stuff")
    listed = json.loads((stuff / "categories.json").read_text())
    (stuff / "categories.json").write_text(json.dumps([category | {"isthing": 0} for category in listed]))

    def segments(**how):
        pipe = LDMSegPipeline.from_pretrained(stuff, **how)
        found = pipe.ensemble(pictures, 1, **settings) if edges else pipe(pictures, **settings)
        return [segment for result in found for segment in result.segments_info]

    named, plain = segments(), segments(class_agnostic=True)
    assert all("name" in segment for segment in named) and not any("name" in segment for segment in plain)
    assert len(plain) > len(named) and not any(segment["was_fused"] for segment in plain)


@pytest.mark.parametrize("inpainting", [False, True])
def test_unfused_scores_are_of_maps_without_categories(
    category_model, category_scenes, monkeypatch, tmp_path, inpainting
):
    asked = []
    load = LDMSegPipeline.from_pretrained
    monkeypatch.setattr(
        LDMSegPipeline, "from_pretrained", lambda *a, **k: asked.append(k["class_agnostic"]) or load(*a, **k)
    )
    how = {"inpainting": True, "blocks": (8,)} if inpainting else {"class_agnostic": True}
    how |= {"unfused": True}
    report = evaluate(category_model, category_scenes, EvaluationOptions(**OPTIONS, **how, out=str(tmp_path)))
    assert asked == [True] and report["class_agnostic" if not inpainting else "inpainting"]
    if not inpainting:
        with pytest.raises(ArgumentError, match="categories"):
            evaluate(category_model, category_scenes, EvaluationOptions(**OPTIONS, out=str(tmp_path)))


def test_foreign_categories_still_vote(category_model, category_scenes, tmp_path):
    options = EvaluationOptions(class_aware="GT", out=str(tmp_path), **OPTIONS)
    report = evaluate(category_model, category_scenes, options)
    assert report["class_aware"]["upper_bound"] and "miou" not in report["class_aware"]
    assert {path.name for path in tmp_path.glob("*.json")} == {"panoptic.json", "panoptic_classes.json"}


def test_inpainting_is_class_agnostic(category_model, category_scenes):
    options = EvaluationOptions(inpainting=True, probabilities=(0.5,), steps=1, **OPTIONS | {"limit": 1})
    assert "inpainting" in evaluate(category_model, category_scenes, options)


def as_result(table, dataset, index):
    """The truth as a model's result."""
    ids, segments = dataset.ground_truth(index)
    name = {category["id"]: category["name"] for category in dataset.categories}
    of_name = {category.name: category.id for category in table.categories}
    named = [s | {"category_id": of_name[name[s["category_id"]]], "isthing": True, "score": 1.0} for s in segments]
    return PanopticResult(ids, named)


def test_the_truth_scores_a_hundred(table, category_scenes, renamed):
    for root in (category_scenes, renamed()):
        dataset = CocoPanoptic(root, "val2017", 64)
        own = model_categories(table, dataset)
        scores = SegmentationScores(own, mean_iou=False, baselines=False)
        for index in range(len(dataset)):
            result = own.translate(as_result(table, dataset, index))
            scores.add(index, str(index), dataset.ground_truth(index), result)
        report = scores.report()
        aware = report["class_aware"]
        values = [aware[key] for key in ("miou", "category_accuracy")]
        for value in (report["class_agnostic"]["pq"], aware["All"]["pq"], aware["Stuff"]["pq"], *values):
            assert value == pytest.approx(100.0)


def test_the_share_of_right_categories(table, category_scenes):
    """One segment of each picture has another category; all match class-agnostically."""
    dataset = CocoPanoptic(category_scenes, "val2017", 64)
    own = model_categories(table, dataset)
    scores = SegmentationScores(own, mean_iou=False, baselines=False)
    total = 0
    for index in range(len(dataset)):
        result = as_result(table, dataset, index)
        first = result.segments_info[0]
        first["category_id"] = next(c.id for c in table.categories if c.id != first["category_id"])
        scores.add(index, str(index), dataset.ground_truth(index), own.translate(result))
        total += len(result.segments_info)
    accuracy = scores.report()["class_aware"]["category_accuracy"]
    assert accuracy == pytest.approx(100.0 * (total - len(dataset)) / total)


def test_categories_that_the_data_set_lacks_become_void(table, category_scenes):
    dataset = CocoPanoptic(category_scenes, "val2017", 64)
    result = as_result(table, dataset, 0)
    absent = result.segments_info[0]
    dataset.categories = [c for c in dataset.categories if c["id"] != absent["category_id"]]
    translated = model_categories(table, dataset).translate(result)
    lost = [s["id"] for s in result.segments_info if s["category_id"] == absent["category_id"]]
    assert not np.isin(translated.segmentation, lost).any()
    assert np.array_equal(
        translated.segmentation[~np.isin(result.segmentation, lost)],
        result.segmentation[~np.isin(result.segmentation, lost)],
    )
    assert absent["id"] not in {s["id"] for s in translated.segments_info}


def test_semantic_iou_counts_pixels():
    categories = [{"id": 0}, {"id": 8}, {"id": 9}]
    truth, guess = np.array([[1, 1, 2, 0]]), np.array([[5, 6, 6, 6]])
    one = SemanticIoU(categories)
    one.add(
        truth,
        [{"id": 1, "category_id": 0}, {"id": 2, "category_id": 8}],
        guess,
        [{"id": 5, "category_id": 0}, {"id": 6, "category_id": 8}],
    )
    assert one.result() == {"miou": 0.5, "per_category": {0: 0.5, 8: 0.5}}
    other = SemanticIoU(categories)
    other.add(np.array([[3]]), [{"id": 3, "category_id": 9}], np.array([[0]]), [])
    assert one.merge(other).result()["per_category"] == {0: 0.5, 8: 0.5, 9: 0.0}
    assert SemanticIoU(categories).result()["miou"] == 0.0
