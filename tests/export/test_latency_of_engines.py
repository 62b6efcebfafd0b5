"""`bench_latency.py` over the engine double and over ONNX Runtime: one table, and batches that go in parts say so."""

import json

import pytest

from benchmarks import bench_latency
from benchmarks.peers import candidates
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.errors import ArgumentError, BackendError


def measure(model_dir, out, *arguments):
    fixed = ["--model", str(model_dir), "--device", "cpu", "--quick", "--minutes", "5", "--variants", "none"]
    fixed += ["--parts", "step", "--sizes", "48x64", "--out", str(out)]
    code = bench_latency.main([*fixed, *map(str, arguments)])
    record = json.loads(next(out.glob("latency-*.json")).read_text())
    return code, [row for row in record["results"] if row["name"] == "one step"]


def test_engines_and_graphs_in_one_table(model_dir, graphs, half_graphs, engines, trt, tmp_path, capsys):
    folders = ("--engine-dir", graphs, half_graphs, engines)
    code, rows = measure(model_dir, tmp_path, *folders, "--batch", 1, 6)
    assert code == 0
    found = {(row["variant"], row["case"]["batch"]) for row in rows}
    baseline = rows[0]["baseline"]
    graphs_only = {(name, batch) for name in (baseline, "onnxruntime fp32", "onnxruntime fp16") for batch in (1, 6)}
    assert found == graphs_only | {("tensorrt fp32", 1), ("tensorrt fp32, in parts of 4+2", 6)}
    assert all(row["quality"]["pixels_alike"] > 0.9 for row in rows)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert warnings == ["warning: one step: tensorrt fp32, in parts of 4+2 (tensorrt fp32 takes no batch of 6)"]


def test_names_of_engines(model_dir, graphs, tmp_path):
    info = read_model_info(model_dir)
    other = tmp_path / "other"
    other.symlink_to(graphs)
    names = list(candidates.engine_candidates(info, "cpu", [graphs, other]))
    assert names == [f"onnxruntime fp32 ({graphs})", f"onnxruntime fp32 ({other})"]
    with pytest.raises(ArgumentError, match="named twice"):
        candidates.engine_candidates(info, "cpu", [graphs, graphs])
    with pytest.raises(BackendError, match=r"no export\.json in it"):
        candidates.engine_candidates(info, "cpu", [tmp_path])


def test_batches_that_are_filled_up():
    backend = type("Backend", (), {"batches": {"denoiser": ((4, 4),), "mask_decoder": ((1, 1),)}})()
    pipeline = object.__new__(candidates.OurPipeline)
    pipeline.backend = backend
    assert [pipeline.label(batch) for batch in (4, 3, 6)] == [
        "", ", filled up from 3 to 4", ", in parts of 4+2, filled up from 2 to 4",
    ]  # fmt: skip
