"""`ldmseg evaluate`: segmentation, reconstruction, seeds, files, interruptions, trivial baselines."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.evaluation import EvaluationOptions, evaluate, format_report, spread
from ldmseg_fast.evaluation.scores import rank_batches, without_crowds
from ldmseg_fast.metrics.baselines import BASELINES, fill_nearest, grid, halves, one_segment, segments_of
from ldmseg_fast.panoptic.format import read_panoptic_png
from ldmseg_fast.panoptic.shapes import split_segments

ANYTHING_GOES = {"mask_threshold": 0.0, "count_threshold": 0, "overlap_threshold": 0.0}


def test_baselines():
    assert np.unique(one_segment(5, 7)).tolist() == [1]
    assert halves(4, 3)[:2].max() == 1 and halves(4, 3)[2:].min() == 2
    assert np.unique(grid(7, 5)).tolist() == list(range(1, 10))
    assert [segment["id"] for segment in segments_of(grid(9, 9, 2, 2))] == [1, 2, 3, 4]


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (13, 17)])
def test_nearest_known_pixel(shape):
    rng = np.random.default_rng(0)
    y, x = np.indices(shape)
    for share in (0.02, 0.3, 1.0):
        known = rng.random(shape) < share
        ids = np.arange(1, known.size + 1).reshape(shape)
        filled = fill_nearest(ids, known)
        assert filled.dtype == np.int32
        if not known.any():
            assert not filled.any()
            continue
        rows, columns = np.unravel_index(filled - 1, shape)
        assert known[rows, columns].all()
        best = np.min([abs(y - row) + abs(x - column) for row, column in zip(*np.nonzero(known))], axis=0)
        np.testing.assert_array_equal(abs(y - rows) + abs(x - columns), best)


def test_nearest_known_pixel_of_a_very_wide_map():
    known = np.zeros((2, 50_000), bool)
    known[0, [5, 40_000]] = True
    filled = fill_nearest(np.where(known, [[7, *[9] * 49_999]], 0).cumsum(1).astype(np.int32), known)
    assert filled[1, :20_002].max() == filled[0, 5] and filled[1, 20_004:].min() == filled[0, 40_000] > filled[0, 5]


def test_report_of_a_random_model(model_dir, scenes, tmp_path):
    options = EvaluationOptions(steps=1, batch_size=3, out=str(tmp_path / "out"))
    report = evaluate(model_dir, scenes, options)
    assert report["mode"] == "class-agnostic" and report["images"] == 8 and report["num_inference_steps"] == 1
    assert 0 <= report["class_agnostic"]["pq"] <= 100
    assert report["baselines"].keys() == BASELINES.keys()
    assert report["baselines"]["halves"]["pq"] > report["class_agnostic"]["pq"]
    assert report["thresholds"] == {"mask_threshold": 0.5, "count_threshold": 8, "overlap_threshold": 0.5}
    assert "PQ" in format_report(report) and json.dumps(report)
    predictions = json.loads((tmp_path / "out" / "panoptic.json").read_text())
    assert len(predictions["annotations"]) == 8
    assert {image["file_name"] for image in predictions["images"]} == {p.name for p in (scenes / "val2017").iterdir()}


def test_an_interrupted_evaluation_goes_on(model_dir, scenes, tmp_path, monkeypatch):
    options = EvaluationOptions(
        steps=1, batch_size=2, baselines=False, mask_threshold=0.0, class_aware="GT", out=str(tmp_path / "out")
    )
    whole = evaluate(model_dir, scenes, replace(options, out=None, instances=str(tmp_path / "whole.json")))
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
    again = evaluate(model_dir, scenes, replace(options, instances=str(tmp_path / "again.json")))
    assert calls == [2, 2, 2, 2, 2]
    for key in ("class_agnostic", "class_aware"):
        assert again[key] == whole[key]
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    with pytest.raises(ValueError, match=r"other settings \(num_inference_steps 1, now 2\); choose another folder"):
        evaluate(model_dir, scenes, replace(options, steps=2))


def test_results_of_other_weights_or_data_are_not_read_back(model_dir, scenes, tmp_path):
    model, data = (shutil.copytree(folder, tmp_path / name) for folder, name in ((model_dir, "m"), (scenes, "d")))
    options = EvaluationOptions(steps=1, limit=1, baselines=False, out=str(tmp_path / "out"))
    evaluate(model, data, options)
    assert evaluate(model, data, options)["seconds_per_image"] == 0.0, "read back"
    weights, annotations = model / "unet" / "model.safetensors", data / "annotations" / "panoptic_val2017.json"
    for path, name in ((weights, "weights.unet/model.safetensors"), (annotations, "annotations.panoptic_val2017.json")):
        before = path.stat()
        os.utime(path, ns=(0, 0))
        with pytest.raises(ValueError, match=f"other settings .{name}"):
            evaluate(model, data, options)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_batch_that_was_cut_is_predicted_whole(model_dir, scenes, tmp_path, monkeypatch):
    from ldmseg_fast.panoptic.results import ResultsWriter

    options = EvaluationOptions(steps=1, batch_size=4, baselines=False, limit=4, out=str(tmp_path))
    add, batches = ResultsWriter.add, []

    def one_image_only(self, *args, **kwargs):
        if self.written:
            raise KeyboardInterrupt
        add(self, *args, **kwargs)

    monkeypatch.setattr(ResultsWriter, "add", one_image_only)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model_dir, scenes, options)
    monkeypatch.setattr(ResultsWriter, "add", add)
    call = LDMSegPipeline.__call__
    monkeypatch.setattr(LDMSegPipeline, "__call__", lambda *a, **k: batches.append(len(a[1])) or call(*a, **k))
    report = evaluate(model_dir, scenes, options)
    assert batches == [4]
    assert report["class_agnostic"] == evaluate(model_dir, scenes, replace(options, out=None))["class_agnostic"]
    assert len(json.loads((tmp_path / "panoptic.json").read_text())["images"]) == 4


def test_batch_size_does_not_change_the_result(model_dir, scenes):
    reports = [
        evaluate(model_dir, scenes, EvaluationOptions(steps=1, batch_size=size, baselines=False, mask_threshold=0.0))
        for size in (1, 5)
    ]
    assert reports[0]["class_agnostic"] == pytest.approx(reports[1]["class_agnostic"], abs=0.5)
    assert reports[0]["thresholds"]["mask_threshold"] == 0.0


def test_batches_are_the_same_for_any_number_of_ranks(monkeypatch):
    from ldmseg_fast import distributed

    whole = rank_batches(11, 3)
    assert whole == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert rank_batches(11, 3) == whole[1::2]


def test_several_seeds(model_dir, scenes, tmp_path):
    options = EvaluationOptions(steps=1, limit=4, seed=3, seeds=2, out=str(tmp_path), **ANYTHING_GOES)
    report = evaluate(model_dir, scenes, options)
    alone = [evaluate(model_dir, scenes, replace(options, seed=seed, seeds=1, out=None)) for seed in (3, 4)]
    values = [one["class_agnostic"]["pq"] for one in alone]
    assert report["seeds"]["seeds"] == [3, 4]
    assert report["seeds"]["values"]["class_agnostic"]["pq"] == values
    assert report["class_agnostic"]["pq"] == pytest.approx(np.mean(values))
    assert report["seeds"]["deviation"]["class_agnostic"]["pq"] == pytest.approx(np.std(values, ddof=1))
    assert "mean +- deviation over 2 seeds (3 to 4)" in format_report(report)
    assert {path.name for path in tmp_path.glob("*.json")} == {"panoptic_seed3.json", "panoptic_seed4.json"}
    assert evaluate(model_dir, scenes, options)["seeds"] == report["seeds"]  # read back


def test_spread():
    trees = [{"a": 1, "b": [{"c": 2.0}], "d": "x", "e": 5}, {"a": 1, "b": [{"c": 4.0}], "d": "x"}]
    assert spread.mean(trees) == {"a": 1, "b": [{"c": 3.0}], "d": "x"}
    assert spread.deviation(trees)["b"][0]["c"] == pytest.approx(2**0.5)
    assert spread.each(trees)["b"] == [{"c": [2.0, 4.0]}]


def test_an_auto_encoder_alone_is_evaluated_on_reconstruction(model_dir, scenes, tmp_path):
    options = EvaluationOptions(limit=4, id_assignment="random", out=str(tmp_path), **ANYTHING_GOES)
    report = evaluate(f"{model_dir}-autoencoder", scenes, options)
    assert report["mode"] == "reconstruction" and report["images"] == 4 and report["id_assignment"] == "random"
    assert 0 <= report["mean_iou"]["miou"] <= 100
    dataset = CocoPanoptic(scenes, "val2017", 64, limit=4)
    assert report["mean_iou"]["segments"] == sum(len(dataset.ground_truth(index)[1]) for index in range(4))
    assert "mIoU over" in format_report(report)
    assert evaluate(f"{model_dir}-autoencoder", scenes, options)["mean_iou"] == report["mean_iou"]  # read back
    with pytest.raises(ValueError, match="--connected is of models that sample"):
        evaluate(f"{model_dir}-autoencoder", scenes, replace(options, connected=4))
    with pytest.raises(ValueError, match="--edges are of models that sample"):
        evaluate(f"{model_dir}-autoencoder", scenes, replace(options, flip=True))


def test_maps_are_completed_along_edges(model_dir, scenes, monkeypatch):
    asked = []
    inpaint = LDMSegPipeline.inpaint

    def watched(self, *args, edges, **settings):
        asked.append(edges)
        return inpaint(self, *args, edges=edges, **settings)

    monkeypatch.setattr(LDMSegPipeline, "inpaint", watched)
    settings = {"limit": 1, "inpainting": True, "blocks": (8,), "probabilities": (0.3,), "steps": 1, **ANYTHING_GOES}
    for edges in (0, 2):
        report = evaluate(model_dir, scenes, EvaluationOptions(**settings, edges=edges))["inpainting"]
        assert 0 <= report["mean_pq"]["8"] <= 100
    assert asked == [0, 2]


def test_a_perfect_reconstruction_has_the_truths_ids(model_dir, scenes, monkeypatch):
    """With the decoder replaced by one that says what the encoder saw, every number is 100."""
    import torch

    from ldmseg_fast.evaluation import predictors
    from ldmseg_fast.kernels.mask_bits import decode_mask_bits

    class Perfect:
        def __init__(self, vae):
            self.config = vae.config

        def encode(self, bits):
            self.bits = bits
            return self

        def mode(self):
            return decode_mask_bits(self.bits).long()

        def decode_both(self, slots):
            logits = 20.0 * torch.nn.functional.one_hot(slots, self.config.num_slots).permute(0, 3, 1, 2).float()
            return logits, None

    load = predictors.load_component
    monkeypatch.setattr(predictors, "load_component", lambda *args: Perfect(load(*args)))
    report = evaluate(f"{model_dir}-autoencoder", scenes, EvaluationOptions(limit=4, **ANYTHING_GOES))
    assert report["class_agnostic"]["pq"] == report["mean_iou"]["miou"] == 100.0
    options = EvaluationOptions(limit=2, inpainting=True, blocks=(8,), probabilities=(0.3,), **ANYTHING_GOES)
    report = evaluate(f"{model_dir}-autoencoder", scenes, options)["inpainting"]
    # what was void to the encoder is void in its answer, so that this is the baseline
    assert report["sparsities"][0]["pq"] == report["baselines"]["dropped pixels void"]["sparsities"][0]["pq"]


def test_crowds_are_void_where_they_must_not_count():
    ids = np.array([[1, 2], [2, 0]], np.int32)
    assert without_crowds(ids, [{"id": 1}, {"id": 2, "iscrowd": 1}]).tolist() == [[1, 0], [0, 0]]
    assert without_crowds(ids, [{"id": 1}, {"id": 2}]) is ids


def test_truth_against_itself_is_perfect(scenes):
    from ldmseg_fast.metrics.pq import PanopticQuality

    dataset = CocoPanoptic(scenes, "val2017", 64)
    stat = PanopticQuality([], class_agnostic=True)
    for index in range(len(dataset)):
        ids, segments = dataset.ground_truth(index)
        stat.add(ids, segments, ids, segments, image_id=index)
    assert stat.compute()["All"]["pq"] == 1.0


def test_connected_pieces(model_dir, scenes, tmp_path):
    options = EvaluationOptions(steps=1, limit=3, connected=4, out=str(tmp_path), **ANYTHING_GOES)
    report = evaluate(model_dir, scenes, options)
    assert report["connected"] == 4 and "connected pieces from 4 pixels" in format_report(report)
    for entry in json.loads((tmp_path / "panoptic.json").read_text())["annotations"]:
        ids = read_panoptic_png(tmp_path / "panoptic" / entry["file_name"])
        assert len(split_segments(ids)[1]) == len(entry["segments_info"]) > 0
        assert min(segment["area"] for segment in entry["segments_info"]) >= 4


def test_only_a_sample_s_own_ids_are_compared_with_torch(model_dir, scenes, monkeypatch):
    """An ensemble's and connected pieces' ids are no slots: torch's single sample says nothing about them."""
    load = LDMSegPipeline.from_pretrained
    monkeypatch.setattr(
        LDMSegPipeline,
        "from_pretrained",
        lambda model_dir, *_, image_size, **__: load(model_dir, image_size=image_size),
    )
    for more in ({}, {"connected": 4}, {"flip": True}):
        options = EvaluationOptions(steps=1, limit=1, backend="compile", **more, **ANYTHING_GOES)
        assert ("agreement" in evaluate(model_dir, scenes, options)) is not bool(more)


def test_instances_for_pycocotools(model_dir, scenes, tmp_path):
    coco = pytest.importorskip("pycocotools.mask")
    path = tmp_path / "deep" / "instances.json"
    options = EvaluationOptions(steps=1, limit=3, instances=str(path), out=str(tmp_path), **ANYTHING_GOES)
    evaluate(model_dir, scenes, options)
    instances = json.loads(path.read_text())
    segments = [
        (entry["image_id"], segment["area"], segment["score"])
        for entry in json.loads((tmp_path / "panoptic.json").read_text())["annotations"]
        for segment in entry["segments_info"]
    ]
    found = [(entry["image_id"], int(coco.area(entry["segmentation"])), entry["score"]) for entry in instances]
    assert sorted(found) == sorted(segments) and segments


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seeds": 0}, "--seeds 0"),
        ({"seed": -1}, "--seed -1"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"limit": -1}, "--limit -1"),
        ({"inpainting": True, "blocks": (16, 0)}, "--block 16 0"),
        ({"inpainting": True, "blocks": ()}, "--block"),
        ({"inpainting": True, "probabilities": (0.5, 1.5)}, "--probability 0.5 1.5"),
        ({"inpainting": True, "class_aware": "GT"}, "--inpainting is class-agnostic"),
        ({"inpainting": True, "instances": "x.json"}, "--instances"),
        ({"seeds": 2, "instances": "x.json"}, "--instances"),
        ({"inpainting": True, "page": "x.html"}, "--page"),
        ({"page": "x.html", "worst": 0, "random": 0}, "--page"),
        ({"worst": -1}, "--worst -1"),
        ({"mask_threshold": 1.5}, "--mask-th 1.5"),
        ({"overlap_threshold": -0.1}, "--overlap-th -0.1"),
        ({"count_threshold": -1}, "--count-th -1"),
        ({"connected": -1}, "--connected -1"),
        ({"connected": 9, "inpainting": True}, "leave --connected out"),
    ],
)
def test_options_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        EvaluationOptions(**wrong)


def test_boundary_quality_is_counted_on_request(model_dir, scenes):
    options = EvaluationOptions(steps=1, limit=4, mask_threshold=0.0)
    plain = evaluate(model_dir, scenes, options)
    report = evaluate(model_dir, scenes, replace(options, boundary=True))
    assert "boundary_pq" not in plain["class_agnostic"] and "boundary PQ" not in format_report(plain)
    for row in (report["class_agnostic"], *report["baselines"].values()):
        assert 0 <= row["boundary_pq"] <= row["pq"] + 1e-9
    assert f"boundary PQ: {report['class_agnostic']['boundary_pq']:.2f}" in format_report(report)
    assert {key: value for key, value in report["class_agnostic"].items() if key != "boundary_pq"} == plain[
        "class_agnostic"
    ]
    with pytest.raises(ValueError, match="leave --boundary out"):
        replace(options, boundary=True, inpainting=True)
