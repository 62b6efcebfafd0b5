"""`backend="tensorrt"` through TensorRT's double: loop, pool, passport and evaluation run as on a GPU."""

import importlib.metadata
import itertools
import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.app.work import Settings, Worker
from ldmseg_fast.backends.graphs.seal import sealed
from ldmseg_fast.backends.load import load_backend
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.backends.trt import api as trt_api
from ldmseg_fast.backends.trt import machine, trt_backend
from ldmseg_fast.backends.trt.machine import Machine
from ldmseg_fast.backends.trt.passport import read_passport
from ldmseg_fast.backends.trt.trt_backend import load_trt_backend
from ldmseg_fast.cli import main
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.data.scenes import generate_scene
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.errors import BackendError, NonFiniteError
from ldmseg_fast.export import to_trt
from ldmseg_fast.panoptic.format import read_panoptic_png

OPEN = PostprocessConfig(mask_threshold=0.0, count_threshold=0, overlap_threshold=0.0)


@pytest.fixture
def pictures():
    return [generate_scene(64, 0, index, version=1)[0][: 64 - 8 * index] for index in range(3)]


def test_the_pipeline_gives_torchs_maps(model_dir, engines, trt, pictures):
    fast = LDMSegPipeline.from_pretrained(model_dir, backend="tensorrt", engine_dir=engines)
    plain = LDMSegPipeline.from_pretrained(model_dir, device="cpu")
    for steps in (2, 3):
        for one, other in zip(fast(pictures, steps, thresholds=OPEN), plain(pictures, steps, thresholds=OPEN)):
            assert (one.segmentation == other.segmentation).mean() > 0.999
    expected, found = (pipe(pictures, 5, output_type="latent") for pipe in (plain, fast))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_logits_that_are_not_finite_are_no_map(model_dir, engines, trt):
    backend = load_backend(model_dir, "tensorrt", engines)
    latents = torch.zeros(2, 4, 16, 16)
    latents[1, 2, 3, 4] = float("inf")
    with pytest.raises(NonFiniteError, match="mask_decoder: slot logits are not finite"):
        backend.decode_mask(latents, (70, 90))


def test_evaluate(model_dir, engines, trt, scenes, tmp_path, capsys):
    arguments = ["evaluate", str(model_dir), "--data", str(scenes), "--steps", "2", "--limit", "4", "--batch-size", "4"]
    arguments += ["--backend", "tensorrt", "--engine-dir", str(engines), "--json", str(tmp_path / "report.json")]
    assert main([*arguments, "--mask-th", "0", "--count-th", "0", "--overlap-th", "0"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["backend"] == "tensorrt" and report["agreement"]["pixel_agreement"] > 0.999
    assert "agreement with torch over 4 images" in capsys.readouterr().out


def test_nothing_is_copied_between_steps(model_dir, engines, trt, double, monkeypatch):
    backend = load_backend(model_dir, "tensorrt", engines)
    seen = []
    execute = double.IExecutionContext.execute_async_v3

    def record(context, stream_handle):
        seen.append(dict(context.addresses))
        return execute(context, stream_handle)

    monkeypatch.setattr(double.IExecutionContext, "execute_async_v3", record)
    noise, image_latents = torch.randn(2, 4, 16, 16), torch.randn(2, 8, 16, 16)
    for _ in range(2):
        backend.sample(noise, image_latents, Scheduler(backend.info.scheduler), 5)
    assert len(seen) == 10 and seen[:5] == seen[5:]  # fixed addresses: what a CUDA graph needs
    for before, after in itertools.pairwise(seen[:5]):
        assert after["noisy_latents"] == before["prev_latents"]
        assert after["condition"] == before["pred_original_sample"]
        assert after["image_latents"] == before["image_latents"]


def test_a_batch_over_the_profile_goes_through_in_parts(model_dir, engines, trt):
    backend, plain = load_backend(model_dir, "tensorrt", engines), load_backend(model_dir, device="cpu")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 64, 64), generator=generator, dtype=torch.uint8)
    noise, times = torch.randn(6, 4, 16, 16, generator=generator), torch.arange(6) * 100
    scheduler, found = Scheduler(plain.info.scheduler), {}
    for name, each in (("engines", backend), ("torch", plain)):
        image_latents = each.encode_image(images)
        sampled = [each.sample(noise, image_latents, scheduler, steps) for steps in (2, 3)]  # whole, and in a loop
        unet_input = torch.cat([noise, image_latents.float(), noise], dim=1)
        logits = each.decode_mask(sampled[0], (64, 64), "logits")
        found[name] = [image_latents, *sampled, each.denoise(unet_input, times), logits]
    for ours, theirs in zip(found["engines"], found["torch"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_what_is_over_the_profile_is_named(model_dir, engines, trt):
    backend = load_backend(model_dir, "tensorrt", engines)
    message = r"image_encoder: batch 5 is over this engine's 4; rebuild with --max-batch 5, or split the batch"
    with pytest.raises(BackendError, match=message):
        backend.run_graph("image_encoder", {"images": torch.zeros(5, 3, 64, 64, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="an empty batch"):
        backend.encode_image(torch.zeros(0, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(BackendError, match=r"width 200 is over this engine's 96; rebuild with --max-side 200"):
        backend.decode_mask(torch.zeros(1, 4, 16, 16), (50, 200))


def test_the_narrowest_profile_runs(model_dir, graphs, trt, double, tmp_path, monkeypatch):
    out = tmp_path / "engines"
    arguments = [str(graphs), "--out", str(out), "--profile", "1,1,1", "--profile", "2,4,6"]
    assert to_trt.main(arguments) == 0
    assert [profile["batch"] for profile in read_passport(out, "denoiser").profiles] == [(1, 1, 1), (2, 4, 6)]
    assert len(read_passport(out, "mask_decoder").profiles) == 1  # its head takes one image at a time
    backend = load_backend(model_dir, "tensorrt", out)
    chosen = []
    original = double.IExecutionContext.set_optimization_profile_async

    def record(context, profile_index, stream_handle):
        chosen.append(profile_index)
        return original(context, profile_index, stream_handle)

    monkeypatch.setattr(double.IExecutionContext, "set_optimization_profile_async", record)
    for batch in (1, 3, 1, 6):
        backend.encode_image(torch.zeros(batch, 3, 64, 64, dtype=torch.uint8))
    assert chosen == [0, 1]  # one context per profile, made once


def test_commands_choose_a_profile(model_dir, graphs, trt, scenes, tmp_path, capsys, monkeypatch):
    out, picture = tmp_path / "engines", next((scenes / "val2017").iterdir())
    given = scenes / "panoptic_val2017" / f"{picture.stem}.png"
    assert to_trt.main([str(graphs), "--out", str(out), "--profile", "1,1,1", "--profile", "2,4,6"]) == 0
    engines = ["--backend", "tensorrt", "--engine-dir", str(out)]
    model = str(model_dir)
    commands = {
        "predict": [model, str(picture), "--steps", "2", "--out", str(tmp_path / "predicted")],
        "inpaint": [model, "--image", str(picture), "--map", str(given), "--steps", "2"],
        "evaluate": [model, "--data", str(scenes), "--limit", "2", "--steps", "2"],
    }
    segment = str(read_panoptic_png(given).max())
    commands["inpaint"] += ["--unknown-id", segment, "--out", str(tmp_path / "completed")]
    capsys.readouterr()
    for name, options in commands.items():
        for wrong, message in (
            ([*engines, "--profile", "2"], f"profile=2: {out} has 2, counted from 0"),
            ([*engines, "--profile", "-1"], "profile=-1: a whole number from 0 to 4096 expected"),
            (["--profile", "0"], "profile=0: backend=torch cannot use it; it is for tensorrt; leave it out"),
        ):
            assert main([name, *options, *wrong]) == 2, name
            assert message in capsys.readouterr().err, name
    chosen = []
    load = trt_backend.load_trt_backend
    monkeypatch.setattr(trt_backend, "load_trt_backend", lambda *a, **k: chosen.append(k["profile"]) or load(*a, **k))
    for name in ("predict", "inpaint", "evaluate"):
        assert main([name, *commands[name], *engines, "--profile", "1"]) == 0
    with pytest.raises(BackendError, match="profile=2"):
        Worker(model_dir, ("tensorrt", "torch"), out, speed={"profile": 2})  # the app's, in a process of its own
    worker = Worker(model_dir, ("tensorrt", "torch"), out, speed={"profile": 1})
    worker.segment(generate_scene(64, 0, 0, version=1)[0], Settings())
    worker.segment(generate_scene(64, 0, 0, version=1)[0], Settings(backend="torch"))
    worker.close()
    assert chosen == [1, 1, 1, 2, 1]


def test_failures_of_the_runtime_are_named(model_dir, engines, trt, double, monkeypatch):
    backend = load_backend(model_dir, "tensorrt", engines)

    def fail(context, stream_handle):
        context.engine.logger.log(double.ILogger.ERROR, "an illegal memory access")
        return False

    monkeypatch.setattr(double.IExecutionContext, "execute_async_v3", fail)
    with pytest.raises(BackendError, match=r"TensorRT 11\.4\.0\.1 failed to run \(an illegal memory access\)"):
        backend.encode_image(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    monkeypatch.setattr(double.Runtime, "deserialize_cuda_engine", lambda *_: None)
    with pytest.raises(BackendError, match="does not load it"):
        load_backend(model_dir, "tensorrt", engines)
    monkeypatch.undo()


def test_closing_frees_the_engines(model_dir, engines, trt):
    backend = load_backend(model_dir, "tensorrt", engines)
    backend.encode_image(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.encode_image(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def edit(folder, graph, **values):
    path = folder / f"{graph}.passport.json"
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | values)))


MISMATCHES = [
    ({"gpu": "NVIDIA A100"}, "GPU: NVIDIA A100, here NVIDIA H100 80GB HBM3"),
    ({"compute_capability": "8.0"}, "compute capability: 8.0, here 9.0"),
    ({"targets": ["sm80", "sm89"]}, "compute capability: sm80, sm89, here sm90"),
    ({"flavour": "rtx"}, "TensorRT flavour: rtx, here tensorrt"),
    ({"version": "11.3.0.9"}, "TensorRT version: 11.3.0.9, here 11.4.0.1"),
    ({"version": "12.0", "version_compatible": True}, "TensorRT version: 12.0, here 11.4.0.1"),
    ({"model_hash": "a" * 64}, "model: aaaaaaaaaaaa, here "),
    ({"onnx_sha256": "b" * 64}, "ONNX graph: bbbbbbbbbbbb, here "),
    ({"precision": "fp16"}, "precision: fp16, here fp32"),
    ({"image_size": 512}, "image size: 512, here 64"),
    ({"profiles": [{"width": [1, 2, 3]}]}, "axes of profile 0: ['width'], the graph has ['batch']"),
    ({"engine_sha256": "c" * 64}, "engine file: cccccccccccc, here "),
    ({"engine_bytes": 12}, "engine file: 12 bytes, here "),
    ({"format_version": 7}, "passport format 7, this version reads 2"),
]


@pytest.mark.parametrize(("values", "message"), MISMATCHES, ids=lambda v: ",".join(v) if isinstance(v, dict) else "")
def test_a_passport_that_does_not_fit(model_dir, engines, trt, double, tmp_path, values, message):
    shutil.copytree(engines, tmp_path / "e")
    edit(tmp_path / "e", "denoiser", **values)
    with pytest.raises(BackendError) as error:
        load_backend(model_dir, "tensorrt", tmp_path / "e")
    assert message in str(error.value)
    assert "python export/to_trt.py" in str(error.value) and "--max-batch 4" in str(error.value)
    assert double.Runtime.deserialized == 0


def test_passports_ask_what_the_level_asks(model_dir, engines, trt, monkeypatch, tmp_path):
    shutil.copytree(engines, tmp_path / "e")
    for name in ("denoiser", "image_encoder", "mask_decoder", "sampler_2"):
        edit(tmp_path / "e", name, targets=["same"], driver="590.10")
    monkeypatch.setattr(type(trt), "machine", Machine("NVIDIA H100 PCIe", "9.0", "580.65.06"))
    load_backend(model_dir, "tensorrt", tmp_path / "e")
    monkeypatch.setattr(type(trt), "machine", Machine("NVIDIA A100", "8.0", "580.65.06"))
    with pytest.raises(BackendError, match=r"compute capability: 9\.0, here 8\.0"):
        load_backend(model_dir, "tensorrt", tmp_path / "e")


def test_each_loop_has_a_context_of_its_own(model_dir, engines, trt, double, monkeypatch):
    """A CUDA graph keeps the addresses of its context, which another shape would change."""
    made, create = [], double.ICudaEngine.create_execution_context
    monkeypatch.setattr(
        double.ICudaEngine, "create_execution_context", lambda e, c: made.append(create(e, c)) or made[-1]
    )
    backend = load_backend(model_dir, "tensorrt", engines)
    for batch in (1, 2, 1, 2):
        noise, image_latents = torch.randn(batch, 4, 16, 16), torch.randn(batch, 8, 16, 16)
        backend.sample(noise, image_latents, Scheduler(backend.info.scheduler), 3)
    assert len(made) == 2


def test_all_differences_in_one_error(model_dir, engines, trt, tmp_path):
    shutil.copytree(engines, tmp_path / "e")
    edit(tmp_path / "e", "denoiser", gpu="NVIDIA A100", version="10.13.2.6", precision="fp16")
    with pytest.raises(BackendError, match=r"precision: fp16.*TensorRT version: 10\.13.*GPU: NVIDIA A100"):
        load_backend(model_dir, "tensorrt", tmp_path / "e")


def test_version_compatible_engines_load_in_later_versions(model_dir, engines, trt, tmp_path):
    shutil.copytree(engines, tmp_path / "e")
    for name in ("denoiser", "image_encoder", "mask_decoder", "sampler_2"):
        edit(tmp_path / "e", name, version="11.1.0.4", version_compatible=True)
    load_backend(model_dir, "tensorrt", tmp_path / "e")


def test_engines_without_passport_or_changed_on_disk(model_dir, engines, trt, double, tmp_path):
    shutil.copytree(engines, tmp_path / "a")
    (tmp_path / "a" / "denoiser.passport.json").unlink()
    with pytest.raises(BackendError, match=r"no passport beside it \(denoiser\.passport\.json\), so it is not loaded"):
        load_backend(model_dir, "tensorrt", tmp_path / "a")
    shutil.copytree(engines, tmp_path / "b")
    with (tmp_path / "b" / "denoiser.engine").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    with pytest.raises(BackendError, match="engine file"):
        load_backend(model_dir, "tensorrt", tmp_path / "b")
    (tmp_path / "b" / "denoiser.engine").unlink()
    with pytest.raises(BackendError, match=r"bytes, here none"):
        load_backend(model_dir, "tensorrt", tmp_path / "b")
    shutil.copytree(engines, tmp_path / "c")
    for values in (
        {"profiles": None},
        {"profiles": [{"batch": [1, 4]}]},
        {"profiles": [{"batch": [1, 1, 4]}], "targets": 5},
    ):
        edit(tmp_path / "c", "denoiser", **values)
        with pytest.raises(BackendError, match=r"denoiser\.passport\.json: damaged"):
            load_backend(model_dir, "tensorrt", tmp_path / "c")
    (tmp_path / "b" / "denoiser.passport.json").write_text("[]")
    with pytest.raises(BackendError, match="damaged"):
        load_backend(model_dir, "tensorrt", tmp_path / "b")
    assert double.Runtime.deserialized == 0


def test_another_machine(model_dir, engines, trt, monkeypatch):
    kind = type(trt)
    monkeypatch.setattr(kind, "machine", Machine())
    with pytest.raises(BackendError, match="none answers to nvidia-smi; use backend=onnxruntime"):
        load_backend(model_dir, "tensorrt", engines)
    monkeypatch.setattr(kind, "machine", Machine("NVIDIA H100 80GB HBM3", "9.0", "535.12"))
    with pytest.raises(BackendError, match=r"NVIDIA driver 535\.12: TensorRT needs 580 or later"):
        load_backend(model_dir, "tensorrt", engines)


def test_the_wrong_device(model_dir, engines, trt):
    with pytest.raises(BackendError, match="TensorRT engines run on cpu"):  # the double's
        load_trt_backend(read_model_info(model_dir), engines, "cuda")


def test_no_tensorrt(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match=r"tensorrt: not installed .*pip install 'ldmseg_fast\[trt\]'"):
        trt_api.load_api("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", type("old", (), {"__version__": "8.6.1", "ILogger": object}))
    with pytest.raises(BackendError, match=r"tensorrt 8\.6\.1: 10\.13 or later is needed"):
        trt_api.load_api("tensorrt")
    with pytest.raises(BackendError, match="flavour='onnx'"):
        trt_api.load_api("onnx")


def test_a_model_of_another_picture_size(model_dir, engines, trt):
    info = replace(read_model_info(model_dir), image_size=512)
    assert load_trt_backend(info, engines).info.image_size == 64


def test_another_machine_than_the_first(monkeypatch):
    """Work on the second GPU is checked against the second GPU."""
    monkeypatch.setattr(machine, "_ask_nvidia_smi", lambda: Machine("NVIDIA A100", "8.0", "580.65"))
    assert machine.this_machine().gpu == "NVIDIA A100"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((8, 0), (9, 0))[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ("NVIDIA A100", "NVIDIA H100")[index])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert machine.this_machine(torch.device("cuda:1")) == Machine("NVIDIA H100", "9.0", "580.65")
    assert machine.this_machine(torch.device("cuda")) == Machine("NVIDIA A100", "8.0", "580.65")


@pytest.mark.parametrize(("text", "number"), [("580.65.06", 580), ("", 0), ("[N/A]", 0)])
def test_driver_numbers(text, number):
    assert machine.driver_major(text) == number


@pytest.mark.parametrize(
    ("installed", "least"),
    [
        ("tensorrt_cu12", 535),
        ("tensorrt_cu13", 580),
        ("tensorrt_cu12_bindings", 535),
        ("tensorrt_rtx_cu12", 580),  # of the other flavour
        (None, 580),
    ],
)
def test_the_least_driver_follows_from_the_package(monkeypatch, installed, least):
    def version(name):
        if name == installed:
            return "11.4.0"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert machine.min_driver("tensorrt") == least


def test_a_driver_of_cuda_12_is_told_the_package_for_it():
    machine.check_driver(Machine("NVIDIA A100", "8.0", "535.12"), machine.MIN_DRIVERS[12])
    with pytest.raises(BackendError, match=r"needs 580 or later; update the driver, or take .*\[trt-cu12\]"):
        machine.check_driver(Machine("NVIDIA A100", "8.0", "550.54"), machine.MIN_DRIVERS[13])
    with pytest.raises(BackendError, match=r"needs 580 or later; update the driver$"):
        machine.check_driver(Machine("NVIDIA A100", "8.0", "470.12"), machine.MIN_DRIVERS[13])
