"""`ldmseg doctor`: what this machine has, what each backend will use, and the cure for what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Finding:
    """One line of the table. `cure` says what to do where `ok` is false."""

    subject: str
    ok: bool
    value: str
    cure: str = ""


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(subject: str, names: tuple[str, ...], cure: str) -> Finding:
    versions = [f"{name} {_version(name)}" for name in names if _version(name)]
    return Finding(subject, bool(versions), ", ".join(versions) or "not installed", cure)


def _driver() -> Finding:
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader"]
        output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return Finding("NVIDIA driver", False, "none answers", "install a driver >= 580, or stay on the CPU")
    return Finding("NVIDIA driver", True, "; ".join(output.splitlines()))


def _onnxruntime() -> Finding:
    if importlib.util.find_spec("onnxruntime") is None:
        return Finding("onnxruntime", False, "not installed", "pip install 'ldmseg_fast[cpu]' (or [gpu])")
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        return Finding(
            "onnxruntime", False, "both onnxruntime and onnxruntime-gpu", "they overwrite each other: keep one"
        )
    import onnxruntime

    return Finding(
        "onnxruntime", True, f"{onnxruntime.__version__}, {', '.join(onnxruntime.get_available_providers())}"
    )


def _native() -> Finding:
    from ldmseg_fast.native import _C

    cure = "install a C++17 compiler and reinstall ldmseg_fast; numpy serves meanwhile, more slowly"
    return Finding("C++ extension", _C is not None, "built" if _C is not None else "not built", cure)


def examine() -> list[Finding]:
    """The findings, in the order of the table."""
    cuda = torch.cuda.is_available()
    gpus = [
        f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    ]
    compilers = [name for name in ("g++", "clang++", "nvcc") if shutil.which(name)]
    disk = shutil.disk_usage(".").free / 2**30
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    tensorrt = ("tensorrt", "tensorrt-cu13", "tensorrt-rtx-cu13")
    return [
        Finding("Python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("PyTorch", True, f"{torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}"),
        _driver(),
        Finding("GPUs", cuda, ", ".join(gpus) or "none", "training and sampling run on the CPU, slowly"),
        Finding("cuDNN", cuda, str(torch.backends.cudnn.version() or "none"), "comes with a CUDA build of PyTorch"),
        _package("Triton", ("triton",), "pip install triton (Linux only); without it the plain PyTorch operations run"),
        _native(),
        _onnxruntime(),
        _package("TensorRT", tensorrt, "pip install 'ldmseg_fast[trt]' on a machine with an NVIDIA GPU"),
        _package("DeepSpeed", ("deepspeed",), "pip install deepspeed; needed for training on several ranks"),
        _package("xformers", ("xformers",), "optional: pip install 'ldmseg_fast[xformers]'"),
        Finding("compilers", bool(compilers), ", ".join(compilers) or "none", "torch.compile on a CPU needs g++"),
        Finding("memory, disk", disk > 5, f"{memory:.0f} GiB, {disk:.0f} GiB free", "a full-size model takes 5 GiB"),
        *_backends(cuda),
    ]


def _backends(cuda: bool) -> list[Finding]:
    device = "CUDA, bfloat16, Triton kernels" if cuda else "CPU, float32"
    compiler = cuda or shutil.which("g++") is not None
    return [
        Finding("backend torch", True, device),
        Finding("backend compile", compiler, device if compiler else "unusable", "install g++"),
    ]


def format_table(findings: list[Finding]) -> str:
    """One line a finding, the cure under each that is not ok."""
    width = max(len(finding.subject) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{'ok ' if finding.ok else '-- '} {finding.subject:<{width}}  {finding.value}")
        if not finding.ok:
            lines.append(f"    {'':<{width}}  -> {finding.cure}")
    return "\n".join(lines)
