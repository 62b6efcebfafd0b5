"""The cost model: exact on points that obey it, honest about those that do not, and right in its limits."""

import json
import re
from dataclasses import replace

import pytest
import torch

from benchmarks import bench_scaling, scaling
from benchmarks.harness import BenchmarkError, validate
from benchmarks.measuring import cost_model, image_cost
from benchmarks.measuring.cost_model import ACCELERATORS, Fit, Point, fit, gradient_traffic, held_out_errors, predict
from benchmarks.reporting import scaling_tables
from ldmseg_fast.config.presets import COCO, PRESETS
from ldmseg_fast.training import estimate

H200 = ACCELERATORS["H200"]


def test_what_an_image_of_the_fast_preset_costs():
    fast, paper = (image_cost.network_costs(PRESETS[name]) for name in ("coco-fast", "coco"))
    assert 100e6 < fast["unet"].parameters < 200e6 and 810e6 < paper["unet"].parameters < 820e6
    assert paper["unet"].operations == pytest.approx(0.771e12, rel=0.01)  # as counted of the network itself
    assert paper["encoder"].operations > paper["unet"].operations
    seconds = {name: cost.seconds(H200, 0.4, 16) for name, cost in fast.items()}
    assert sum(seconds.values()) < 1 / 600
    unet = fast["unet"]
    assert unet.seconds(H200, 0.4, 1, "fp8") == pytest.approx(unet.seconds(H200, 0.4, 1) / 2)
    text = "\n".join(image_cost.image_lines("coco-fast", PRESETS["coco-fast"], H200, 0.4))
    assert text.count("arithmetic") == 4 and "1 steps" in text


def test_exact_points_are_fitted_exactly():
    true = Fit(overhead=0.004, rate=50e9)
    points = [Point("", calls, work, true.seconds(Point("", calls, work, 0))) for calls, work in
              [(1, 1e9), (1, 8e9), (3, 7e9), (1, 3e10)]]  # fmt: skip
    found = fit(points)
    assert found.overhead == pytest.approx(0.004) and found.rate == pytest.approx(50e9)
    assert max(map(abs, held_out_errors(points))) < 1e-9


def test_constants_are_never_negative():
    found = fit([Point("", 1, 1e9, 1.0), Point("", 1, 2e9, 0.5)])  # more work in less time
    assert found.overhead >= 0 and found.rate > 0
    with pytest.raises(BenchmarkError, match="two are needed"):
        fit([Point("", 1, 1e9, 1.0)])


def test_held_out_errors_see_a_point_that_does_not_fit():
    points = [Point("", 1, work, work / 1e10) for work in (1e9, 2e9, 4e9, 8e9)]
    points.append(Point("odd", 1, 1e9, 0.3))
    assert held_out_errors(points)[-1] == pytest.approx(-2 / 3, abs=0.01)


def test_each_kind_has_constants_of_its_own():
    slow, fast = Fit(0.010, 20e9), Fit(0.001, 80e9)
    points = [Point(f"{kind} {work}", 1, work, true.seconds(Point("", 1, work, 0)), kind)
              for kind, true in (("slow", slow), ("fast", fast)) for work in (1e9, 2e9, 8e9)]  # fmt: skip
    assert max(map(abs, held_out_errors(points))) < 1e-9


def test_points_are_measured_recorded_and_fitted(tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        assert bench_scaling.main(["--quick", "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    (path,) = tmp_path.glob("scaling-*.json")
    record = json.loads(path.read_text())
    validate(record)
    assert not scaling_tables.cpu_points(tmp_path)  # quick runs are no results
    path.write_text(json.dumps(record | {"quick": False}))
    points = scaling_tables.cpu_points(tmp_path)
    assert [point.kind for point in points] == [scaling_tables.STEP] * 3 + [scaling_tables.PASSES] * 3
    assert points[2].operations == pytest.approx(4 * points[0].operations)
    assert points[3].operations == pytest.approx(3 * points[0].operations, rel=0.05)  # a backward pass is two forward
    text = scaling_tables.fit_section(points, tmp_path)
    assert text.count("Fitted to 3 points") == 2 and f"| {scaling_tables.PASSES}, batch 4 |" in text


def test_too_few_points_are_no_fit(tmp_path):
    text = scaling_tables.fit_section([Point("one", 1, 1e9, 0.1, scaling_tables.STEP)] * 2, tmp_path)
    assert "Too few CPU points" in text and "held-out" not in text


def test_traffic_of_the_zero_stages():
    weights = 4.0 * 1000 * 7 / 8
    assert gradient_traffic(1000, 8, 0, 2) == (2 * weights, 0)
    assert gradient_traffic(1000, 8, 1, 2) == gradient_traffic(1000, 8, 2, 2) == (weights, weights)
    assert gradient_traffic(1000, 8, 3, 2) == (weights, 3 * weights)
    assert gradient_traffic(1000, 1, 1, 2) == (0, 0)


def test_predictions_have_the_right_limits():
    one, eight, many = (predict(COCO, H200, gpus, 0.4) for gpus in (1, 8, 64))
    # the paper's network: 2 forward passes, the second recomputed, and a backward pass of two
    assert one.images_per_second == pytest.approx(0.4 * H200.peak / (5 * 0.771e12), rel=0.02)
    assert 7 < eight.images_per_second / one.images_per_second <= 8
    assert eight.images_per_second < many.images_per_second < 64 * one.images_per_second
    assert one.memory_bytes > eight.memory_bytes > many.memory_bytes
    assert one.exposed_seconds == 0 < eight.exposed_seconds
    assert one.days == pytest.approx(one.gpu_hours / 24)


@pytest.mark.parametrize("gpus", [8, 16, 32, 64])
def test_memory_is_what_a_dry_run_forecasts(gpus):
    """By the numbers that it prints for as many ranks and the same images at a time, at every stage of ZeRO."""
    pieces = -(-256 // gpus // 32)
    train = replace(COCO.train, batch_size=256, accumulation=pieces, precision="bf16")
    lines = "\n".join(estimate.report("diffusion", replace(COCO, train=train), gpus))
    states = [float(found) for found in re.findall(r"ZeRO \d: +([\d.]+)", lines)]
    kept, recomputed = re.search(r"GiB: ([\d.]+); with train\.checkpointing=blocks ([\d.]+)", lines).groups()
    activations = float(kept if COCO.train.checkpointing == "none" else recomputed)
    for zero_stage, state in enumerate(states):
        found = predict(COCO, H200, gpus, 0.4, zero_stage=zero_stage).memory_bytes / 2**30
        assert found == pytest.approx(state + activations, abs=0.02)


def test_communication_hides_behind_the_backward_pass_alone():
    for gpus in (8, 16, 32, 64):
        stages = [predict(COCO, H200, gpus, 0.4, zero_stage=zero_stage) for zero_stage in range(4)]
        for found in stages:
            assert 0 <= found.exposed_seconds <= found.communication_seconds
            assert 256 / found.images_per_second >= found.exposed_seconds
        assert stages[3].communication_seconds > stages[2].communication_seconds
        assert stages[1].exposed_seconds == stages[2].exposed_seconds < stages[3].exposed_seconds
        slow = replace(H200, nvlink=H200.nvlink / 10, network=H200.network / 10)
        assert predict(COCO, slow, gpus, 0.4).images_per_second < stages[1].images_per_second


def test_predictions_for_a_gpu_do_not_depend_on_this_machine(monkeypatch):
    asked = []
    resolve = lambda name, device: asked.append(name) or (name, "")  # noqa: E731
    monkeypatch.setattr(estimate, "resolve_precision", resolve)
    cost_model._sizes.__wrapped__(COCO)
    assert COCO.train.precision == "auto" and asked == ["bf16"]


def test_a_slow_input_pipeline_limits():
    assert predict(COCO, H200, 8, 0.4, cores=4, data=0.1).images_per_second == pytest.approx(8 * 4 / 0.1)


def test_the_section_says_what_was_not_measured():
    text = scaling_tables.scaling_section()
    assert "Data-sheet values" in text and "| 64 |" in text
    if not scaling_tables.load_rows("gpu"):
        assert "No GPU point has been measured yet" in text


def test_the_cost_is_gpu_hours_times_the_price(capsys):
    assert scaling.main(["--price", "2.5"]) == 0
    text = capsys.readouterr().out
    assert "| cost at 2.5 a GPU hour |" in text
    row = next(line for line in text.splitlines() if line.startswith("| 8 |")).strip("| ").split(" | ")
    hours, cost = ([float(value) for value in row[place].split(" to ")] for place in (5, 7))
    assert cost == [pytest.approx(2.5 * value, abs=1.5) for value in hours]
    assert scaling.main(["--batch", "256", "--price", "2"]) == 0
    assert "GPU hours at 2: " in capsys.readouterr().out
    for wrong in ("-1", "nan", "much"):
        with pytest.raises(SystemExit):
            scaling.main(["--price", wrong])
