"""`backend="onnxruntime"`: the same results as torch, and one clear error for each bad folder."""

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import onnxruntime
import pytest
import torch

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.backends.graphs.manifest import read_manifest
from ldmseg_fast.backends.graphs.seal import sealed
from ldmseg_fast.backends.load import load_backend
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.backends.onnx_backend import load_onnx_backend
from ldmseg_fast.cli import main
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.data.scenes import generate_scene
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.errors import BackendError, NonFiniteError

OPEN = PostprocessConfig(mask_threshold=0.0, count_threshold=0, overlap_threshold=0.0)


@pytest.fixture(scope="module")
def pipes(model_dir, graphs):
    fast = LDMSegPipeline.from_pretrained(model_dir, backend="onnxruntime", engine_dir=graphs)
    return LDMSegPipeline.from_pretrained(model_dir, device="cpu"), fast


@pytest.fixture(scope="module")
def pictures():
    return [generate_scene(64, 0, index, version=1)[0][: 64 - 9 * index] for index in range(3)]


@pytest.mark.parametrize("steps", [2, 3])
def test_the_pipeline_gives_torchs_maps(pipes, pictures, steps):
    expected, found = (pipe(pictures, steps, thresholds=OPEN) for pipe in pipes)
    for one, other in zip(found, expected):
        assert one.segmentation.dtype == other.segmentation.dtype == "int32"
        assert (one.segmentation == other.segmentation).mean() > 0.999
        assert [s["id"] for s in one.segments_info] == [s["id"] for s in other.segments_info]
        for ours, theirs in zip(one.segments_info, other.segments_info):
            assert ours.keys() == theirs.keys() and abs(ours["score"] - theirs["score"]) < 1 / 255
            assert abs(ours["area"] - theirs["area"]) <= 4


def test_latents_and_logits(pipes, pictures):
    for output_type in ("latent", "logits"):
        expected, found = (pipe(pictures, 3, output_type=output_type) for pipe in pipes)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_maps_too_large_for_the_head_come_from_the_logits(pipes, monkeypatch):
    backend = pipes[1].backend
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = backend.decode_mask(latents, (70, 90), thresholds=OPEN)
    monkeypatch.setattr("ldmseg_fast.backends.graphs.graph_backend.MAX_HEAD_BYTES", 100_000)
    for one, other in zip(backend.decode_mask(latents, (70, 90), thresholds=OPEN), expected, strict=True):
        assert (one.segmentation == other.segmentation).mean() > 0.999
    specs = dict(backend.specs)
    decoder = specs["mask_decoder"]
    specs["mask_decoder"] = replace(decoder, outputs=decoder.outputs[:3])
    monkeypatch.setattr(backend, "specs", specs)
    with pytest.raises(BackendError, match=r"a map of 90x70 pixels: .* export them with --head both"):
        backend.decode_mask(latents, (70, 90))


def test_logits_that_are_not_finite_are_no_map(pipes):
    backend = pipes[1].backend
    latents = torch.zeros(2, 4, 16, 16)
    backend.decode_mask(latents, (70, 90))
    latents[1, 2, 3, 4] = float("nan")
    for output in ("panoptic", "logits"):
        with pytest.raises(NonFiniteError, match="mask_decoder: slot logits are not finite"):
            backend.decode_mask(latents, (70, 90), output)


def test_a_callback_sees_every_step(pipes, pictures):
    seen = []
    pipes[1](pictures[:1], 3, callback=lambda step, time, latents, estimate: seen.append((step, time)))
    assert [step for step, _ in seen] == [0, 1, 2]


def test_another_schedule_than_the_models(pipes):
    torch_pipe, fast = pipes
    scheduler = Scheduler(replace(fast.info.scheduler, timestep_spacing="leading"))
    noise, image_latents = torch.randn(1, 4, 16, 16), torch.randn(1, 8, 16, 16)
    expected, found = (pipe.backend.sample(noise, image_latents, scheduler, 3) for pipe in (torch_pipe, fast))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_threads_share_a_backend(model_dir, graphs):
    with load_onnx_backend(read_model_info(model_dir), graphs, "cpu", lanes=2) as backend:
        noise = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        image_latents = torch.randn(6, 8, 16, 16, generator=torch.Generator().manual_seed(1))
        scheduler = Scheduler(backend.info.scheduler)

        def sample(row: int) -> torch.Tensor:
            return backend.sample(noise[row : row + 1], image_latents[row : row + 1], scheduler, 3)

        expected = [sample(row) for row in range(6)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(sample, [*range(6)] * 3))
        for row, result in enumerate(found):
            torch.testing.assert_close(result, expected[row % 6], rtol=0, atol=0)
    with pytest.raises(BackendError, match="this backend is closed"):
        sample(0)


def test_wrong_tensors_are_named(pipes):
    backend = pipes[1].backend
    with pytest.raises(ValueError, match=r"image_encoder\.images: shape \(1, 3, 60, 64\)"):
        backend.encode_image(torch.zeros(1, 3, 60, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"image_encoder\.images: torch\.float32 given"):
        backend.encode_image(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="timesteps: 3 rows, but noisy_latents has 2"):
        backend.denoise(torch.zeros(2, 16, 16, 16), torch.zeros(3, dtype=torch.int64))


def test_evaluate_reports_agreement_and_latency(model_dir, graphs, scenes, tmp_path, capsys):
    arguments = ["evaluate", str(model_dir), "--data", str(scenes), "--steps", "3", "--limit", "6", "--batch-size", "4"]
    arguments += ["--mask-th", "0", "--count-th", "0", "--overlap-th", "0"]
    assert main([*arguments, "--json", str(tmp_path / "torch.json")]) == 0
    engine = ["--backend", "onnxruntime", "--engine-dir", str(graphs), "--out", str(tmp_path / "results")]
    assert main([*arguments, *engine, "--json", str(tmp_path / "ort.json")]) == 0
    plain, report = (json.loads((tmp_path / name).read_text()) for name in ("torch.json", "ort.json"))
    assert "agreement" not in plain and report["backend"] == "onnxruntime"
    assert plain.keys() == report.keys() - {"agreement"}
    assert report["agreement"]["images"] == 6
    assert report["agreement"]["pixel_agreement"] > 0.999
    assert abs(report["agreement"]["pq_difference"]) < 0.5
    assert report["seconds_per_image"] > 0 and report["agreement"]["torch_seconds_per_image"] > 0
    assert ", ratio " in capsys.readouterr().out
    assert main([*arguments, *engine]) == 0  # reads the results back, and so has no time of the graphs
    said = capsys.readouterr().out
    assert "no ratio: the results were read back" in said and ", ratio " not in said


def test_a_folder_is_needed(model_dir, graphs):
    with pytest.raises(BackendError, match=r"needs engine_dir.*`python export/to_onnx\.py"):
        load_backend(model_dir, "onnxruntime")
    with pytest.raises(BackendError, match="leave engine_dir out"):
        load_backend(model_dir, "torch", graphs)
    with pytest.raises(BackendError, match="export again with --precision"):
        load_backend(model_dir, "onnxruntime", graphs, dtype=torch.float16)


def copy_without(graphs, folder, name):
    shutil.copytree(graphs, folder)
    (folder / name).unlink()


def test_damaged_folders(model_dir, graphs, tmp_path):
    def load(folder):
        return load_backend(model_dir, "onnxruntime", folder)

    with pytest.raises(BackendError, match=r"no export\.json in it"):
        load(tmp_path)
    copy_without(graphs, tmp_path / "a", "denoiser.onnx")
    with pytest.raises(BackendError, match=r"denoiser\.onnx: missing, it holds the graph denoiser"):
        load(tmp_path / "a")
    shutil.copytree(graphs, tmp_path / "b")
    with (tmp_path / "b" / "denoiser.onnx").open("r+b") as file:
        file.seek(5000)
        file.write(b"\0\1\2")
    with pytest.raises(BackendError, match="not the file that was exported"):
        load(tmp_path / "b")

    def changed(name, **values):
        shutil.copytree(graphs, tmp_path / name)
        path = tmp_path / name / "export.json"
        path.write_text(json.dumps(sealed(json.loads(path.read_text()) | values)))
        return tmp_path / name

    with pytest.raises(BackendError, match="format 99, this version reads 2"):
        load(changed("c", format_version=99))
    with pytest.raises(BackendError, match=r"(?s)made from another model than .*to_onnx\.py"):
        load(changed("d", model_hash="0" * 64))
    with pytest.raises(BackendError, match="no image_encoder, denoiser, mask_decoder in it"):
        load(changed("e", graphs={}))
    with pytest.raises(BackendError, match="which ONNX Runtime does not run"):
        load(changed("f", precision="bf16"))
    (tmp_path / "c" / "export.json").write_text("{")
    with pytest.raises(BackendError, match="damaged"):
        load(tmp_path / "c")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("precision",), "fp99"),
        (("image_size",), -1),
        (("image_size",), "64"),
        (("downsampling",), 0),
        (("size_multiple",), None),
        (("options", "batch"), 10**12),
        (("options", "head"), []),
        (("options", "sampler_steps"), ["x"]),
        (("options", "extra"), 1),
        (("graphs", "denoiser", "file"), "../denoiser.onnx"),
        (("graphs", "denoiser", "weights"), "/etc/passwd"),
        (("graphs", "denoiser", "file"), {}),
        (("graphs", "denoiser", "spec", "inputs"), 3),
        (("graphs", "denoiser", "spec", "inputs", 0, "shape"), [-1]),
        (("graphs", "denoiser", "spec", "inputs", 0, "shape"), ["batch*x"]),
        (("graphs", "denoiser", "spec", "inputs", 0, "dtype"), "float8"),
        (("model_hash",), None),
    ],
)
def test_a_manifest_with_other_values(place, value, graphs, tmp_path):
    values = json.loads((graphs / "export.json").read_text())
    owner = values
    for key in place[:-1]:
        owner = owner[key]
    owner[place[-1]] = value
    (tmp_path / "export.json").write_text(json.dumps(sealed(values)))
    with pytest.raises(BackendError, match=r"export\.json: damaged"):
        read_manifest(tmp_path)
    for text, message in (("[" * 100_000, ""), ("[]", "no JSON object"), ('{"a": 1, "a": 2}', "a is there twice")):
        (tmp_path / "export.json").write_text(text)
        with pytest.raises(BackendError, match=rf"export\.json: damaged .*{message}"):
            read_manifest(tmp_path)


def test_graphs_without_their_weights_file(model_dir, graphs, tmp_path):
    shutil.copytree(graphs, tmp_path / "a")
    path = tmp_path / "a" / "export.json"
    values = json.loads(path.read_text())
    values["graphs"]["denoiser"]["weights"] = "denoiser.onnx.data"
    path.write_text(json.dumps(sealed(values)))
    with pytest.raises(BackendError, match=r"denoiser\.onnx\.data: missing, it holds the weights of denoiser"):
        load_backend(model_dir, "onnxruntime", tmp_path / "a")


def test_a_provider_that_is_not_there(model_dir, graphs):
    with pytest.raises(BackendError, match=r"device=cuda: this onnxruntime has .*CPUExecutionProvider"):
        load_backend(model_dir, "onnxruntime", graphs, device="cuda")


def test_a_provider_that_falls_back(model_dir, graphs, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(BackendError, match="CUDAExecutionProvider was asked for and CPUExecutionProvider would run"):
        load_backend(model_dir, "onnxruntime", graphs, device="cuda")


def test_weights_of_eight_bits_are_made_unsigned_where_sums_would_overflow(model_dir, graphs, tmp_path, monkeypatch):
    """Exports of the first rules have such weights; those of a whole sampler are multiplied as floats."""
    entries = []

    class Options(onnxruntime.SessionOptions):
        def add_session_config_entry(self, key, value):
            entries.append(key)
            super().add_session_config_entry(key, value)

    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    monkeypatch.setattr("ldmseg_fast.backends.onnx_backend._sums_saturate", lambda: True)
    shutil.copytree(graphs, tmp_path / "graphs")
    for rules, expected in ((1, {"session.x64quantprecision", "session.disable_quant_qdq"}), (2, set())):
        replace(read_manifest(graphs), precision="int8", rules=rules).write(tmp_path / "graphs")
        entries.clear()
        load_onnx_backend(read_model_info(model_dir), tmp_path / "graphs", "cpu")
        assert set(entries) - {"session.force_spinning_stop"} == expected


def test_no_onnxruntime(model_dir, graphs, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"not installed; pip install 'ldmseg_fast\[onnx\]'"):
        load_backend(model_dir, "onnxruntime", graphs)
