"""`ldmseg doctor`: every red line has its cure, on machines of all kinds."""

import json
import sys

import pytest
import torch

from ldmseg_fast.backends.load import BACKENDS
from ldmseg_fast.backends.trt.machine import Machine
from ldmseg_fast.cli import main
from ldmseg_fast.commands import doctor, doctor_speed

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
    assert not found["onnxruntime"].ok and "[onnx]" in found["onnxruntime"].cure
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
        ("backend onnxruntime", {"gpu": H100, "cuda": True}, "no CUDA provider", "[onnx-gpu]"),
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
        ("ONNX export", {"packages": {"onnx": "1.23.2"}}, "onnx 1.23.2", "[onnx]"),
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


def test_json_is_all_of_stdout(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"can_run", "speed"} == found.keys()
    assert all(each.keys() == {"subject", "ok", "value", "cure"} for rows in found.values() for each in rows)


@pytest.fixture
def speed(monkeypatch, tmp_path):
    """What makes a machine fast that is described: cores, threads, a container's quota, packages, instructions."""
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)

    def describe(
        cores=8, usable=8, quota="max 100000", threads=8, nodes=1, library="", packages=(), units=True, gpu=False
    ):
        for name in range(nodes):
            (tmp_path / f"node{name}").mkdir()
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
        (tmp_path / "maps").write_text(f"7f00 r-xp /usr/lib/{library}\n")
        monkeypatch.setattr(doctor_speed, "CGROUP", tmp_path)
        monkeypatch.setattr(doctor_speed, "NODES", tmp_path)
        monkeypatch.setattr(doctor_speed, "LIBRARIES", tmp_path / "maps")
        monkeypatch.setattr(doctor_speed, "cores", lambda: usable)
        monkeypatch.setattr(doctor_speed.os, "cpu_count", lambda: cores)
        monkeypatch.setattr(doctor_speed, "version_of", dict.fromkeys(packages, "1.0").get)
        monkeypatch.setattr(doctor_speed, "has_units", lambda *_: units)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2" if units else "DEFAULT")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        return {finding.subject: finding for finding in doctor_speed.examine_speed()}

    return describe


def test_a_machine_with_nothing_to_gain(speed):
    found = speed(library="libtcmalloc_minimal.so.4", packages=("deflate", "triton", "xformers"))
    assert all(finding.ok for subject, finding in found.items() if subject != "C++ extension")


def test_every_slow_line_has_a_cure(speed, monkeypatch):
    monkeypatch.setattr("ldmseg_fast.native._C", None)
    found = speed(64, 16, "200000 100000", 16, nodes=2, units=False, gpu=True)
    assert not any(finding.ok for finding in found.values())
    assert all(finding.cure for finding in found.values())


@pytest.mark.parametrize(
    ("subject", "settings", "value", "cure"),
    [
        ("cores", {"usable": 2}, "2 of 8 usable", "cpuset"),
        ("cores", {"quota": "150000 100000"}, "a quota of 1.5", "--cpus"),
        ("threads", {"quota": "200000 100000"}, "8 on 2 cores", "OMP_NUM_THREADS=2"),
        ("threads", {"threads": 1}, "1 on 8 cores", "OMP_NUM_THREADS=8"),
        ("memory nodes", {"nodes": 4}, "4", "numactl"),
        ("allocator", {"library": "libc.so.6"}, "the C library's", "LD_PRELOAD"),
        ("vector units", {"units": False}, "DEFAULT", "AVX2"),
        ("bfloat16", {"units": False}, "emulated", "float32"),
        ("deflate", {}, "not installed", "pip install deflate"),
        ("Triton", {"gpu": True}, "not installed", "pip install triton"),
        ("xformers", {"gpu": True}, "not installed", "ldmseg_fast[xformers]"),
    ],
)
def test_what_is_slow_is_named_with_its_cure(speed, subject, settings, value, cure):
    finding = speed(**settings)[subject]
    assert not finding.ok and value in finding.value and cure in finding.cure


def test_what_only_a_gpu_would_use_is_no_fault_without_one(speed):
    found = speed()
    assert found["Triton"].ok and found["xformers"].ok


def test_lowered_instructions_are_named(speed, monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert speed()["vector units"].cure == "unset ATEN_CPU_CAPABILITY, which is avx2"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "250000 100000"}, 2.5),
        ({"cpu.max": "nonsense"}, None),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
        ({}, None),
    ],
    ids=str,
)
def test_quota_of_a_control_group(files, quota, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert doctor_speed.cpu_quota(tmp_path) == quota


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps is Linux's")
def test_the_allocator_of_this_process_is_found(monkeypatch):
    monkeypatch.setattr(doctor_speed, "ALLOCATORS", ("libtorch_cpu",))
    assert doctor_speed._allocator().ok
