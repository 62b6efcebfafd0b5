"""Options of speed reach every backend from every command: graphs, precision, fused networks."""

import pytest
import torch

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.app.work import Worker
from ldmseg_fast.backends.load import load_backend
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.backends.torch_backend import TorchBackend
from ldmseg_fast.cli import main
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.errors import ArgumentError, BackendError
from ldmseg_fast.panoptic.format import read_panoptic_png
from tests.backends.test_cuda_graph import make_inputs

ENGINES = {"profile": None, "kernel_specialization": None, "graph_strategy": None}
USUAL = {"cuda_graph": None, "fused": False, "precision": None, "attention": "auto", **ENGINES}


@pytest.mark.parametrize("reason", ["backend=compile makes its own kernels", "it has one down path"])
def test_where_nothing_can_be_fused_the_plain_network_runs(model_dir, monkeypatch, reason):
    backend = "compile" if "compile" in reason else "torch"
    if backend == "torch":
        monkeypatch.setattr("ldmseg_fast.backends.torch_backend.why_not_fused", lambda _: reason)
    monkeypatch.setattr("ldmseg_fast.backends.compiled.can_package", lambda network: False)
    monkeypatch.setattr("ldmseg_fast.backends.compiled.compile_frozen", lambda network: network)
    plain = TorchBackend(read_model_info(model_dir), "cpu", torch.float32)
    with pytest.warns(UserWarning, match=f"^fused: {reason}; the plain network runs instead, with the same results$"):
        found = load_backend(model_dir, backend, device="cpu", fused=True)
    noise, image_latents = make_inputs(1)
    scheduler = Scheduler(plain.info.scheduler)
    assert torch.equal(
        found.sample(noise, image_latents, scheduler, 2), plain.sample(noise, image_latents, scheduler, 2)
    )


def test_exported_graphs_have_what_they_were_exported_with(model_dir, tmp_path):
    for option, reason in (({"fused": True}, "of backend=torch only"), ({"precision": "fp32"}, "fixed when")):
        name, value = next(iter(option.items()))
        with pytest.raises(BackendError, match=f"^{name}={value}: {reason}"):
            LDMSegPipeline.from_pretrained(model_dir, "onnxruntime", tmp_path, device="cpu", **option)


def test_fp8_is_left_out_where_there_is_none_and_can_be_emulated(model_dir):
    noise, image_latents = make_inputs(2)
    plain = TorchBackend(read_model_info(model_dir), "cpu")
    scheduler = Scheduler(plain.info.scheduler)
    expected = plain.sample(noise, image_latents, scheduler, 2)
    message = "^precision=fp8: it needs a GPU of sm_89 or newer, not cpu; fp32 is computed instead"
    with pytest.warns(UserWarning, match=message):
        left_out = TorchBackend(plain.info, "cpu", precision="fp8")
    assert torch.equal(left_out.sample(noise, image_latents, scheduler, 2), expected)
    emulated = TorchBackend(plain.info, "cpu", precision="fp8-emulated")
    found = emulated.sample(noise, image_latents, scheduler, 2)
    assert 0 < (found - expected).norm() < 0.2 * expected.norm()
    with pytest.warns(UserWarning, match="^fused: precision=fp8 has layers of its own; the plain network runs"):
        both = TorchBackend(plain.info, "cpu", precision="fp8-emulated", fused=True)
    assert torch.equal(both.sample(noise, image_latents, scheduler, 2), found)


def test_a_precision_is_a_dtype_by_name(model_dir):
    assert LDMSegPipeline.from_pretrained(model_dir, device="cpu", precision="fp32").backend.dtype == torch.float32
    with pytest.raises(ArgumentError, match=r"^precision='half': one of fp32, bf16, fp16, tf32, fp8"):
        LDMSegPipeline.from_pretrained(model_dir, device="cpu", precision="half")
    with pytest.raises(ArgumentError, match="give one of them"):
        LDMSegPipeline.from_pretrained(model_dir, device="cpu", precision="fp32", dtype=torch.float32)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ([], USUAL),
        (["--no-cuda-graph"], USUAL | {"cuda_graph": False}),
        (["--fused", "--precision", "bf16", "--attention", "sdpa"],
         USUAL | {"fused": True, "precision": "bf16", "attention": "sdpa"}),
        (["--fused-epilogues"], USUAL | {"fused": "epilogues"}),
        (["--profile", "1", "--kernel-specialization", "eager", "--graph-strategy", "whole_graph_capture"],
         USUAL | {"profile": 1, "kernel_specialization": "eager", "graph_strategy": "whole_graph_capture"}),
    ],
    ids=["none", "no graph", "of networks", "epilogues", "of engines"],
)  # fmt: skip
@pytest.mark.parametrize("command", ["predict", "inpaint", "evaluate", "app"])
def test_commands_pass_the_options(model_dir, tmp_path, monkeypatch, scenes, command, option, expected):
    seen = []

    def stop(*args, **settings):
        seen.append({name: settings[name] for name in USUAL})
        raise BackendError("far enough")

    monkeypatch.setattr(LDMSegPipeline, "from_pretrained", stop)
    picture = next((scenes / "val2017").iterdir())
    map_file = scenes / "panoptic_val2017" / picture.name
    first = str(read_panoptic_png(map_file)[0, 0])
    images = {
        "predict": [str(picture), "--out", str(tmp_path)],
        "inpaint": ["--image", str(picture), "--map", str(map_file), "--unknown-id", first, "--out", str(tmp_path)],
        "evaluate": ["--data", str(scenes)],
    }
    if command == "app":  # its model lives in a process, which makes such a worker
        worker_options = []
        monkeypatch.setattr(
            "ldmseg_fast.app.process.ProcessWorker", lambda *_, speed, **__: worker_options.append(speed)
        )
        monkeypatch.setattr("ldmseg_fast.app.server.require_gradio", lambda: None)
        with pytest.raises(AttributeError):  # it goes on with no worker
            main(["app", "--model", str(model_dir), "--port", "0", *option])
        with pytest.raises(BackendError, match="far enough"):
            Worker(model_dir, ("tensorrt",), tmp_path, speed=worker_options[0])
    else:
        assert main([command, str(model_dir), *images[command], *option]) == 2
    assert seen == [expected]


def test_every_loader_hands_it_on(model_dir, monkeypatch, tmp_path):
    seen = []
    for module, name in (
        ("ldmseg_fast.backends.torch_backend", "TorchBackend"),
        ("ldmseg_fast.backends.onnx_backend", "load_onnx_backend"),
        ("ldmseg_fast.backends.trt.trt_backend", "load_trt_backend"),
    ):
        monkeypatch.setattr(f"{module}.{name}", lambda *args, cuda_graph, **others: seen.append(cuda_graph))
    for backend in ("torch", "compile", "onnxruntime", "tensorrt"):
        for asked in (None, False, True):
            engine_dir = tmp_path if backend in ("onnxruntime", "tensorrt") else None
            load_backend(model_dir, backend, engine_dir, cuda_graph=asked)
    assert seen == [None, False, True] * 4
