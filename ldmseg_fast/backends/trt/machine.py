"""Finds the GPU and its driver, and the driver that TensorRT needs."""

from __future__ import annotations

import importlib.metadata
import subprocess
from dataclasses import dataclass
from functools import lru_cache

import torch

from ldmseg_fast.errors import BackendError

MIN_DRIVERS = {12: 535, 13: 580}  # NVIDIA's driver, by the CUDA that TensorRT was built for
MIN_DRIVER = MIN_DRIVERS[13]  # where no package tells
OLDER_CUDA = "or take TensorRT for CUDA 12: pip install 'ldmseg_fast[trt-cu12]', or [rtx-cu12]"


@dataclass(frozen=True)
class Machine:
    """Names a GPU and its driver; empty where there is none."""

    gpu: str = ""
    compute_capability: str = ""
    driver: str = ""


def this_machine(device: torch.device | None = None) -> Machine:
    """Finds the GPU behind a torch device (default the current one); nvidia-smi's first where torch has no CUDA."""
    machine = _ask_nvidia_smi()
    if not (machine.driver and torch.cuda.is_available()):
        return machine
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    major, minor = torch.cuda.get_device_capability(index)
    return Machine(torch.cuda.get_device_name(index), f"{major}.{minor}", machine.driver)


@lru_cache(maxsize=1)
def _ask_nvidia_smi() -> Machine:
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader", "--id=0"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return Machine()
    parts = [part.strip() for part in output.partition("\n")[0].split(",")]
    return Machine(*parts) if len(parts) == 3 else Machine()


def driver_major(driver: str) -> int:
    """Reads 580 from "580.65.06"; 0 where it is unknown."""
    number = driver.partition(".")[0]
    return int(number) if number.isdigit() else 0


def min_driver(module: str) -> int:
    """Returns the least major of NVIDIA's driver for an installed flavour's `module`, by the CUDA of its package."""
    for major, driver in MIN_DRIVERS.items():
        for name in (f"{module}_cu{major}", f"{module}_cu{major}_bindings"):
            try:
                importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            return driver
    return MIN_DRIVER


def check_driver(machine: Machine, least: int = MIN_DRIVER) -> None:
    """Checks the GPU and its driver. Raises BackendError where none answers, or its major is below `least`."""
    if not machine.gpu:
        raise BackendError(
            "TensorRT runs on NVIDIA GPUs and none answers to nvidia-smi; use backend=onnxruntime or torch here"
        )
    found = driver_major(machine.driver)
    if found < least:
        cure = f"update the driver, {OLDER_CUDA}" if found >= MIN_DRIVERS[12] else "update the driver"
        raise BackendError(f"NVIDIA driver {machine.driver}: TensorRT needs {least} or later; {cure}")
