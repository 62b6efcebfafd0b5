"""`ldmseg evaluate` and the trivial baselines."""

import json
from dataclasses import replace

import numpy as np
import pytest

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.evaluation import EvaluationOptions, evaluate, format_report
from ldmseg_fast.metrics.baselines import BASELINES, grid, halves, one_segment, segments_of


def test_baselines():
    assert np.unique(one_segment(5, 7)).tolist() == [1]
    assert halves(4, 3)[:2].max() == 1 and halves(4, 3)[2:].min() == 2
    assert np.unique(grid(7, 5)).tolist() == list(range(1, 10))
    assert [segment["id"] for segment in segments_of(grid(9, 9, 2, 2))] == [1, 2, 3, 4]


def test_report_of_a_random_model(model_dir, scenes, tmp_path):
    options = EvaluationOptions(steps=1, batch_size=3, out=str(tmp_path / "out"))
    report = evaluate(model_dir, scenes, options)
    assert report["images"] == 8 and report["num_inference_steps"] == 1
    assert 0 <= report["class_agnostic"]["pq"] <= 100
    assert report["baselines"].keys() == BASELINES.keys()
    assert report["baselines"]["halves"]["pq"] > report["class_agnostic"]["pq"]
    assert report["thresholds"] == {"mask_threshold": 0.5, "count_threshold": 8, "overlap_threshold": 0.5}
    assert "PQ" in format_report(report) and json.dumps(report)
    predictions = json.loads((tmp_path / "out" / "panoptic.json").read_text())
    assert len(predictions["annotations"]) == 8


def test_an_interrupted_evaluation_goes_on(model_dir, scenes, tmp_path, monkeypatch):
    options = EvaluationOptions(steps=1, batch_size=2, baselines=False, mask_threshold=0.0, out=str(tmp_path / "out"))
    whole = evaluate(model_dir, scenes, replace(options, out=None))
    calls = []

    def interrupted(self, images, *args, **kwargs):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, images, *args, **kwargs)

    original = LDMSegPipeline.__call__
    monkeypatch.setattr(LDMSegPipeline, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model_dir, scenes, options)
    again = evaluate(model_dir, scenes, options)
    assert calls == [2, 2, 2, 2, 2]
    assert again["class_agnostic"] == whole["class_agnostic"]
    with pytest.raises(ValueError, match="other settings"):
        evaluate(model_dir, scenes, replace(options, steps=2))


def test_batch_size_does_not_change_the_result(model_dir, scenes):
    reports = [
        evaluate(model_dir, scenes, EvaluationOptions(steps=1, batch_size=size, baselines=False, mask_threshold=0.0))
        for size in (1, 5)
    ]
    assert reports[0]["class_agnostic"] == pytest.approx(reports[1]["class_agnostic"], abs=0.5)
    assert reports[0]["thresholds"]["mask_threshold"] == 0.0


def test_an_auto_encoder_alone_is_evaluated_on_reconstruction(model_dir, scenes):
    report = evaluate(f"{model_dir}-autoencoder", scenes, EvaluationOptions(limit=4, id_assignment="random"))
    assert report["mode"] == "reconstruction" and report["images"] == 4 and report["id_assignment"] == "random"


def test_truth_against_itself_is_perfect(scenes):
    from ldmseg_fast.metrics.pq import PQStat

    dataset = CocoPanoptic(scenes, "val2017", 64)
    stat = PQStat([], class_agnostic=True)
    for index in range(len(dataset)):
        ids, segments = dataset.ground_truth(index)
        stat.add(ids, segments, ids, segments, image_id=index)
    assert stat.result()["All"]["pq"] == 1.0
