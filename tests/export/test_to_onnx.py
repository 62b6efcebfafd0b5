"""`to_onnx.py`: what it writes, how near that is to PyTorch, and what it refuses."""

import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from ldmseg_fast.backends.graphs.manifest import GraphFile, check_files, model_hash, read_manifest
from ldmseg_fast.backends.graphs.modules import DenoiserGraph, build_graph
from ldmseg_fast.backends.graphs.specs import GraphOptions, graph_specs, sample_inputs
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.backends.onnx_backend import load_onnx_backend
from ldmseg_fast.backends.torch_backend import TorchBackend
from ldmseg_fast.checkpoints.model_folder import load_component
from ldmseg_fast.checkpoints.shipped import resolve_model_dir
from ldmseg_fast.errors import BackendError, CheckpointError
from ldmseg_fast.export import model_export, parity, parity_rows, to_onnx
from ldmseg_fast.export.float_twin import float_twin
from ldmseg_fast.export.graph_export import OPSETS, export_graph
from ldmseg_fast.export.networks import load_network, read_converted
from ldmseg_fast.export.output_folder import disk_full_named
from ldmseg_fast.export.parity_reference import best_times
from ldmseg_fast.export.parity_report import ParityReport

ROOT = Path(__file__).resolve().parents[2]


def rows(folder: Path) -> dict[str, dict]:
    return {row["what"]: row for row in json.loads((folder / "parity.json").read_text())["rows"]}


def test_parity_with_torch(graphs):
    found = rows(graphs)
    for batch in (1, 2, 5):
        for network in ("image_encoder", "denoiser", "mask_decoder"):
            what = f"{network}, batch {batch}{', mask_logits' if network == 'mask_decoder' else ''}"
            assert found[f"{what}: relative error"]["value"] <= 1e-5
            assert found[f"{what}: max abs"]["value"] <= 1e-4
        assert found[f"mask_decoder, batch {batch}, label: share that agrees"]["value"] >= 0.999
    for steps in (2, 4, 10):
        assert found[f"latents after {steps} steps: relative error"]["value"] <= 1e-4
    assert found["maps: pixel agreement"]["value"] >= 0.999
    assert found["maps: PQ difference"]["value"] <= 0.5


def test_a_step_is_faster_than_eager_torch(model_dir, graphs):
    info = read_model_info(model_dir)
    reference = TorchBackend(info, "cpu", torch.float32)
    ours = load_onnx_backend(info, graphs, "cpu")
    spec = ours.specs["denoiser"]
    inputs = sample_inputs(spec, info, {"batch": 1})
    module = DenoiserGraph(reference.unet, info.scheduler.prediction_type)
    with torch.inference_mode():
        fast, eager = best_times(
            lambda: ours.run_graph("denoiser", inputs), lambda: module(*inputs.values()), rounds=30
        )
    assert eager / fast > 1.0, f"onnxruntime {fast:.2f} ms, torch {eager:.2f} ms"


def test_manifest_and_metadata(model_dir, graphs):
    manifest = read_manifest(graphs)
    assert manifest.model_hash == model_hash(model_dir)
    assert (manifest.precision, manifest.opset, manifest.image_size) == ("fp32", 21, 64)
    assert set(manifest.graphs) == {"image_encoder", "denoiser", "mask_decoder", "sampler_2"}
    assert "to_onnx.py" in manifest.command and manifest.versions["torch"]
    check_files(graphs, manifest, tuple(manifest.graphs))
    model = onnx.load(graphs / "denoiser.onnx")
    metadata = {item.key: item.value for item in model.metadata_props}
    assert metadata["model_hash"] == manifest.model_hash and metadata["precision"] == "fp32"
    assert json.loads(metadata["config"])["unet"]["block_out_channels"] == [16, 32] and metadata["opset"] == "21"
    assert [o.version for o in model.opset_import if o.domain == ""] == [21]
    assert "GroupNormalization" in {node.op_type for node in model.graph.node}


def test_one_byte_per_pixel_leaves_the_head(graphs):
    outputs = {tensor.name: tensor for tensor in read_manifest(graphs).graphs["mask_decoder"].spec.outputs}
    assert outputs["label"].dtype == outputs["confidence"].dtype == "uint8"
    assert outputs["label"].shape == ("batch", "height", "width")


def test_the_sampler_shares_its_weights(graphs):
    one, two = ((graphs / f"{name}.onnx").stat().st_size for name in ("denoiser", "sampler_2"))
    weights = sum(len(t.raw_data) for t in onnx.load(graphs / "denoiser.onnx").graph.initializer)
    assert two - one < 0.5 * weights + 3 * (one - weights)


def test_half(model_dir, half_graphs):
    info, manifest = read_model_info(model_dir), read_manifest(half_graphs)
    report = parity.measure_parity(info, half_graphs, manifest, images=2, batches=(1, 3))
    assert report.ok, report.table()
    cosines = [row.value for row in report.rows if row.what.endswith("cosine")]
    assert len(cosines) == 2 and min(cosines) >= 0.999
    exact = [row.value for row in report.rows if row.what.startswith(("image_encoder", "denoiser"))]
    assert len(exact) == 8 and max(exact) <= 1e-5  # no rounding of half precision hides anything
    dtypes = {tensor.name: tensor.dtype for tensor in manifest.graphs["denoiser"].spec.inputs}
    assert dtypes["image_latents"] == "float16" and dtypes["noisy_latents"] == "float32"


def test_bfloat16_through_its_float_twin(model_dir, tmp_path):
    info = read_model_info(model_dir)
    options = GraphOptions("bfloat16", image_size=64)
    spec = graph_specs(info, options)["image_encoder"]
    vae = load_network(info, "image_vae", torch.bfloat16)
    graph = export_graph(spec, build_graph(spec, info, {"image_vae": vae}), info, tmp_path, 22, {})
    manifest = replace(
        model_export.Manifest("", "bf16", 22, 64, 4, 8, options, {"image_encoder": graph}, {}, ""), model={}
    )
    (tmp_path / "twin").mkdir()
    float_twin(tmp_path, manifest, tmp_path / "twin")
    session = onnxruntime.InferenceSession(str(tmp_path / "twin" / "image_encoder.onnx"))
    images = sample_inputs(spec, info, {"batch": 3})["images"]
    found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    expected = load_component(info.folder, "image_vae")(images)
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.999


def test_any_picture_size(model_dir, tmp_path):
    info = read_model_info(model_dir)
    spec = graph_specs(info, GraphOptions(image_size=0))["denoiser"]
    module = build_graph(spec, info, {"unet": load_network(info, "unet", torch.float32)})
    export_graph(spec, module, info, tmp_path, 21, {})
    session = onnxruntime.InferenceSession(str(tmp_path / "denoiser.onnx"))
    for batch, height, width in ((1, 16, 16), (3, 8, 12)):
        inputs = sample_inputs(spec, info, {"batch": batch, "latent_height": height, "latent_width": width})
        found = session.run(["model_output"], {name: value.numpy() for name, value in inputs.items()})[0]
        torch.testing.assert_close(torch.from_numpy(found), module(**inputs)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "opset",
    [
        pytest.param(opset, marks=() if opset in (OPSETS[0], OPSETS[-1]) else pytest.mark.soak)
        for opset in OPSETS
        if opset != model_export.DEFAULT_OPSET
    ],
)
def test_every_other_opset(model_dir, tmp_path, opset):
    info = read_model_info(model_dir)
    spec = graph_specs(info, GraphOptions(image_size=64))["denoiser"]
    module = build_graph(spec, info, {"unet": load_network(info, "unet", torch.float32)})
    export_graph(spec, module, info, tmp_path, opset, {})
    session = onnxruntime.InferenceSession(str(tmp_path / "denoiser.onnx"))
    for batch in (1, 3):
        inputs = sample_inputs(spec, info, {"batch": batch})
        found = session.run(["model_output"], {name: value.numpy() for name, value in inputs.items()})[0]
        torch.testing.assert_close(torch.from_numpy(found), module(**inputs)[0], rtol=0, atol=1e-4)


def test_large_weights_go_beside_the_graph(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("ldmseg_fast.export.graph_export.EMBEDDED_BYTES", 0)
    info = read_model_info(model_dir)
    spec = graph_specs(info, GraphOptions(image_size=64))["image_encoder"]
    module = build_graph(spec, info, {"image_vae": load_network(info, "image_vae", torch.float32)})
    graph = export_graph(spec, module, info, tmp_path, 21, {})
    assert graph.weights == "image_encoder.onnx.data" and (tmp_path / graph.weights).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--opset", "12"], "--opset 12: 18 to 23"),
        (["--opset", "0"], "--opset 0: 18 to 23"),
        (["--parity-images", "0"], "--parity-images 0: at least 1"),
        (["--opset", "24"], "--opset 24: 18 to 23"),
        (["--precision", "bf16", "--opset", "21"], "bfloat16 from 22 on"),
        (["--size", "60"], "--size 60: this model needs a multiple of 8"),
        (["--size", "large"], "--size large: a number"),
        (["--batch", "0"], "--batch 0: a number from 1 to 4096 expected, or dynamic"),
        (["--sampler-steps", "2,x"], "--sampler-steps x"),
        (["--sampler-steps", "1,,2"], "--sampler-steps : a number from 1"),
        (["--sampler-steps", "1,1"], "--sampler-steps 1,1: a number is there twice"),
        (["--sampler-steps", ","], "--sampler-steps ',': names no number"),
        (["--sampler-steps", "50"], "--sampler-steps 50: whole samplers are for 8 steps at most"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_wrong_options(model_dir, tmp_path, capsys, options, message, monkeypatch):
    monkeypatch.setattr(model_export, "export_graph", lambda spec, *_: GraphFile(spec, "f", None, ""))
    assert to_onnx.main([str(model_dir), "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_folders_that_are_no_models(model_dir, tmp_path, capsys):
    assert to_onnx.main([str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]) == 2
    assert "no such model folder" in capsys.readouterr().err
    assert to_onnx.main([f"{model_dir}-autoencoder", "--out", str(tmp_path / "out")]) == 2
    assert "no image_vae, scheduler, unet" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    assert to_onnx.main([str(model_dir), "--out", str(tmp_path / "mine")]) == 2
    assert "holds something that is no export" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "all of it"


def test_a_missed_tolerance_fails_and_writes_nothing(model_dir, graphs, tmp_path, capsys, monkeypatch):
    def copy(info, folder, options, settings):
        shutil.copytree(graphs, folder, dirs_exist_ok=True)

    monkeypatch.setattr(model_export, "write_graphs", copy)
    monkeypatch.setattr(parity_rows, "EXACT_MAX", 1e-12)
    assert to_onnx.main([str(model_dir), "--out", str(tmp_path / "out"), "--parity-images", "1"]) == 1
    out, err = capsys.readouterr()
    assert "NO  denoiser" in out and "a tolerance is missed" in err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_in_a_comparison(tmp_path):
    (tmp_path / "exact-0.safetensors").symlink_to("/dev/full")
    run = parity._Run(None, None, None, None, tmp_path, None)
    with pytest.raises(BackendError, match="the disk is full"), disk_full_named(tmp_path / "out"):
        run.save("exact", 0, {"image": torch.zeros(10)})


def test_two_exports_at_a_time_make_one(model_dir, graphs, tmp_path, monkeypatch):
    written, said = [], []

    def write(info, folder, options, settings):
        written.append(folder)
        time.sleep(0.5)
        shutil.copytree(graphs, folder, dirs_exist_ok=True)

    monkeypatch.setattr(model_export, "write_graphs", write)
    monkeypatch.setattr(model_export, "check_parity", lambda *_: ParityReport.read(graphs / "parity.json"))
    settings = model_export.ExportSettings(head="both", sampler_steps="2", parity_images=4)

    def export(_):
        return model_export.export_model(model_dir, tmp_path / "g", settings, said.append)

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(export, range(2))
    assert len(written) == len(said) == 1 and "another export is under way; waiting" in said[0]
    assert one == other and one.ok
    check_files(tmp_path / "g", read_manifest(tmp_path / "g"))
    assert [path.name for path in tmp_path.iterdir()] == ["g"]


@pytest.mark.parametrize("lora", [None, "lora.safetensors"])
def test_a_model_that_changes_while_it_is_exported(model_dir, graphs, tmp_path, monkeypatch, lora):
    model, out = tmp_path / "model", tmp_path / "g"
    shutil.copytree(model_dir, model)
    if lora is not None:
        factors = {"A": torch.zeros(1, 16, 3, 3), "B": torch.zeros(16, 1)}
        save_file({f"unet.conv_in.lora_{part}.weight": each for part, each in factors.items()}, tmp_path / lora)

    def write(info, folder, options, settings):
        shutil.copytree(graphs, folder, dirs_exist_ok=True)
        config = model / "scheduler" / "scheduler_config.json"
        config.write_text(config.read_text() + " ")

    monkeypatch.setattr(model_export, "write_graphs", write)
    settings = model_export.ExportSettings(parity=False, lora=lora and tmp_path / lora)
    with pytest.raises(BackendError, match="model: changed while it was exported; export it again"):
        model_export.export_model(model, out, settings)
    assert not out.exists()


def test_weights_are_read_in_another_type(model_dir):
    path = model_dir / "unet" / "model.safetensors"
    whole = load_component(model_dir, "unet").state_dict()
    halves = read_converted(path, torch.float16)
    assert halves.keys() == whole.keys()
    assert all(torch.equal(halves[name], whole[name].half()) for name in whole)


def test_damaged_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="damaged safetensors file"):
        read_converted(tmp_path / "model.safetensors", torch.float16)


def test_runs_as_a_script_from_anywhere(tmp_path):
    for script in ("to_onnx.py", "to_trt.py", "to_triton.py"):
        done = subprocess.run(
            [sys.executable, str(ROOT / "export" / script), "--help"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0 and "--out" in done.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_ship_in_int8(dtype):
    folder = resolve_model_dir("tiny")
    network = load_network(read_model_info(folder), "unet", dtype)
    expected = load_component(folder, "unet").state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(value, expected[name].to(dtype)), name
