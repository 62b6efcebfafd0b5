"""Quantised graphs: what the passes put into them, what stays as it is, and how small they are."""

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from ldmseg_fast.backends.graphs.manifest import read_manifest
from ldmseg_fast.backends.graphs.modules import build_graph
from ldmseg_fast.backends.graphs.specs import GraphOptions, graph_specs, sample_inputs
from ldmseg_fast.backends.load import load_backend
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.errors import BackendError
from ldmseg_fast.export import calibration, cpu_graph, model_export, to_onnx, to_trt
from ldmseg_fast.export.calibration import Scale, _ends, calibrate, fake_quantize
from ldmseg_fast.export.cpu_graph import rewrite_for_cpu
from ldmseg_fast.export.float_twin import flow_scales
from ldmseg_fast.export.graph_export import export_graph
from ldmseg_fast.export.model_export import ExportSettings, resolve_options, write_graphs
from ldmseg_fast.export.networks import load_network
from ldmseg_fast.export.parity_reference import Quantised, _GraphAttention, _quantise
from ldmseg_fast.export.parity_rows import relative_error
from ldmseg_fast.export.quantize import quantize_graph
from ldmseg_fast.models.layers import Attention
from tests.conftest import make_model

PAIRS = {"QuantizeLinear", "DequantizeLinear"}
WIDE = ("unet.block_out_channels=32,192",)  # weights outweigh nodes and the embedding of the time
KINDS = {
    "fp32": ExportSettings("fp32"),
    "fp16": ExportSettings("fp16"),
    "fp8": ExportSettings("fp8"),
    "int8": ExportSettings("int8", runtime="tensorrt"),
    "int8 for a CPU": ExportSettings("int8"),
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model with one wide level."""
    return make_model(tmp_path_factory.mktemp("wide") / "model", WIDE)


@pytest.fixture(scope="module")
def denoiser(wide, scenes, tmp_path_factory):
    """A function: the path of the wide model's denoiser, exported as one of KINDS; made once, without other graphs."""
    root, info = tmp_path_factory.mktemp("denoisers"), read_model_info(wide)

    def get(kind: str) -> Path:
        folder, settings = root / kind, replace(KINDS[kind], calibration=str(scenes))
        if not folder.exists():
            folder.mkdir()
            with pytest.MonkeyPatch.context() as patch:
                only = {"denoiser": graph_specs(info, resolve_options(info, settings))["denoiser"]}
                patch.setattr(model_export, "graph_specs", lambda *_: only)
                write_graphs(info, folder, resolve_options(info, settings), settings)
        return folder / "denoiser.onnx"

    return get


def nodes(path):
    return onnx.load(path).graph.node


def bytes_of(path):
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_all_but_the_pairs_is_as_in_half_precision(denoiser, kind):
    plain, quantised = (Counter(node.op_type for node in nodes(denoiser(name))) for name in ("fp16", kind))
    pairs = {name: quantised.pop(name) for name in PAIRS}
    assert quantised == plain and plain["GroupNormalization"] and not plain["InstanceNormalization"]
    scales = flow_scales(denoiser(kind))
    fused = sum(name.endswith(".to_k/inputs") for name in scales)
    products = sum(name.endswith("/inputs") for name in scales) - 2 * fused
    flows = len(scales) - 2 * fused
    assert pairs == {"QuantizeLinear": flows, "DequantizeLinear": flows + products}


@pytest.mark.parametrize(("size", "share"), [(5, 0.0), (1000, 3e-5), (100_003, 3e-5), (100_003, 0.02)])
def test_ends_are_those_of_sorted_values(size, share):
    torch.manual_seed(0)
    values = torch.randn(size).round(decimals=2)  # with equal ones
    cut = int(share * size)
    in_order = values.sort().values
    assert _ends(values, share) == (in_order[cut].item(), in_order[size - 1 - cut].item())


@pytest.mark.parametrize(
    ("kind", "than", "ratio"), [("fp8", "fp16", 0.55), ("int8", "fp16", 0.55), ("int8 for a CPU", "fp32", 0.30)]
)
def test_weights_are_stored_in_eight_bits(denoiser, kind, than, ratio):
    assert bytes_of(denoiser(kind)) <= ratio * bytes_of(denoiser(than))
    assert [o.version for o in onnx.load(denoiser(kind)).opset_import if o.domain == ""] == [21]


def test_the_cpu_multiplies_integers_in_every_layer(wide, denoiser, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3  # it warns that such a file is for this machine
    onnxruntime.InferenceSession(str(denoiser("int8 for a CPU")), options)
    found = Counter(node.op_type for node in nodes(tmp_path / "optimised.onnx"))
    scales = flow_scales(denoiser("int8 for a CPU"))
    convolutions = sum(name.endswith("/outputs") for name in scales)
    attentions = sum(name.endswith(".to_k/inputs") for name in scales)
    of_time, gated = (sum(name.endswith(f".{part}/inputs") for name in scales) for part in ("time_emb_proj", "proj"))
    assert not any(name.endswith("/softmax") for name in scales)
    assert found["QLinearConv"] == convolutions
    # one product makes all projections of the time; a gate and what it gates are two
    assert found["MatMulIntegerToFloat"] == len(scales) - 2 * convolutions - (of_time - 1) + gated
    assert found["MultiHeadAttention"] == attentions and not found["Softmax"]
    assert found["Split"] == 1 + 1  # the projections of the time, and the step's coefficients
    assert found["Conv"] == 1  # the last
    assert all(scale.unsigned for scale in scales.values())


def test_sums_of_two_products_fit_sixteen_bits(wide, denoiser):
    """Without VNNI a CPU adds them so: unsigned weights, which it adds in 32 bits, give the same."""
    path = denoiser("int8 for a CPU")
    model = onnx.load(path)
    place = {"DequantizeLinear": 2, "MatMulIntegerToFloat": 5}
    zeros = {node.input[place[node.op_type]] for node in model.graph.node if node.op_type in place}
    stored = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and t.name not in zeros]
    assert stored and {int(abs(onnx.numpy_helper.to_array(t).astype(int)).max()) for t in stored} == {64}
    info = read_model_info(wide)
    spec = graph_specs(info, resolve_options(info, KINDS["int8 for a CPU"]))["denoiser"]
    inputs = sample_inputs(spec, info, {"batch": 1})
    found = []
    for precise in "01":
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", precise)
        session = onnxruntime.InferenceSession(str(path), options)
        found.append(torch.from_numpy(session.run(None, {name: x.numpy() for name, x in inputs.items()})[0]))
    torch.testing.assert_close(*found)


def test_a_graph_for_the_cpu_computes_the_same_at_any_size(model_dir, tmp_path):
    info = read_model_info(model_dir)
    spec = graph_specs(info, GraphOptions())["denoiser"]
    module = build_graph(spec, info, {"unet": load_network(info, "unet", torch.float32)})
    export_graph(spec, module, info, tmp_path, 21, {}, [rewrite_for_cpu])
    kinds = {node.op_type for node in nodes(tmp_path / "denoiser.onnx")}
    assert not kinds & {"GroupNormalization", "Gemm"}
    session = onnxruntime.InferenceSession(str(tmp_path / "denoiser.onnx"))
    for batch, height, width in ((1, 16, 16), (3, 8, 12)):
        inputs = sample_inputs(spec, info, {"batch": batch, "latent_height": height, "latent_width": width})
        found = session.run(["model_output"], {name: value.numpy() for name, value in inputs.items()})[0]
        torch.testing.assert_close(torch.from_numpy(found), module(**inputs)[0], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def with_queries(tmp_path_factory):
    """A model whose UNet also attends to trained queries."""
    overrides = ("unet.conditioning=learned", "unet.cross_attention_dim=12", "conditioning.num_queries=5")
    return make_model(tmp_path_factory.mktemp("queries") / "model", overrides)


@pytest.mark.parametrize("model", ["model_dir", "with_queries"])
def test_fused_nodes_compute_what_pairs_do(model, scenes, tmp_path, monkeypatch, request):
    model, kinds = request.getfixturevalue(model), ("pairs", "products", "fused")
    info = read_model_info(model)
    steps = "" if info.conditioning else "2"
    settings = ExportSettings("int8", size="dynamic", calibration=str(scenes), sampler_steps=steps)
    options = resolve_options(info, settings)
    specs = {name: spec for name, spec in graph_specs(info, options).items() if "denoiser" in name or "sampler" in name}
    monkeypatch.setattr(model_export, "graph_specs", lambda *_: specs)
    for kind in kinds:
        (tmp_path / kind).mkdir()
        with monkeypatch.context() as patch:
            if kind == "pairs":
                patch.setattr(model_export, "fuse_for_cpu", lambda graph: None)
            elif kind == "products":  # attention rounds otherwise, and with it what is quantised next
                patch.setattr(cpu_graph, "_fuse_attention", lambda *_: None)
            write_graphs(info, tmp_path / kind, options, settings)
    for name, spec in specs.items():
        paths = [tmp_path / kind / f"{name}.onnx" for kind in kinds]
        assert flow_scales(paths[0]) == flow_scales(paths[1]) == flow_scales(paths[2])
        assert len(nodes(paths[0])) > len(nodes(paths[1])) > len(nodes(paths[2]))
        sessions = [onnxruntime.InferenceSession(str(path)) for path in paths]
        for batch, height, width in ((1, 16, 16), (3, 8, 12)):
            inputs = sample_inputs(spec, info, {"batch": batch, "latent_height": height, "latent_width": width})
            arrays = {key: value.numpy() for key, value in inputs.items()}
            pairs, products, fused = (torch.from_numpy(session.run(None, arrays)[0]) for session in sessions)
            assert relative_error(products, pairs) < 1e-5
            assert relative_error(fused, pairs) < 0.03  # what attention rounds otherwise is quantised next


@pytest.mark.parametrize(
    ("precision", "scale", "kind"),
    [
        ("int8", Scale(0.03), onnx.TensorProto.INT8),
        ("int8", Scale(0.03, 77, unsigned=True), onnx.TensorProto.UINT8),
        ("fp8", Scale(0.01), onnx.TensorProto.FLOAT8E4M3FN),
    ],
)
def test_the_emulation_rounds_as_onnx_does(precision, scale, kind):
    values = torch.cat([torch.linspace(-5, 5, 999), torch.tensor([0.015, 0.045, -0.015])])
    zero = onnx.helper.make_tensor("zero", kind, [], [scale.zero])
    step = onnx.numpy_helper.from_array(np.float32(scale.step), "step")
    pair = [
        onnx.helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["y"]),
    ]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None]) for name in "xy"]
    graph = onnx.helper.make_graph(pair, "pair", ends[:1], ends[1:], [zero, step])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    expected = ReferenceEvaluator(model).run(None, {"x": values.numpy()})[0]
    np.testing.assert_allclose(fake_quantize(values, scale, precision), expected, rtol=1e-6, atol=1e-7)


def test_outliers_are_cut_off(model_dir, monkeypatch):
    pictures = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    info = read_model_info(model_dir)
    few = calibrate(info, "int8", torch.float16, pictures)
    monkeypatch.setattr(calibration, "OUTLIERS", 0.01)
    many = calibrate(info, "int8", torch.float16, pictures)
    assert few.keys() == many.keys() and not any("conv_in" in name or "conv_out" in name for name in few)
    assert all(many[name].inputs.step <= scales.inputs.step for name, scales in few.items())
    assert sum(many[name].inputs.step < 0.9 * scales.inputs.step for name, scales in few.items()) > len(few) / 2
    eight = calibrate(info, "fp8", torch.float16, pictures)
    parts = [eight[f"mid_block.attentions.0.transformer_blocks.0.attn1.to_{part}"].weight for part in "qkv"]
    assert parts[0] == parts[1] == parts[2] and parts[0].ndim == 0


def some_pictures(count=2):
    return torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def of_attention(scales):
    """What is quantised of the attention in the middle: the layers' results, and the softmax's."""
    parts = {part: scales[f"mid_block.attentions.0.transformer_blocks.0.attn1.to_{part}"] for part in "qkv"}
    results = [part for part, layer in parts.items() if layer.outputs is not None]
    return results, next((layer.softmax.step for layer in parts.values() if layer.softmax is not None), None)


def test_attention_is_quantised_where_tensorrt_keeps_it_in_one_kernel(model_dir, heads_of_32, monkeypatch):
    def found(model, *settings):
        results, softmax = of_attention(
            calibrate(read_model_info(model), *settings[:2], some_pictures(), *settings[2:])
        )
        return "".join(results), softmax

    half = torch.float16
    assert found(heads_of_32, "int8", half) == ("qkv", pytest.approx(1 / 127, rel=1e-3))
    assert found(model_dir, "int8", half) == ("v", None)  # heads of 8
    assert found(heads_of_32, "fp8", half) == ("", None)
    assert found(heads_of_32, "int8", torch.float32) == ("", None)  # for ONNX Runtime
    assert found(heads_of_32, "int8", half, False) == ("v", None)
    monkeypatch.setattr(calibration, "MAX_TOKENS", 63)
    assert found(heads_of_32, "int8", half) == ("v", None)


class OneAttention(torch.nn.Module):
    """Stands for a graph's module: its `unet` holds one attention of two heads of 32 channels, q, k and v fused."""

    def __init__(self):
        super().__init__()
        self.unet = torch.nn.ModuleDict({"attn": Attention(64, 2, backend="sdpa")})
        attn = self.unet["attn"]
        attn.fused_qkv = torch.cat([attn.to_q.weight, attn.to_k.weight, attn.to_v.weight]).detach()

    def forward(self, x):
        return self.unet["attn"](x)


class TwoSteps(OneAttention):
    """Stands for a whole sampler: the steps share their weights, of which the exporter transposes the large ones."""

    def forward(self, x):
        return super().forward(super().forward(x))


def scales_of_attention(module):
    scales = {}
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        weight = module.unet["attn"].get_submodule(name).weight
        steps = weight.abs().amax(1, keepdim=True) / 127
        outputs = Scale({"to_q": 0.011, "to_k": 0.013, "to_v": 0.017}[name]) if name != "to_out.0" else None
        softmax = Scale(1 / 127) if name == "to_v" else None
        scales[f"attn.{name}"] = calibration.LayerScales(Scale(0.025), steps, outputs, softmax)
    return scales


@torch.no_grad()
def test_steps_that_share_large_weights_are_quantised_each():
    module, x = TwoSteps().eval(), torch.randn(1, 16, 64)
    program = torch.onnx.export(module, (x,), dynamo=True, opset_version=21, verbose=False)
    quantize_graph(program.model, module, module.unet, scales_of_attention(module), "int8")
    found = Counter(node.op_type for node in program.model.graph)
    # inputs of two products, q, k, v and the softmax's result of each step; the weights are stored once
    assert found["QuantizeLinear"] == 12 and found["DequantizeLinear"] == 16
    assert sum(name.endswith("/weight") for name in program.model.graph.initializers) == 2


@torch.no_grad()
def test_the_emulation_of_attention_computes_what_the_graph_does(tmp_path):
    torch.manual_seed(0)
    module, x = OneAttention().eval(), torch.randn(1, 16, 64)
    scales = scales_of_attention(module)
    program = torch.onnx.export(module, (x,), dynamo=True, opset_version=21, verbose=False)
    quantize_graph(program.model, module, module.unet, scales, "int8")
    program.save(str(tmp_path / "attention.onnx"))
    expected = {f"{name}/inputs" for name in scales} | {f"attn.to_{part}/outputs" for part in "qkv"}
    assert flow_scales(tmp_path / "attention.onnx").keys() == expected | {"attn.to_v/softmax"}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(tmp_path / "attention.onnx"), options)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})

    def error(layers):
        emulated, mode = copy.deepcopy(module), _GraphAttention()
        emulated.unet["attn"].fused_qkv = None
        _quantise(emulated.unet, Quantised("int8", layers, flows=True), mode, torch.device("cpu"))
        with mode:
            return relative_error(torch.from_numpy(found), emulated(x))

    floats = {name: replace(layer, softmax=None) for name, layer in scales.items()}
    assert error(scales) < 1e-3 < error(floats)


def test_a_layer_without_a_node_is_an_error(model_dir):
    class Graph(list):
        pass

    class Model:
        graph = Graph()

    unet = load_network(read_model_info(model_dir), "unet", torch.float32)
    scales = {"lost": calibration.LayerScales(Scale(1.0), torch.tensor(1.0))}
    with pytest.raises(ValueError, match="no node in the graph for lost"):
        quantize_graph(Model, torch.nn.ModuleDict({"unet": unet}), unet, scales, "int8")


def test_to_onnx_calibrates_on_a_folder_and_shares_weights(model_dir, scenes, tmp_path, capsys):
    out = tmp_path / "graphs"
    options = ["--precision", "int8", "--calibration", str(scenes), "--sampler-steps", "2", "--parity-images", "2"]
    assert to_onnx.main([str(model_dir), "--out", str(out), *options]) == 0
    manifest = read_manifest(out)
    assert manifest.calibration == f"{scenes.resolve()}/train2017" and manifest.options.dtype == "float32"
    stored = [
        sum(
            len(tensor.raw_data)
            for tensor in onnx.load(out / f"{name}.onnx").graph.initializer
            if tensor.data_type == 3
        )
        for name in ("denoiser", "sampler_2")
    ]
    assert stored[0] == stored[1] > 0
    backend = load_backend(model_dir, "onnxruntime", out)
    assert backend.device.type == "cpu"
    with pytest.raises(BackendError, match="int8 for a CPU, device=cuda was asked for"):
        load_backend(model_dir, "onnxruntime", out, device="cuda")
    assert to_trt.main([str(out), "--out", str(tmp_path / "engines"), "--flavour", "rtx"]) == 2
    assert "in int8 for a CPU, which TensorRT does not take; give MODEL_DIR" in capsys.readouterr().err


def test_a_calibration_folder_without_pictures_is_one_error(model_dir, tmp_path, capsys):
    options = ["--precision", "int8", "--calibration", str(tmp_path / "none")]
    assert to_onnx.main([str(model_dir), "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "none" in error and not (tmp_path / "out").exists()
