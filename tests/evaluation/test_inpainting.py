"""`ldmseg evaluate --inpainting`: PQ per sparsity, baselines, interruptions."""

import json
from dataclasses import replace

import numpy as np
import pytest

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.cli import main
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.evaluation import EvaluationOptions, evaluate, format_report
from ldmseg_fast.metrics.baselines import segments_of
from ldmseg_fast.metrics.inpainting import PAPER_PROBABILITIES, drop_blocks, only_dropped
from ldmseg_fast.panoptic.results import PanopticResult

OPTIONS = EvaluationOptions(
    steps=1, limit=3, batch_size=2, inpainting=True, blocks=(8, 16), probabilities=(0.2, 0.6), count_threshold=0
)


def test_the_papers_settings_are_the_defaults():
    assert EvaluationOptions().sparsities() == [(16, share) for share in PAPER_PROBABILITIES]


def test_only_dropped():
    ids, dropped = np.array([[1, 2, 0], [1, 3, 3]]), np.array([[0, 1, 1], [0, 1, 0]], bool)
    inside, segments = only_dropped(ids, [{"id": 1}, {"id": 2}, {"id": 3}], dropped)
    assert inside.tolist() == [[0, 2, 0], [0, 3, 0]] and [s["id"] for s in segments] == [2, 3]


@pytest.mark.parametrize("kind", ["diffusion", "autoencoder"])
def test_every_row_of_the_report(model_dir, scenes, kind):
    folder = model_dir if kind == "diffusion" else f"{model_dir}-autoencoder"
    report = evaluate(folder, scenes, OPTIONS)
    quality = report["inpainting"]
    names = ["dropped pixels void", "nearest known pixel"]
    if kind == "diffusion":
        names.append("without given pixels")
    assert list(quality["baselines"]) == names
    assert "class_agnostic" not in report and report["mode"].startswith("inpainting")
    for tree in (quality, *quality["baselines"].values()):
        assert [(row["block"], row["probability"]) for row in tree["sparsities"]] == [
            (8, 0.2), (8, 0.6), (16, 0.2), (16, 0.6)
        ]  # fmt: skip
        assert tree["mean_pq"]["8"] == pytest.approx(np.mean([row["pq"] for row in tree["sparsities"][:2]]))
        assert tree["paper_mean_pq"] is None
    void, nearest = (quality["baselines"][name]["sparsities"] for name in names[:2])
    assert all(row["unknown_pq"] == 0.0 for row in void)
    assert all(one["pq"] < other["pq"] for one, other in zip(void, nearest))
    table = format_report(report)
    assert all(name in table for name in names) and "16  " in table and json.dumps(report)


def test_given_pixels_stay(model_dir, scenes, tmp_path):
    """In the written files, of both kinds of model."""
    from ldmseg_fast.panoptic.format import read_panoptic_png

    dataset = CocoPanoptic(scenes, "val2017", 64, limit=3)
    for folder in (model_dir, f"{model_dir}-autoencoder"):
        out = tmp_path / str(folder).rpartition("/")[2]
        evaluate(folder, scenes, replace(OPTIONS, out=str(out), baselines=False))
        for index in range(3):
            ids, _ = dataset.ground_truth(index)
            dropped = drop_blocks(64, 64, 8, 0.6, 0, dataset.image_id(index))
            written = read_panoptic_png(out / "inpainting_8_0_6" / f"{dataset.image_id(index):012d}.png")
            np.testing.assert_array_equal(written[~dropped], ids[~dropped])


def test_what_the_pipeline_is_given(model_dir, scenes, monkeypatch):
    """A double that fills the truth in is perfect, whole and on the dropped pixels alone."""
    dataset = CocoPanoptic(scenes, "val2017", 64)
    seen = []

    def perfect(self, images, segmentations, known_masks, num_inference_steps=None, **settings):
        assert len(images) == len(segmentations) == len(known_masks) == settings["batch_size"]
        index_of = {dataset.image_id(index): index for index in range(len(dataset))}
        results = []
        for image_id, ids, known in zip(settings["image_ids"], segmentations, known_masks):
            truth, _ = dataset.ground_truth(index_of[image_id])
            assert known.dtype == bool and not (known & (ids == 0)).any()
            np.testing.assert_array_equal(ids[known], truth[known])
            results.append(PanopticResult(truth, segments_of(truth)))
        seen.append((num_inference_steps, settings["seed"], settings["solver"]))
        return results

    monkeypatch.setattr(LDMSegPipeline, "inpaint", perfect)
    quality = evaluate(model_dir, scenes, replace(OPTIONS, seed=5))["inpainting"]
    assert all(row["pq"] == row["unknown_pq"] == 100.0 for row in quality["sparsities"])
    assert set(seen) == {(1, 5, "ddim")} and len(seen) == 2 * 4


def test_an_interrupted_one_goes_on(model_dir, scenes, tmp_path, monkeypatch):
    options = replace(OPTIONS, probabilities=(0.2,), seeds=2, out=str(tmp_path))
    whole = evaluate(model_dir, scenes, replace(options, out=None))
    calls, inpaint = [], LDMSegPipeline.inpaint

    def interrupted(*args, **kwargs):
        calls.append(kwargs["seed"])
        if len(calls) == 6:
            raise KeyboardInterrupt
        return inpaint(*args, **kwargs)

    monkeypatch.setattr(LDMSegPipeline, "inpaint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model_dir, scenes, options)
    again = evaluate(model_dir, scenes, options)
    assert calls == [0, 0, 0, 0, 1, 1, 1, 1, 1]  # 2 batches of 2 blocks each, the sixth twice
    assert again["inpainting"] == whole["inpainting"] and again["seeds"] == whole["seeds"]
    assert "+-" in format_report(again)
    names = {path.stem for path in tmp_path.glob("*.json")}
    kinds = ("panoptic", "inpainting_8_0_2", "inpainting_16_0_2")
    assert names == {f"{kind}_seed{seed}" for kind in kinds for seed in (0, 1)}


def test_command_line(model_dir, scenes, tmp_path, capsys):
    arguments = ["evaluate", f"{model_dir}-autoencoder", "--data", str(scenes), "--limit", "2"]
    path = tmp_path / "report.json"
    more = ["--inpainting", "--block", "16", "--probability", "0.5", "--no-baselines", "--json", str(path)]
    assert main([*arguments, *more]) == 0
    assert json.loads(path.read_text())["inpainting"]["baselines"] == {}
    assert "50%" in capsys.readouterr().out
    assert main([*arguments, "--block", "16"]) == 2
    assert "settings of --inpainting" in capsys.readouterr().err
    assert main([*arguments, "--inpainting", "--probability", "2"]) == 2
    assert "--probability 2: numbers from 0 to 1" in capsys.readouterr().err
