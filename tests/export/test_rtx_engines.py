"""What contexts of engines share and keep, in TensorRT and TensorRT for RTX, through TensorRT's double."""

import mmap
import shutil

import pytest
import torch

from ldmseg_fast.backends.graphs.specs import sample_inputs
from ldmseg_fast.backends.load import load_backend
from ldmseg_fast.backends.trt import api as trt_api
from ldmseg_fast.backends.trt.passport import read_passport
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.errors import BackendError
from ldmseg_fast.export import to_trt
from tests.export.conftest import make_double_api

KERNELS = {f"{name}.kernels" for name in ("image_encoder", "denoiser", "sampler_2", "mask_decoder")}


@pytest.fixture
def rtx(double, monkeypatch):
    """TensorRT for RTX, as far as the code under test can see."""
    api = make_double_api(double)
    api.flavour = "rtx"
    monkeypatch.setattr(trt_api, "load_api", lambda flavour: api)
    double.run_configs.clear()
    return api


@pytest.fixture(scope="module")
def built(graphs, double, tmp_path_factory):
    out = tmp_path_factory.mktemp("rtx") / "engines"
    with pytest.MonkeyPatch.context() as patch:
        api = make_double_api(double)
        api.flavour = "rtx"
        patch.setattr(trt_api, "load_api", lambda flavour: api)
        assert to_trt.main([str(graphs), "--out", str(out), "--flavour", "rtx", "--max-batch", "4"]) == 0
    return out


@pytest.fixture
def rtx_engines(built, tmp_path):
    return shutil.copytree(built, tmp_path / "engines")


def use(backend, *step_counts):
    """Runs every graph, the sampler with these numbers of steps, and returns the latents."""
    image_latents = backend.encode_image(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    found = [backend.sample(noise, image_latents, Scheduler(backend.info.scheduler), steps) for steps in step_counts]
    backend.decode_mask(found[0], (64, 64))
    return found


def test_scratch_memory_is_one_for_all_engines_of_a_lane(model_dir, engines, trt, double, monkeypatch):
    given = []
    original = double.IExecutionContext.set_device_memory

    def record(context, memory, size):
        given.append((memory, size))
        return original(context, memory, size)

    monkeypatch.setattr(double.IExecutionContext, "set_device_memory", record)
    backend = load_backend(model_dir, "tensorrt", engines, lanes=2)
    use(backend, 2, 3, 5)
    assert len(given) >= 5 and len(set(given)) == 1 and given[0][1] == double.SCRATCH
    with backend.pool.lane():  # a second lane works at the same time, and so has its own
        use(backend, 2)
    assert len(set(given)) == 2


def test_an_engine_is_read_where_it_lies(model_dir, engines, trt, double, monkeypatch):
    kinds = []
    original = double.Runtime.deserialize_cuda_engine

    def record(runtime, plan):
        kinds.append(type(plan))
        return original(runtime, plan)

    monkeypatch.setattr(double.Runtime, "deserialize_cuda_engine", record)
    load_backend(model_dir, "tensorrt", engines)
    assert kinds == [mmap.mmap] * 4


def test_the_inspectors_layers_are_told(engines):
    assert (engines / "denoiser.layers.txt").read_text().splitlines() == [
        "gemm  fused  Half[1, 2]",
        "unknown  reformat  ",
    ]
    assert read_passport(engines, "denoiser").layers == {"gemm": 1, "unknown": 1}


def test_compiled_kernels_are_kept(model_dir, rtx_engines, rtx, double):
    backend = load_backend(model_dir, "tensorrt", rtx_engines)
    expected = use(backend, 2, 3)
    backend.close()
    assert {path.name for path in rtx_engines.glob("*.kernels")} == KERNELS
    double.run_configs.clear()
    damaged = rtx_engines / "denoiser.kernels"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again = load_backend(model_dir, "tensorrt", rtx_engines)
    read = [config.cache.content for config in double.run_configs]
    assert sorted(bool(content) for content in read) == [False, True, True, True]
    torch.testing.assert_close(use(again, 2, 3), expected)
    written = damaged.read_bytes()
    (rtx_engines / "mask_decoder.kernels").write_bytes(b"of somebody else")
    del again  # not closed
    assert damaged.read_bytes() != written
    assert (rtx_engines / "mask_decoder.kernels").read_bytes() == b"of somebody else"


def test_how_tensorrt_rtx_runs_is_chosen(model_dir, rtx_engines, rtx, double):
    load_backend(model_dir, "tensorrt", rtx_engines)
    assert {config.dynamic_shapes_kernel_specialization_strategy.name for config in double.run_configs} == {"LAZY"}
    double.run_configs.clear()
    chosen = {"kernel_specialization": "eager", "graph_strategy": "whole_graph_capture"}
    load_backend(model_dir, "tensorrt", rtx_engines, **chosen)
    assert {config.dynamic_shapes_kernel_specialization_strategy.name for config in double.run_configs} == {"EAGER"}
    assert {config.cuda_graph_strategy.name for config in double.run_configs} == {"WHOLE_GRAPH_CAPTURE"}
    with pytest.raises(BackendError, match=r"graph_strategy=whole_graph_capture beside cuda_graph=True"):
        load_backend(model_dir, "tensorrt", rtx_engines, cuda_graph=True, **chosen)
    with pytest.raises(BackendError, match=r"kernel_specialization='quick': one of lazy, eager, none expected"):
        load_backend(model_dir, "tensorrt", rtx_engines, kernel_specialization="quick")


def test_the_choice_is_of_tensorrt_rtx_alone(model_dir, engines, trt):
    with pytest.raises(BackendError, match=r"graph_strategy=disabled: of TensorRT-RTX alone"):
        load_backend(model_dir, "tensorrt", engines, graph_strategy="disabled")
    with pytest.raises(BackendError, match="kernel_specialization=lazy: backend=torch cannot use it; it is for tensor"):
        load_backend(model_dir, kernel_specialization="lazy")


def test_what_tensorrt_rtx_cannot_capture_runs_without(model_dir, rtx_engines, rtx, double, monkeypatch):
    backend = load_backend(model_dir, "tensorrt", rtx_engines)
    with backend.pool.lane() as lane:
        runner = lane.runners["image_encoder"]
    tensors = sample_inputs(runner.spec, backend.info, {"batch": 1})
    run = runner.prepare(tensors | {"image_latents": torch.empty(1, 8, 16, 16)})
    run()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    run()
    monkeypatch.setattr(double.IExecutionContext, "is_stream_capturable", lambda context, stream: False)
    with pytest.raises(RuntimeError, match="cannot capture image_encoder"):  # which `Captured` makes a warning of
        run()
