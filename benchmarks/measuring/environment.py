"""Records where and how a run was measured: machine, clocks, versions, commit, command, load before the run."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "diffusers",
    "transformers",
    "deepspeed",
    "onnxruntime",
    "openvino",
    "xformers",
    "torchao",
    "hotcoco",
    "pillow",
)


def environment() -> dict[str, Any]:
    """Returns where and how a run was measured. Holds no host name and no absolute path."""
    load = os.getloadavg() if hasattr(os, "getloadavg") else (None,) * 3
    return {
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": _command(),
        "commit": _git("rev-parse", "HEAD") or os.environ.get("LDMSEG_COMMIT", "unknown"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "cpu": {
            "name": _cpu_field("model name") or platform.processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "mhz": _cpu_field("cpu MHz"),
            "torch_threads": torch.get_num_threads(),
            "load_before": load[0],
        },
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "gpu": _gpu(),
    }


def _command() -> str:
    """The command line with paths relative to the checkout; of a path outside it only the last part."""
    words = []
    for word in sys.argv:
        key, equals, value = word.rpartition("=")
        path = Path(value)
        if path.exists() and (path.is_absolute() or ".." in path.parts or path.suffix == ".py"):
            path = path.resolve()
            value = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else f".../{path.name}"
        elif path.is_absolute():
            value = f".../{path.name}"
        words.append(key + equals + value)
    return shlex.join(["python", *words])


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_field(name: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), None)


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"name": None}
    properties = torch.cuda.get_device_properties(0)
    queried = ("driver_version", "power.limit", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(queried)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        told = dict(zip(queried, (value.strip() for value in output.split(","))))
    except (OSError, subprocess.SubprocessError):
        told = {}
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        **told,
    }
