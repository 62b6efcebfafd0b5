"""`ldmseg doctor` tells what this machine has, what each backend will use, and the cure for what is missing or slow."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
from dataclasses import asdict

import torch

from ldmseg_fast.backends.trt.api import FLAVOURS
from ldmseg_fast.backends.trt.machine import Machine, driver_major, min_driver, this_machine
from ldmseg_fast.commands.doctor_finding import Finding, format_table, version_of
from ldmseg_fast.commands.doctor_speed import examine_speed
from ldmseg_fast.commands.options import add_json_argument, print_json
from ldmseg_fast.training.cache_memory import memory_left

ONNX = "pip install 'ldmseg_fast[onnx]', or [onnx-gpu] with an NVIDIA GPU"
DISTRIBUTIONS = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
}


def examine() -> list[Finding]:
    """Lists the findings in the order of the table; the backends come last."""
    return [
        Finding("Python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("PyTorch", True, f"{torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}"),
        _driver(this_machine()),
        _gpus(),
        _cudnn(),
        _onnxruntime(),
        _package("ONNX export", ("onnx", "onnxscript"), ONNX, all_of_them=True),
        _tensorrt("TensorRT", "tensorrt"),
        _tensorrt("TensorRT-RTX", "rtx"),
        _package("DeepSpeed", ("deepspeed",), "for several ranks: pip install 'ldmseg_fast[train]'"),
        _package(
            "app", ("gradio", "prometheus-client"), "for `ldmseg app`: pip install 'ldmseg_fast[app]'", all_of_them=True
        ),
        _compilers(),
        _memory(),
        _disk(),
        *backends(),
    ]


def backends() -> list[Finding]:
    """Tells what each backend would run on, or why it cannot."""
    cuda = torch.cuda.is_available()
    device = "CUDA, bfloat16, Triton kernels" if cuda else "CPU, float32"
    compiler = cuda or shutil.which("g++") is not None
    return [
        Finding("backend torch", True, device),
        Finding("backend compile", compiler, device if compiler else "no C++ compiler", "install g++"),
        _onnxruntime_backend(cuda),
        _tensorrt_backend(),
    ]


def _package(subject: str, names: tuple[str, ...], cure: str, all_of_them: bool = False) -> Finding:
    found = [f"{name} {version}" for name in names if (version := version_of(name))]
    ok = len(found) == len(names) if all_of_them else bool(found)
    return Finding(subject, ok, ", ".join(found) or "not installed", cure)


def _driver(machine: Machine) -> Finding:
    least = _min_driver()
    if not machine.gpu:
        return Finding("NVIDIA driver", False, "none answers", f"install a driver >= {least}, or stay on the CPU")
    recent = driver_major(machine.driver) >= least
    return Finding("NVIDIA driver", recent, machine.driver, f"TensorRT needs {least} or later: update the driver")


def _min_driver() -> int:
    """Returns the least driver of the TensorRT that is installed, by its major; of the newest where there is none."""
    flavour = next((flavour for flavour in FLAVOURS if tensorrt_version(flavour)), "tensorrt")
    return min_driver(FLAVOURS[flavour].module)


def _gpus() -> Finding:
    cure = "training and sampling run on the CPU, slowly"
    if not torch.cuda.is_available():
        gpu = this_machine().gpu
        if gpu:
            why = "this PyTorch has no CUDA" if torch.version.cuda is None else "PyTorch cannot use it"
            return Finding("GPUs", False, f"{gpu}, but {why}", "install the CUDA build of PyTorch")
        return Finding("GPUs", False, "none", cure)
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        names.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor}, {memory:.0f} GiB)")
    return Finding("GPUs", True, ", ".join(names))


def _cudnn() -> Finding:
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return Finding("cuDNN", version is not None, str(version or "none"), "comes with a CUDA build of PyTorch")


def onnxruntime_providers() -> list[str] | None:
    """Lists ONNX Runtime's execution providers; None where it is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def _onnxruntime() -> Finding:
    providers = onnxruntime_providers()
    if providers is None:
        return Finding("onnxruntime", False, "not installed", ONNX)
    if version_of("onnxruntime") and version_of("onnxruntime-gpu"):
        cure = "they overwrite each other: uninstall both, then install one"
        return Finding("onnxruntime", False, "both onnxruntime and onnxruntime-gpu", cure)
    version = version_of("onnxruntime") or version_of("onnxruntime-gpu") or "of unknown version"
    return Finding("onnxruntime", True, f"{version}, {', '.join(providers)}")


def _onnxruntime_backend(cuda: bool) -> Finding:
    subject, providers = "backend onnxruntime", onnxruntime_providers()
    if providers is None:
        return Finding(subject, False, "onnxruntime is not installed", ONNX)
    if not cuda:
        return Finding(subject, True, "CPU")
    cure = "pip uninstall onnxruntime, then pip install 'ldmseg_fast[onnx-gpu]'"
    if "CUDAExecutionProvider" in providers:
        return Finding(subject, True, "CUDA")
    return Finding(subject, False, "CPU: this onnxruntime has no CUDA provider", cure)


def tensorrt_version(flavour: str) -> str | None:
    """Returns the version of a flavour of TensorRT; None where it is not installed."""
    return next((version for name in DISTRIBUTIONS[flavour] if (version := version_of(name))), None)


def _is_recent(flavour: str, version: str) -> bool:
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    return numbers >= FLAVOURS[flavour].minimum


def _tensorrt(subject: str, flavour: str) -> Finding:
    version = tensorrt_version(flavour)
    if version is None:
        return Finding(subject, False, "not installed", "optional: " + FLAVOURS[flavour].install)
    least = ".".join(map(str, FLAVOURS[flavour].minimum))
    return Finding(subject, _is_recent(flavour, version), version, f"{least} or later: {FLAVOURS[flavour].install}")


def _tensorrt_backend() -> Finding:
    subject, machine = "backend tensorrt", this_machine()
    found = {flavour: version for flavour in FLAVOURS if (version := tensorrt_version(flavour))}
    usable = [flavour for flavour, version in found.items() if _is_recent(flavour, version)]
    if not usable:
        return Finding(subject, False, "TensorRT is not installed", FLAVOURS["tensorrt"].install)
    names = ", ".join(f"{'TensorRT-RTX' if flavour == 'rtx' else 'TensorRT'} {found[flavour]}" for flavour in usable)
    if not machine.gpu:
        ahead = " (builds ahead of time only)" if "rtx" in usable else ""
        return Finding(subject, False, f"{names}, no GPU{ahead}", "use backend onnxruntime or torch on this machine")
    if not _driver(machine).ok:
        return Finding(
            subject, False, f"{names}, driver {machine.driver}", f"update the driver to {_min_driver()} or later"
        )
    if not torch.cuda.is_available():
        return Finding(subject, False, f"{names}, PyTorch without CUDA", "install the CUDA build of PyTorch")
    return Finding(subject, True, f"{names} on {machine.gpu}")


def _compilers() -> Finding:
    found = [name for name in ("g++", "clang++", "nvcc") if shutil.which(name)]
    return Finding("compilers", bool(found), ", ".join(found) or "none", "torch.compile on a CPU needs g++")


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = memory_left()
    free = total if found is None else found / 2**30
    return Finding("memory", free > 5, f"{free:.0f} of {total:.0f} GiB free", "a full-size model takes 5 GiB")


def _disk() -> Finding:
    free = shutil.disk_usage(".").free / 2**30
    return Finding("disk", free > 10, f"{free:.0f} GiB free here", "a full-size model with its engines takes 10 GiB")


EXAMPLES = (
    "ldmseg doctor",
    "ldmseg doctor --json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --json."""
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Prints what can run and what would make it faster; nothing found wrong is an error, so it returns 0."""
    can_run, speed = examine(), examine_speed()
    if args.json:
        print_json({"can_run": [asdict(each) for each in can_run], "speed": [asdict(each) for each in speed]})
        return 0
    print(f"what can run here:\n{format_table(can_run)}\n\nwhat makes it fast here:\n{format_table(speed)}")
    return 0
