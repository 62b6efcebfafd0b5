"""The quality benchmark: rows that can be taken up again, baselines, and the picture."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import bench_quality
from benchmarks.bench_quality import Journal, fingerprint, measure
from benchmarks.harness import BenchmarkError, Run
from benchmarks.measuring.sample_agreement import count_bands
from benchmarks.measuring.training_runs import mean_over_trainings
from benchmarks.peers.annotators import annotator_roots, mean_over_annotators
from benchmarks.peers.untrained import Tuned, classical_rows
from benchmarks.reporting import photographs_picture, quality_curve, tables
from benchmarks.reporting.quality_curve import curves, draw_curve, pareto_front
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.inference.ensemble import EnsembleResult
from ldmseg_fast.metrics import classical
from ldmseg_fast.metrics.classical import Classical

SLIC = {"n_segments": 5, "compactness": 10.0, "sigma": 0.0}


@pytest.fixture
def campaign(model_dir, scenes):
    """`campaign("--steps", "1")`: the rows of such a run."""

    def start(*arguments):
        settings = [f"small={model_dir}", "--data", str(scenes), "--limit", "4", *arguments]
        run = Run("quality", quick=True)
        measure(bench_quality.build_parser().parse_args(settings), run)
        return run.results

    return start


def test_steps_solvers_and_seeds(campaign):
    rows = campaign("--steps", "1", "2", "--solvers", "ddim", "dpmpp_2m", "--seeds", "2")
    own = [row for row in rows if row["variant"] == "small"]
    assert [(row["case"]["steps"], row["case"]["solver"]) for row in own] == [(1, "ddim"), (2, "ddim"), (2, "dpmpp_2m")]
    for row in own:
        assert row["seeds"] == 2 and row["deviation"] >= 0 and row["ms_per_image"] > 0
        assert row["prediction_type"] == "sample" and row["weights"] == own[0]["weights"] and len(row["weights"]) == 16
    names = [row["variant"] for row in rows if "steps" not in row["case"]]
    assert "one segment" in names and len(names) == len(set(names))


def test_views_and_boundaries(campaign):
    one, both = (campaign("--steps", "1", *more)[0] for more in ([], ["--flip", "--scales", "1", "2"]))
    assert "views" not in one["case"] and both["case"]["views"] == "flip scales 1 2 medoid"
    for row in (one, both):
        assert 0 <= row["boundary_pq"] <= row["value"] + 1e-9


def test_another_size_and_threshold(campaign):
    own, other = (campaign("--steps", "1", *more)[0] for more in ([], ["--size", "96", "--mask-th", "0.1"]))
    assert "size" not in own["case"] and other["case"]["size"] == 96 and other["case"]["mask_threshold"] == 0.1
    line = tables.quality([row | {"environment": {}} for row in (own, other)]).splitlines()[3]
    assert "1 steps, 96 px, mask threshold 0.1" in line


def test_snapshots_make_a_learning_curve(model_dir, campaign, monkeypatch):
    with pytest.raises(BenchmarkError, match=r"small: no logs/log.jsonl beside the model"):
        campaign("--steps", "1", "--snapshots")
    rows = []
    for steps in (1000, 500):
        facts = {"training_steps": steps, "cpu_minutes": 1.0, "cpu_minutes_in_all": steps / 100}
        monkeypatch.setattr(bench_quality, "training_facts", lambda folder, facts=facts: dict(facts))
        rows += campaign("--steps", "1", "--snapshots")
    assert len(rows) == 2 and all("weights" not in row for row in rows)  # no baselines
    curve = tables.learning_curve(rows).splitlines()
    assert curve[0].endswith("| steps | CPU minutes in all | scenes val2017, 4 |")
    assert [line.split(" | ")[1:3] for line in curve[2:]] == [["500", "5"], ["1000", "10"]]
    assert tables.learning_curve(rows) in tables.quality(rows)


def test_arms_stand_apart(campaign, monkeypatch):
    facts = {"training_steps": 900, "cpu_minutes": 20.0, "cpu_minutes_in_all": 23.0}
    monkeypatch.setattr(bench_quality, "training_facts", lambda folder: dict(facts))
    rows = campaign("--steps", "1", "2", "--arms")
    assert [row["case"]["steps"] for row in rows] == [1, 2] and all(row["case"]["arm"] for row in rows)
    compared, everything = tables.comparison(rows), tables.quality(rows)
    assert compared in everything and everything.count("| small |") == 2
    assert compared.splitlines()[2].endswith("| 900 | 20.0 |")
    assert not quality_curve.curves(rows)


def test_wrong_pixels_are_counted_by_agreement():
    """Segment 7 has a match, which a pixel of segment 8 is outside of; 9 has none; void and crowds do not count."""
    ids = np.array([[7, 7, 7, 8, 9, 9, 0, 6]], np.int32)
    found = np.array([[1, 1, 1, 1, 2, 1, 2, 2]], np.int32)
    agreement = np.array([[1, 1, 0.875, 0.75, 0.5, 0.25, 0.5, 1]], np.float32)
    segments = [{"id": each, "category_id": 1, "iscrowd": int(each == 6)} for each in (6, 7, 8, 9)]
    result = EnsembleResult(found, [{"id": 1}, {"id": 2}], agreement, 0)
    assert count_bands(ids, segments, result).tolist() == [[2, 1, 1, 2], [2, 1, 0, 0]]


def test_agreement_has_a_table_of_its_own(campaign):
    rows = campaign("--steps", "1", "--agreement", "2")
    assert [row["case"]["agreement"] for row in rows] == ["up to 0.5", "to 0.75", "below 1", "1", "any"]
    assert {row["name"] for row in rows} == {"wrong pixels"} and all(0 <= row["value"] <= 100 for row in rows)
    assert sum(row["pixels"] for row in rows[:-1]) == pytest.approx(100) and rows[-1]["pixels"] == 100
    assert rows[1]["pixels"] == 0  # of two samples
    both = tables.quality([*campaign("--steps", "1"), *rows])
    assert tables.wrong_by_agreement(rows) in both and both.count("| small |") == 6
    with pytest.raises(ArgumentError, match=r"--flip True: does nothing, as --agreement samples the model as it is"):
        bench_quality.main(["small=x", "--data", "x", "--agreement", "2", "--flip", "--quick"])


def test_inpainting_along_edges(campaign):
    plain, sharp = (campaign("--steps", "1", "--inpainting", "--limit", "1", *more) for more in ([], ["--edges", "2"]))
    assert "views" not in plain[0]["case"] and sharp[0]["case"]["views"] == "edges 2"
    assert [row["variant"] for row in sharp if "views" in row["case"]] == ["small", "without given pixels"]
    assert "inpainting, blocks of 16 px, edges 2" in tables.quality([row | {"environment": {}} for row in sharp])


def test_inpainting(campaign):
    rows = campaign("--steps", "1", "--inpainting")
    assert rows[0]["variant"] == "small" and len(rows) == 4
    for row in rows:
        assert row["case"]["mode"] == "inpainting" and row["case"]["block"] == 16
        assert len(row["by_probability"]) == 9 and 0 <= row["value"] <= 100


def test_a_stopped_campaign_goes_on(campaign, tmp_path, monkeypatch):
    journal = tmp_path / "deep" / "journal.jsonl"
    calls = []
    original = bench_quality.evaluate

    def stops(*arguments):
        calls.append(arguments[2].steps)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(bench_quality, "evaluate", stops)
    with pytest.raises(KeyboardInterrupt):
        campaign("--steps", "1", "2", "--journal", str(journal))
    with journal.open("a") as file:
        file.write('{"key": "half a li')
    first = json.loads(journal.read_text().splitlines()[0])["rows"][0]
    rows = campaign("--steps", "1", "2", "--journal", str(journal))
    assert calls == [1, 2, 2]
    assert campaign("--steps", "1", "2", "--journal", str(journal)) == rows and calls == [1, 2, 2]
    assert rows[0]["ms_per_image"] == first["ms_per_image"]  # as it was measured then


def test_annotators_are_averaged(scenes, tmp_path):
    """Each has a root of its own; values are means, counts are sums."""
    root = tmp_path / "several"
    (root / "annotations").mkdir(parents=True)
    content = json.loads((scenes / "annotations" / "panoptic_val2017.json").read_text())
    images, maps = content["images"][:2], content["annotations"][:2]
    twice = [image | {"id": 10 * image["id"] + who, "annotator": who} for image in images for who in (0, 1)]
    both = [each | {"image_id": 10 * each["image_id"] + who} for each in maps for who in (0, 1)]
    (root / "annotations" / "panoptic_val2017.json").write_text(
        json.dumps(content | {"images": twice, "annotations": both})
    )
    for name in ("val2017", "panoptic_val2017"):
        (root / name).symlink_to(scenes / name)
    with annotator_roots(scenes, "val2017") as roots:
        assert roots == [scenes]
    rows = mean_over_annotators(
        root, "val2017", lambda part: classical_rows(Tuned(Classical("slic", SLIC), "-", 0.0), part, "val2017", 0)
    )
    alone = classical_rows(Tuned(Classical("slic", SLIC), "-", 0.0), str(root), "val2017", 0)
    assert rows[0]["case"] == alone[0]["case"] | {"annotators": 2} and rows[0]["case"]["images"] == 4
    assert rows[0]["by_annotator"] == [rows[0]["value"]] * 2  # both drew the same
    assert (rows[0]["tp"], rows[0]["value"]) == (alone[0]["tp"], pytest.approx(alone[0]["value"]))


def test_other_weights_are_other_rows(model_dir, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    assert fingerprint(other) == fingerprint(model_dir)
    path = other / "unet" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert fingerprint(other) != fingerprint(model_dir)
    assert Journal(None).rows_of({"a": 1}, lambda: [{"value": 1}]) == [{"value": 1}]


def test_an_auto_encoder_is_measured_by_reconstruction(model_dir, scenes):
    run = Run("quality", quick=True)
    settings = [f"{model_dir}-autoencoder", "--data", str(scenes), "--limit", "2", "--steps", "1", "4", "--seeds", "3"]
    measure(bench_quality.build_parser().parse_args(settings), run)
    own = run.results[0]
    assert own["case"]["mode"] == "reconstruction" and own["case"]["size"] == 64
    assert [row["variant"] for row in run.results].count(own["variant"]) == 1


def test_classical_methods_are_tuned_on_the_training_split(campaign, monkeypatch):
    pytest.importorskip("skimage")
    monkeypatch.setitem(
        classical.GRIDS, "felzenszwalb", {"scale": (100.0, 800.0), "sigma": (0.0,), "min_share": (0.01,)}
    )
    monkeypatch.setitem(classical.GRIDS, "slic", {"n_segments": (4, 10), "compactness": (10.0,), "sigma": (0.0,)})
    monkeypatch.delitem(classical.METHODS, "merged slic")
    rows = campaign("--steps", "1", "--classical", "train2017", "--tuning-images", "6")
    found = {row["variant"]: row for row in rows}
    for method in ("felzenszwalb", "slic"):
        row = found[method]
        assert row["tuned_on"].startswith("train2017, 6 maps") and row["case"]["images"] == 4
        assert 0 <= row["value"] <= 100 and row["ms_per_image"] > 0 and row["setting"].startswith(method)


def test_each_set_has_its_own_rows(scenes, monkeypatch):
    pytest.importorskip("skimage")
    for method in ("slic", "merged slic"):
        monkeypatch.delitem(classical.METHODS, method)
    monkeypatch.setitem(classical.GRIDS, "felzenszwalb", {"scale": (800.0,), "sigma": (0.0,), "min_share": (0.1,)})
    run = Run("quality", quick=True)
    sets = [f"{scenes}:val2017:val2017", f"{scenes}:val2017:train2017"]
    arguments = ["--data", *sets, "--limit", "2", "--classical", "train2017", "--tuning-images", "2"]
    measure(bench_quality.build_parser().parse_args(arguments), run)
    found = {(row["case"]["split"], row["variant"]) for row in run.results}
    names = ("felzenszwalb", "one segment", "halves", "grid 3x3")
    assert found == {(split, name) for split in ("val2017", "train2017") for name in names}
    assert "val2017, 2 maps of 2 pictures" in next(row["tuned_on"] for row in run.results if "tuned_on" in row)


def test_a_set_with_splits_of_its_own_gives_the_names_too(category_scenes, monkeypatch):
    """A list with commas is as good as several entries; what is not validated on has no rows."""
    pytest.importorskip("skimage")
    for method in ("slic", "merged slic"):
        monkeypatch.delitem(classical.METHODS, method)
    monkeypatch.setitem(classical.GRIDS, "felzenszwalb", {"scale": (800.0,), "sigma": (0.0,), "min_share": (0.1,)})
    run = Run("quality", quick=True)
    sets = f"{category_scenes}:val2017:val2017,{category_scenes}:train2017:"
    arguments = ["--data", sets, "--limit", "2", "--classical", "train2017", "--names", "train2017"]
    measure(bench_quality.build_parser().parse_args([*arguments, "--tuning-images", "2"]), run)
    (named,) = [row for row in run.results if "nearest neighbour" in row["variant"]]
    assert named["case"]["split"] == "val2017" and "names from val2017, " in named["tuned_on"]
    assert {row["case"]["split"] for row in run.results} == {"val2017"}


def test_models_with_categories_have_two_rows(category_model, category_scenes):
    def modes(*more):
        run = Run("quality", quick=True)
        arguments = [f"small={category_model}", "--data", str(category_scenes), "--limit", "2", "--steps", "1", *more]
        measure(bench_quality.build_parser().parse_args(arguments), run)
        return [row["case"]["mode"] for row in run.results if row["variant"] == "small"]

    assert modes() == ["class-agnostic", "class-aware"] and modes("--class-agnostic") == ["class-agnostic"]


def test_the_front_has_what_nothing_beats():
    points = [(5.0, 10.0), (1.0, 4.0), (2.0, 3.0), (2.0, 6.0), (9.0, 10.0), (7.0, 12.0)]
    assert pareto_front(points) == [(1.0, 4.0), (2.0, 6.0), (5.0, 10.0), (7.0, 12.0)]


def row(variant, steps, solver, value, ms):
    case = {"data": "scenes", "split": "val2017", "images": 500, "steps": steps, "solver": solver}
    return {"variant": variant, "case": case, "value": value, "ms_per_image": ms, "deviation": 0.3}


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row("a", 4, "ddim", 30.0, 9.0), row("a", 1, "ddim", 20.0, 3.0), row("a", 4, "heun", 31.0, 17.0)]
    rows.append({"variant": "grid 3x3", "case": {"data": "scenes"}, "value": 4.0})
    assert {label: [r["case"]["steps"] for r in group] for label, group in curves(rows).items()} == {
        "a": [1, 4],
        "a, heun": [4],
    }
    for suffix in (".png", ".svg"):
        draw_curve(rows, tmp_path / "new" / f"curve{suffix}")
        assert (tmp_path / "new" / f"curve{suffix}").stat().st_size > 5000
    with pytest.raises(BenchmarkError, match="nothing to draw"):
        draw_curve(rows[-1:], tmp_path / "empty.png")


def test_the_picture_of_all_files(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert quality_curve.main([str(tmp_path / "x.png"), "scenes20k", "val2017", "500"]) == 0
    assert (tmp_path / "x.png").stat().st_size > 5000
    with pytest.raises(BenchmarkError, match="nothing to draw"):
        quality_curve.main([str(tmp_path / "y.png"), "nowhere", "val2017", "500"])
    assert quality_curve.main([]) == 2
    assert "quality_curve FILE DATA SPLIT IMAGES" in capsys.readouterr().err


def test_the_command_says_what_is_missing(capsys):
    with pytest.raises(SystemExit):
        bench_quality.main(["--data", "somewhere"])
    assert "NAME=MODEL_DIR" in capsys.readouterr().err


def test_quick_saves_nothing(model_dir, scenes, capsys):
    arguments = [f"x={model_dir}", "--data", str(scenes), "--quick", "--steps", "1"]
    assert bench_quality.main(arguments) == 0
    assert "saved" not in capsys.readouterr().out


def test_the_picture_of_photographs(model_dir, tmp_path, capsys):
    pytest.importorskip("skimage")
    assert photographs_picture.main([str(model_dir), str(tmp_path / "photographs.png")]) == 0
    with Image.open(tmp_path / "photographs.png") as picture:
        assert picture.width > 4 * 300 and picture.height > 2 * 200
    assert photographs_picture.main([]) == 2 and "MODEL FILE" in capsys.readouterr().err


def test_trainings_of_one_recipe_share_a_row():
    def row(value, weights, **more):
        case = {"data": "scenes", "split": "val2017", "images": 4, "mode": "class-agnostic", "steps": 1} | more
        return {"variant": "own", "case": case, "value": value, "sq": 50.0, "rq": 2 * value, "weights": weights}

    rows = [row(10.0, "a"), row(3.0, "a", solver="heun"), row(14.0, "b"), row(10.0, "a"), row(12.0, "c")]
    mean, alone = mean_over_trainings(rows)
    assert mean["value"] == 12.0 and mean["deviation"] == 2.0 and mean["rq"] == 24.0 and "weights" not in mean
    assert mean["case"]["trainings"] == 3 and mean["by_training"] == [10.0, 14.0, 12.0]
    assert alone == rows[1]
    mean |= {"environment": {}, "ms_per_image": 1.0}
    assert "| 1 steps, mean of 3 trainings | 12.0 ± 2.0 |" in tables.quality([mean])


def test_trainings_of_which_one_left_no_log():
    case = {"data": "scenes", "split": "val2017", "images": 4, "mode": "inpainting", "block": 16}
    rows = [
        {"variant": "own", "case": case, "value": value, "weights": weights, "by_probability": {"0.5": value}}
        for value, weights in ((10.0, "a"), (14.0, "b"))
    ]
    [row] = mean_over_trainings([rows[0] | {"cpu_minutes": 3.0}, rows[1]])
    assert row["value"] == 12.0 and row["by_probability"] == {"0.5": 12.0} and "cpu_minutes" not in row


def test_a_learning_curve_of_several_trainings():
    def row(value, weights, steps):
        case = {"data": "scenes", "split": "val2017", "images": 4, "mode": "class-agnostic", "training_steps": steps}
        return {"variant": "own", "case": case, "value": value, "weights": weights, "cpu_minutes_in_all": steps / 10}

    rows = mean_over_trainings([row(1.0, "a", 30), row(3.0, "b", 30), row(7.0, "c", 60)])
    assert [each["value"] for each in rows] == [2.0, 7.0] and all("weights" not in each for each in rows)
    line = tables.learning_curve(rows).splitlines()[2]
    assert line == "| own | 30 | 3 | 2.0 ± 1.4 |"
