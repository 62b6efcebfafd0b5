"""The benchmark of quantised graphs: its rows, on generated scenes and on sets that are given."""

import json

import pytest

from benchmarks import bench_quantised
from benchmarks.bench_quantised import CPU_INT8, PLAIN, TORCH_FP8
from benchmarks.measuring.builder_log import engine_layers, fusions


def keep(monkeypatch, **parts):
    """Leaves these exports only."""
    for name, kept in parts.items():
        values = getattr(bench_quantised, name)
        monkeypatch.setattr(bench_quantised, name, {each: values[each] for each in kept})


@pytest.mark.parametrize(
    "given", [pytest.param(False, id="scenes", marks=pytest.mark.soak), pytest.param(True, id="given")]
)
def test_a_run(model_dir, scenes, tmp_path, given, monkeypatch):
    pytest.importorskip("onnxruntime")
    keep(monkeypatch, EXPORTS=("fp32", CPU_INT8), SIZES=(CPU_INT8,), LOSSES=(CPU_INT8, TORCH_FP8))
    arguments = [
        str(model_dir),
        "--parts",
        "graphs",
        "quality",
        "--images",
        "2",
        "--seeds",
        "1",
        "--rounds",
        "2",
        "--out",
        str(tmp_path),
    ]
    arguments += ["--data", f"{scenes}:train2017:val2017"] if given else []
    assert bench_quantised.main(arguments) == 0
    (path,) = tmp_path.glob("quantised-*.json")
    rows = json.loads(path.read_text())["results"]
    named = {"model": str(model_dir.name), "data": f"{scenes.name} val2017"} if given else {}
    for row in rows:
        assert named.items() >= {key: row["case"][key] for key in ("model", "data") if key in row["case"]}.items()
    pq = {row["variant"]: row for row in rows if row["name"] == "PQ"}
    assert pq.keys() == {PLAIN, CPU_INT8, TORCH_FP8}
    assert pq[PLAIN]["case"] == {**named, "images": 2, "seeds": 1, "steps": 10}
    for lost in (row for row in rows if row["name"] == "PQ lost"):
        assert lost["value"] == pq[PLAIN]["value"] - pq[lost["variant"]]["value"] and lost["target"] == 0.3


def test_engines_keep_their_fusions(model_dir, tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx", reason="pip install 'ldmseg_fast[rtx]'")
    keep(monkeypatch, EXPORTS=("fp16", "int8, tensorrt"))
    assert bench_quantised.main([str(model_dir), "--parts", "engines", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("quantised-*.json")
    rows = json.loads(path.read_text())["results"]
    half, eight = ({row["name"]: row for row in rows if row["variant"] == name} for name in ("fp16", "int8, tensorrt"))
    for name in ("attentions in one layer", "layers of norms"):
        assert half[name]["unit"] == eight[name]["unit"]
    assert half["attentions in one layer"]["value"] == eight["attentions in one layer"]["value"]
    # fewer layers are better fused; attention of so few channels a head is fused in none
    assert half["layers of norms"]["value"] >= eight["layers of norms"]["value"] > 0
    assert half["weights of 8 bits"]["value"] == 0 < half["layers of the engine"]["value"]
    assert eight["weights of 8 bits"]["value"] > 50
    for name in ("convolutions of 8 bits", "products of 8 bits"):
        assert half[name]["value"] == 0 < eight[name]["value"] < int(eight[name]["unit"].removeprefix("of "))


def test_layers_are_read_from_the_log():
    tensor = "Dimensions: [{}], Strides: [1], StrideOrder: [0], Datatype: {}, Format: (Linear)"
    one = f"Inputs: [ {{ Name: a, {tensor.format('-1,4', 'Int8')} }}], Constants: [ {{ Name: w, "
    lines = [
        "Registering layer: conv",
        f"Engine Layer Information:\nName: c, LayerType: correlation, {one}{tensor.format('8,4', 'Int8')} }}], "
        f"Outputs: [], TacticName: , StreamId: 0, Metadata: [ONNX Layer: conv][ONNX Layer: silu]",
        "Name: s, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 1",
    ]
    convolution, signal = engine_layers(lines)
    assert convolution.inputs == ("Int8",) and convolution.weights == {"Int8": 32}
    assert convolution.nodes == {"conv", "silu"} and signal.kind == "signal" and not signal.nodes
    found = fusions([convolution, signal], {"conv": "Conv", "softmax": "Softmax", "silu": "Mul"})
    assert found["convolutions of 8 bits"] == (1, "of 1") and found["attentions in one layer"] == (0, "of 1")
    assert found["weights of 8 bits"] == (100, "%") and found["layers of the engine"] == (2, "layers")
