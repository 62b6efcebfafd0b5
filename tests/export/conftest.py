"""Exported graphs and engines of a narrow model, made once; and TensorRT's double."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from ldmseg_fast.backends.trt import api as trt_api
from ldmseg_fast.backends.trt.api import TrtApi
from ldmseg_fast.backends.trt.machine import Machine
from ldmseg_fast.export import to_onnx, to_trt
from tests.conftest import make_model
from tests.export.triton_double import model_config, repository, triton  # noqa: F401  (fixtures)

GPU = Machine("NVIDIA H100 80GB HBM3", "9.0", "580.65.06")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Exports and comparisons are small: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def graphs(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The narrow model in float32, logits and a sampler of 2 steps included, as the command line makes them."""
    out = tmp_path_factory.mktemp("graphs") / "fp32"
    options = ["--head", "both", "--sampler-steps", "2", "--parity-images", "4"]
    assert to_onnx.main([str(model_dir), "--out", str(out), *options]) == 0
    return out


@pytest.fixture(scope="session")
def half_graphs(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The narrow model in float16, not compared with anything yet."""
    out = tmp_path_factory.mktemp("graphs") / "fp16"
    assert to_onnx.main([str(model_dir), "--out", str(out), "--precision", "fp16", "--no-parity"]) == 0
    return out


@pytest.fixture(scope="session")
def heads_of_32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose attentions are of a head size that TensorRT takes in int8 too."""
    settings = ("unet.block_out_channels=32,64", "unet.num_heads=2,2")
    return make_model(tmp_path_factory.mktemp("heads") / "model", settings)


@pytest.fixture(scope="session")
def double():
    """The module that stands in for `tensorrt`."""
    spec = importlib.util.spec_from_file_location("tensorrt_double", Path(__file__).with_name("tensorrt_double.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["tensorrt_double"] = module
    spec.loader.exec_module(module)
    return module


def make_double_api(double, machine: Machine = GPU) -> TrtApi:
    class DoubleApi(TrtApi):
        device = torch.device("cpu")

        @property
        def machine(self):
            return machine

    return DoubleApi(double, "tensorrt")


@pytest.fixture
def trt(double, monkeypatch: pytest.MonkeyPatch) -> TrtApi:
    """TensorRT and an H100, as far as the code under test can see."""
    api = make_double_api(double)
    monkeypatch.setattr(trt_api, "load_api", lambda flavour: api)
    double.Builder.builds = double.Runtime.deserialized = 0
    return api


@pytest.fixture(scope="session")
def engines(graphs: Path, double, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines of the double, for batches up to 4, through the command line."""
    out = tmp_path_factory.mktemp("engines") / "fp32"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trt_api, "load_api", lambda flavour: make_double_api(double))
        arguments = ["--out", str(out), "--max-batch", "4", "--max-side", "96", "--verbose"]
        assert to_trt.main([str(graphs), *arguments]) == 0
    return out
