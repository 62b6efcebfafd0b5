"""The parity report finds planted faults in every precision, and raises no alarm over healthy exports."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from ldmseg_fast.backends.graphs.manifest import hash_files, read_manifest
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.backends.onnx_backend import load_onnx_backend
from ldmseg_fast.commands.convert import convert_checkpoint
from ldmseg_fast.export import parity
from ldmseg_fast.export.model_export import ExportSettings, resolve_options, write_graphs
from ldmseg_fast.export.parity_reference import InFloat64, ReferenceBackend, make_inputs, network_outputs
from ldmseg_fast.export.parity_report import ParityReport, Row
from ldmseg_fast.export.parity_rows import exact_rows, pq_row

PRECISIONS = {
    "fp32": ExportSettings("fp32"),
    "fp16": ExportSettings("fp16"),
    "bf16": ExportSettings("bf16"),
    "fp8": ExportSettings("fp8"),
    "int8": ExportSettings("int8"),
    "int8-tensorrt": ExportSettings("int8", runtime="tensorrt"),
}


def weights(model, part="", ndim=2):
    """The floats and stored bytes of at least `ndim` axes whose name has `part`, the largest first."""
    kinds = (1, 3, 10, 16, 17)  # TensorProto: float, int8, float16, bfloat16, float8e4m3fn
    found = [t for t in model.graph.initializer if part in t.name and len(t.dims) >= ndim and t.data_type in kinds]
    return sorted(found, key=lambda t: (-np.prod(t.dims), t.name))


def change(tensor, edit):
    values = numpy_helper.to_array(tensor)
    changed = values.astype(np.float32)
    edit(changed)
    largest = {"int8": 127, "float8_e4m3fn": 448}.get(values.dtype.name, np.inf)
    changed = changed.clip(-largest, largest)
    assert not np.array_equal(values.astype(np.float32), changed), "the fault changes nothing"
    tensor.CopyFrom(numpy_helper.from_array(changed.astype(values.dtype), tensor.name))


def one_weight_times_ten(model):
    def edit(values):
        values.flat[np.argsort(np.abs(values).ravel())[values.size // 2]] *= 10  # the median, not the largest

    change(weights(model)[0], edit)


def a_whole_tensor_is_zero(model):
    square = next(t for t in weights(model) if len(t.dims) == 2 and t.dims[0] == t.dims[1])
    change(square, lambda values: values.fill(0))


def every_epsilon_times_a_hundred(model):
    norms = [node for node in model.graph.node if node.op_type in ("GroupNormalization", "InstanceNormalization")]
    for node in norms:
        next(a for a in node.attribute if a.name == "epsilon").f *= 100
    assert norms


def a_tensor_is_doubled(model):
    change(weights(model)[1], lambda values: values.__imul__(2))


def a_sign_flips(model):
    change(weights(model)[-1], lambda values: values.reshape(-1)[:1].__imul__(-1))


def two_channels_are_swapped(model):
    def edit(values):
        values[[0, 1]] = values[[1, 0]]

    change(weights(model)[2], edit)


def one_weight_is_lost(model):
    def edit(values):
        values.flat[int(np.abs(values).argmax())] = 0

    change(weights(model)[0], edit)


def a_residual_is_subtracted(model):
    convolved = {node.output[0] for node in model.graph.node if node.op_type == "Conv"}
    for node in model.graph.node:  # what is quantised and restored is the same value
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[0] in convolved:
            convolved.add(node.output[0])
    constants = {t.name for t in model.graph.initializer}
    adds = [n for n in model.graph.node if n.op_type == "Add" and convolved & set(n.input)]
    [add for add in adds if not constants & set(add.input)][-1].op_type = "Sub"


def a_softmax_takes_the_other_axis(model):
    node = next(node for node in model.graph.node if node.op_type in ("Softmax", "MultiHeadAttention"))
    if node.op_type == "MultiHeadAttention":  # keys in the place of queries transpose the scores
        node.input[0], node.input[1] = node.input[1], node.input[0]
        return
    del node.attribute[:]
    node.attribute.append(onnx.helper.make_attribute("axis", -2))


def a_norm_gains_a_percent(model):
    scale = next(node for node in model.graph.node if node.op_type == "LayerNormalization").input[1]
    change(next(t for t in model.graph.initializer if t.name == scale), lambda values: values.__imul__(1.01))


def scale_of_node(model, index, kind="QuantizeLinear"):
    """An input of the second node that quantises what flows, or of the second that restores weights."""
    constants = {t.name: t for t in model.graph.initializer}
    stored = kind == "DequantizeLinear"
    nodes = [n for n in model.graph.node if n.op_type == kind and (n.input[0] in constants) == stored]
    return constants[nodes[1].input[index]]


def a_scale_is_doubled(model):
    change(scale_of_node(model, 1), lambda values: values.__imul__(2))


def a_zero_moves(model):
    change(scale_of_node(model, 2), lambda values: values.__iadd__(3))


def steps_of_a_weight_are_doubled(model):
    change(scale_of_node(model, 1, "DequantizeLinear"), lambda values: values.__imul__(2))


def a_result_is_quantised_as_another(model):
    first, second = [n for n in model.graph.node if n.op_type == "QuantizeLinear"][1:3]
    (back,) = [n for n in model.graph.node if n.input and n.input[0] == first.output[0]]
    for node in (first, back):
        node.input[2 if node.op_type == "MatMulIntegerToFloat" else 1] = second.input[1]


FAULTS = [
    ("denoiser", one_weight_times_ten),
    ("denoiser", a_whole_tensor_is_zero),
    ("denoiser", every_epsilon_times_a_hundred),
    ("mask_decoder", a_tensor_is_doubled),
    ("image_encoder", a_sign_flips),
    ("denoiser", two_channels_are_swapped),
    ("mask_decoder", one_weight_is_lost),
    ("denoiser", a_residual_is_subtracted),
    ("denoiser", a_softmax_takes_the_other_axis),
    ("denoiser", a_norm_gains_a_percent),
]


def a_scale_of_attention_is_doubled(model):
    constants = {t.name: t for t in model.graph.initializer}
    node = next(node for node in model.graph.node if "/softmax/" in node.name)
    change(constants[node.input[1]], lambda values: values.__imul__(2))


OF_SCALES = [a_scale_is_doubled, a_zero_moves, steps_of_a_weight_are_doubled, a_result_is_quantised_as_another]


def faults_of(precision):
    """Those of floats, and of a quantised graph's scales; E4M3 has no zero but 0."""
    if precision not in ("fp8", "int8", "int8-tensorrt"):
        return FAULTS
    scales = [*OF_SCALES, a_scale_of_attention_is_doubled] if precision == "int8-tensorrt" else OF_SCALES
    return FAULTS + [("denoiser", fault) for fault in scales if (precision, fault) != ("fp8", a_zero_moves)]


def plant(healthy: Path, out: Path, graph: str, fault) -> None:
    """Copies an export with one fault in one graph, under a manifest that fits it."""
    shutil.copytree(healthy, out)
    manifest = read_manifest(out)
    file = manifest.graphs[graph]
    model = onnx.load(out / file.file)
    fault(model)
    onnx.save(model, out / file.file)
    files = {**manifest.graphs, graph: replace(file, sha256=hash_files(out, file.file, file.weights))}
    replace(manifest, graphs=files).write(out)


def export(model: Path, out: Path, precision: str) -> Path:
    out.mkdir()
    info, settings = read_model_info(model), PRECISIONS[precision]
    write_graphs(info, out, resolve_options(info, settings), settings)
    return out


@pytest.fixture
def model(model_dir, request, precision):
    """The narrow model; in int8 for TensorRT one whose attentions are of 8 bits too."""
    return request.getfixturevalue("heads_of_32") if precision == "int8-tensorrt" else model_dir


@pytest.fixture
def torch_runs_once(monkeypatch, tmp_path):
    """PyTorch's side is the same for every fault: it is computed for the healthy export."""
    original, kept, results = parity._run_torch, tmp_path / "torch", {}

    def run_torch(run):
        if not kept.exists():
            original(run)
            shutil.copytree(run.scratch, kept)
            results.update(pq=run.pq.copy(), latency=run.latency.copy(), scales=run.scales)
        shutil.copytree(kept, run.scratch, dirs_exist_ok=True)
        run.pq, run.latency, run.scales = results["pq"].copy(), results["latency"].copy(), results["scales"]

    monkeypatch.setattr(parity, "_run_torch", run_torch)
    monkeypatch.setattr(parity, "free_memory", lambda: None)  # which takes a second among all that tests hold


def report(model, folder):
    return parity.measure_parity(read_model_info(model), folder, read_manifest(folder), images=1, batches=(2,))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_fault_is_found(model, torch_runs_once, tmp_path, precision):
    folder, missed = export(model, tmp_path / "healthy", precision), []
    if precision != "bf16":  # which ONNX Runtime does not run; the report loads graphs without most optimisations
        load_onnx_backend(read_model_info(model), folder, "cpu").close()
    found = report(model, folder)
    assert found.ok, found.table()
    for graph, fault in faults_of(precision):
        plant(folder, tmp_path / fault.__name__, graph, fault)
        found = report(model, tmp_path / fault.__name__)
        if found.ok:
            missed.append(f"{graph}: {fault.__name__}\n{found.table()}")
    assert not missed, "\n".join(missed)


def test_a_deep_image_encoder_errs_in_float32_itself(shared, torch_runs_once, tmp_path):
    """A converted original's encoder misses the limit by its own rounding; faults are found."""
    golden = shared / "golden"
    files = (golden / "base_unet_config.json", golden / "image_vae_config.json")
    model = convert_checkpoint(golden / "original_ldm.pt", tmp_path / "model", *files)
    healthy = export(model, tmp_path / "graphs", "fp32")
    found = report(model, healthy)
    assert found.ok, found.table()
    for fault in (one_weight_times_ten, a_whole_tensor_is_zero, a_sign_flips):
        plant(healthy, tmp_path / fault.__name__, "image_encoder", fault)
        assert not report(model, tmp_path / fault.__name__).ok, fault.__name__


def test_only_an_output_that_misses_the_limit_is_asked_for_its_own_error():
    values = {"image_latents": torch.ones(1, 4, 2, 2), "model_output": torch.ones(1, 4, 2, 2)}

    def row(error, own):
        ours = {name: value * (1 + error) for name, value in values.items()}
        rows = {row.what: row for row in exact_rows(1, ours, values, own)}
        return [rows[f"{name}, batch 1: relative error"].ok for name in ("image_encoder", "denoiser")]

    def never(network):
        raise AssertionError("within the limit")

    assert row(5e-6, never) == [True, True]
    own = {"image_encoder": {"image_latents": 1e-5}, "denoiser": {"model_output": 2e-6}}
    assert row(2e-5, own.__getitem__) == [True, False]
    assert row(5e-5, lambda _: dict.fromkeys(values, 1e-5)) == [False, False]


def test_float64_is_as_of_networks_in_float64(model_dir, scenes):
    info = read_model_info(model_dir)
    plain, exact = ReferenceBackend(info), ReferenceBackend(info)
    for backend in (plain, exact):
        backend.unet.unfuse()
    for network in (exact.image_vae, exact.unet, exact.mask_vae):
        network.double()
    exact.dtype = torch.float64
    with torch.inference_mode(), parity.comparison_data(info, str(scenes), "val2017", 1) as data:
        inputs = make_inputs(plain, data, 0)
        expected, float32 = network_outputs(exact, inputs), network_outputs(plain, inputs)
        with InFloat64():
            found = network_outputs(plain, inputs)
            only = network_outputs(plain, inputs, ["denoiser"])
    for name, value in found.items():
        assert torch.equal(value.to(expected[name].dtype), expected[name]), name
        assert value.dtype != torch.float64 or not torch.equal(value, float32[name].double()), name
    assert {name: torch.equal(value, found[name]) for name, value in only.items()} == {"model_output": True}
    assert {weight.dtype for weight in plain.unet.parameters()} == {torch.float32}


def test_a_report_tells_the_times_that_were_taken():
    """Engines have a runtime of their own, and graphs of a larger fixed batch take no single image."""
    rows = [Row("maps", 1.0)]
    engine = ParityReport("fp16", 1, "scenes", rows, {"torch": 4.0, "tensorrt": 2.0, "ratio": 2.0})
    assert engine.table().endswith("one step at batch 1: torch 4.0 ms, tensorrt 2.0 ms, ratio 2.00")
    assert "one step" not in ParityReport("fp16", 1, "scenes", rows, {"torch": 4.0}).table()


@pytest.mark.parametrize(
    ("precision", "segments", "limit"),
    [("fp32", 18, 0.5), ("fp16", 18, 100 / 18), ("bf16", 18, 200 / 18), ("bf16", 200, 5)],
)
def test_the_fewer_segments_the_more_one_is_worth(precision, segments, limit):
    within, beyond = (
        pq_row(precision, {"torch": 50.0, "graphs": 50.0 - lost}, segments) for lost in (limit - 0.01, limit + 0.01)
    )
    assert within.ok and not beyond.ok
