"""`--lora FILE --lora-scale X`: graphs hold the folded weights, and still belong to the model that they came from."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from ldmseg_fast.backends.graphs.manifest import model_hash, read_manifest
from ldmseg_fast.backends.load import load_backend
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.backends.onnx_backend import load_onnx_backend
from ldmseg_fast.checkpoints.model_folder import load_component
from ldmseg_fast.evaluation import EvaluationOptions, evaluate
from ldmseg_fast.export import model_export, to_onnx
from ldmseg_fast.export.model_export import ExportSettings, export_model, is_current
from ldmseg_fast.export.networks import with_lora
from ldmseg_fast.export.parity import measure_parity
from ldmseg_fast.export.parity_rows import relative_error

SCALE = 0.5


@pytest.fixture(scope="module")
def lora(model_dir, tmp_path_factory):
    """A LoRA of every layer's weight, of rank 2."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, weight in load_component(model_dir, "unet").state_dict().items():
        if name.endswith(".weight") and weight.ndim > 1:
            outputs, inputs, *window = weight.shape
            layer = f"unet.{name.removesuffix('.weight')}"
            tensors[f"{layer}.lora_A.weight"] = 0.2 * torch.randn(2, inputs, *window, generator=generator)
            tensors[f"{layer}.lora_B.weight"] = 0.2 * torch.randn(outputs, 2, *(1 for _ in window), generator=generator)
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file(tensors, path)
    return path, tensors


def test_graphs_compute_what_folded_weights_compute(model_dir, lora, scenes, tmp_path, monkeypatch):
    path, tensors = lora
    found = []
    measured = model_export.measure_parity
    monkeypatch.setattr(model_export, "measure_parity", lambda *args: found.append(measured(*args)) or found[0])
    out = tmp_path / "graphs"
    options = ["--lora", str(path), "--lora-scale", str(SCALE), "--parity-images", "1"]
    assert to_onnx.main([str(model_dir), "--out", str(out), *options]) == 0
    assert found[0].ok
    manifest = read_manifest(out)
    assert manifest.model_hash == model_hash(model_dir) and manifest.lora.startswith("style.safetensors ")

    plain = load_backend(model_dir, device="cpu")
    folded, graphs = load_backend(model_dir, device="cpu"), load_backend(model_dir, "onnxruntime", out)
    folded.unet.unfuse()
    for name, weight in folded.unet.named_parameters():
        layer = f"unet.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" in tensors:
            down, up = (tensors[f"{layer}.lora_{part}.weight"] for part in "AB")
            weight.data += SCALE * torch.einsum("or,ri...->oi...", up.reshape(up.shape[:2]), down)
    given, times = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([10, 900])
    ours, theirs, before = (each.denoise(given, times) for each in (graphs, folded, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (theirs - before).abs().max() > 0.1

    settings = ExportSettings(parity_images=1, lora=path, lora_scale=SCALE)
    assert is_current(model_dir, out, settings)
    for other in (ExportSettings(), ExportSettings(lora=path), ExportSettings(lora=path, lora_scale=0.0)):
        assert not is_current(model_dir, out, other)
    report = evaluate(
        model_dir,
        scenes,
        EvaluationOptions(steps=1, limit=1, baselines=False, backend="onnxruntime", engine_dir=str(out)),
    )
    assert "agreement" not in report, "PyTorch's model has no LoRA"


@pytest.mark.parametrize(
    ("precision", "runtime"),
    [
        ("int8", "onnxruntime"),
        pytest.param("int8", "tensorrt", marks=pytest.mark.soak),
        pytest.param("fp8", "tensorrt", marks=pytest.mark.soak),
    ],
)
def test_quantised_graphs_have_the_lora_too(model_dir, lora, scenes, tmp_path, precision, runtime):
    path, out, info = lora[0], tmp_path / "graphs", read_model_info(model_dir)
    settings = ExportSettings(
        precision, runtime=runtime, lora=path, lora_scale=SCALE, parity_images=1, calibration=str(scenes)
    )
    if runtime == "onnxruntime":
        options = ["--precision", precision, "--lora", str(path), "--lora-scale", str(SCALE), "--parity-images", "1"]
        assert to_onnx.main([str(model_dir), "--out", str(out), *options, "--calibration", str(scenes)]) == 0
    else:
        assert export_model(model_dir, out, settings).ok
    assert is_current(model_dir, out, settings) and not is_current(model_dir, out, replace(settings, lora=None))
    plain = measure_parity(info, out, read_manifest(out), str(scenes), images=1)
    missed = {row.what for row in plain.rows if not row.ok}
    assert "denoiser, batch 1: relative error" in missed, plain.table()
    assert not any(what.startswith(("image_encoder", "mask_decoder")) for what in missed), plain.table()

    with with_lora(info, path, SCALE) as folder:
        folded, graphs = load_backend(folder, device="cpu"), load_onnx_backend(info, out, "cpu")
        base = load_backend(model_dir, device="cpu")
    given, times = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([10, 900])
    ours = graphs.denoise(given.to(graphs.dtype), times).float()
    apart, unfolded = (relative_error(ours, each.denoise(given, times)) for each in (folded, base))
    assert apart < 0.1 and unfolded > 3 * apart


def test_a_scale_of_zero_is_the_base(model_dir, lora):
    base = load_component(model_dir, "unet").state_dict()
    with with_lora(read_model_info(model_dir), lora[0], 0.0) as folder:
        found = load_component(folder, "unet").state_dict()
        assert all(torch.equal(found[name], value) for name, value in base.items())
    with with_lora(read_model_info(model_dir), lora[0], 1.0) as folder:
        found = load_component(folder, "unet").state_dict()
        assert not torch.equal(found["conv_in.weight"], base["conv_in.weight"])
    assert not folder.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora", "none.safetensors"], "none.safetensors: no such file"),
        (["--lora-scale", "0.5"], "--lora-scale without --lora"),
        (["--lora", "none.safetensors", "--lora-scale", "nan"], "--lora-scale nan: from -1000 to 1000 expected"),
    ],
)
def test_wrong_options(model_dir, tmp_path, capsys, options, message):
    assert to_onnx.main([str(model_dir), "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
