"""`ldmseg doctor`: every red line has its cure, on machines of all kinds."""

import pytest
import torch

from ldmseg_fast.backends.load import BACKENDS
from ldmseg_fast.backends.trt.api import Machine
from ldmseg_fast.cli import main
from ldmseg_fast.commands import doctor

NO_GPU = Machine()
H100 = Machine("NVIDIA H100 80GB HBM3", "9.0", "580.65.06")


@pytest.fixture
def machine(monkeypatch):
    """A machine to be described: GPU, packages, providers."""

    def describe(gpu=NO_GPU, cuda=False, packages=None, providers=("CPUExecutionProvider",)):
        packages = packages or {}
        monkeypatch.setattr(doctor, "this_machine", lambda: gpu)
        monkeypatch.setattr(doctor, "version_of", packages.get)
        monkeypatch.setattr(doctor, "onnxruntime_providers", lambda: providers and list(providers))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: gpu.gpu)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        properties = type("Properties", (), {"total_memory": 80 * 2**30})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        return {finding.subject: finding for finding in doctor.examine()}

    return describe


def test_this_machine(capsys):
    assert main(["doctor"]) == 0
    table = capsys.readouterr().out
    subjects = ("PyTorch", "NVIDIA driver", "GPUs", "cuDNN", "Triton", "onnxruntime", "TensorRT", "TensorRT-RTX")
    for subject in (*subjects, "DeepSpeed", "xformers", "compilers", "memory", "disk"):
        assert f" {subject} " in table
    for name in BACKENDS:
        assert f"backend {name}" in table


def test_every_red_line_has_a_cure(machine):
    for findings in (machine(), machine(H100, cuda=True), machine(providers=None)):
        assert all(finding.cure for finding in findings.values() if not finding.ok)


def test_a_bare_machine(machine):
    found = machine(providers=None)
    assert not found["onnxruntime"].ok and "[cpu]" in found["onnxruntime"].cure
    assert found["backend torch"].value == "CPU, float32"
    assert found["backend onnxruntime"].value == "onnxruntime is not installed"
    assert found["backend tensorrt"].value == "TensorRT is not installed"
    assert found["GPUs"].value == "none" and found["NVIDIA driver"].value == "none answers"


def test_a_machine_with_everything(machine):
    packages = {"onnxruntime-gpu": "1.31.1", "tensorrt-cu13": "11.4.0.1", "triton": "3.8.0", "deepspeed": "0.19.8"}
    found = machine(H100, True, packages, ("CUDAExecutionProvider", "CPUExecutionProvider"))
    assert found["GPUs"].value == "NVIDIA H100 80GB HBM3 (sm_90, 80 GiB)"
    assert found["backend torch"].value.startswith("CUDA")
    assert found["backend onnxruntime"].value == "CUDA"
    assert found["backend tensorrt"].value == "TensorRT 11.4.0.1 on NVIDIA H100 80GB HBM3"
    assert all(found[f"backend {name}"].ok for name in BACKENDS)


@pytest.mark.parametrize(
    ("subject", "settings", "value", "cure"),
    [
        (
            "onnxruntime",
            {"packages": {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}},
            "both onnxruntime and onnxruntime-gpu",
            "they overwrite each other",
        ),
        ("backend onnxruntime", {"gpu": H100, "cuda": True}, "no CUDA provider", "[gpu]"),
        ("GPUs", {"gpu": H100}, "but", "CUDA build of PyTorch"),
        ("NVIDIA driver", {"gpu": Machine("Tesla T4", "7.5", "535.12")}, "535.12", "update the driver"),
        ("TensorRT", {"packages": {"tensorrt": "8.6.1"}}, "8.6.1", "10.13 or later"),
        ("backend tensorrt", {"packages": {"tensorrt": "8.6.1"}}, "TensorRT is not installed", "[trt]"),
        ("backend tensorrt", {"packages": {"tensorrt-rtx-cu13": "1.7.1.116"}}, "builds ahead of time only", "torch"),
        (
            "backend tensorrt",
            {"gpu": Machine("Tesla T4", "7.5", "535.12"), "cuda": True, "packages": {"tensorrt-cu13": "11.4.0"}},
            "driver 535.12",
            "update the driver to 580",
        ),
        (
            "backend tensorrt",
            {"gpu": H100, "packages": {"tensorrt-cu13": "11.4.0"}},
            "PyTorch without CUDA",
            "CUDA build of PyTorch",
        ),
        ("ONNX export", {"packages": {"onnx": "1.23.2"}}, "onnx 1.23.2", "[cpu]"),
        ("modelopt", {}, "not installed", "[quantize]"),
    ],
)
def test_what_is_wrong_is_named_with_its_cure(machine, subject, settings, value, cure):
    finding = machine(**settings)[subject]
    assert not finding.ok and value in finding.value and cure in finding.cure


def test_no_compiler(machine, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    found = machine()
    assert found["compilers"].value == "none" and found["backend compile"].value == "no C++ compiler"


def test_the_table():
    rows = [doctor.Finding("short", True, "1"), doctor.Finding("much longer", False, "none", "buy one")]
    assert doctor.format_table(rows) == ("ok  short        1\n--  much longer  none\n                 -> buy one")
