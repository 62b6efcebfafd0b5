"""Finds what would make this machine faster: threads, memory, instructions, and packages that are not installed."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ldmseg_fast.commands.doctor_finding import Finding, version_of
from ldmseg_fast.config.precision import has_units
from ldmseg_fast.threads import cores

CGROUP = Path("/sys/fs/cgroup")
NODES = Path("/sys/devices/system/node")
LIBRARIES = Path("/proc/self/maps")  # that this process has loaded
ALLOCATORS = ("tcmalloc", "jemalloc", "mimalloc")


def examine_speed() -> list[Finding]:
    """Lists what this process could use to be faster, and whether it does."""
    cuda = torch.cuda.is_available()
    return [
        _cores(),
        _threads(),
        _memory_nodes(),
        _allocator(),
        _vectors(),
        _bfloat16(cuda),
        _extension(),
        _deflate(),
        _for_gpus("Triton", "triton", "pip install triton; plain PyTorch operations run meanwhile", cuda),
        _for_gpus("xformers", "xformers", "a choice of model.attention: pip install 'ldmseg_fast[xformers]'", cuda),
    ]


def cpu_quota(root: Path) -> float | None:
    """Returns how many cores' time a container may use at once, by its control group; None without a limit."""
    try:
        if (root / "cpu.max").is_file():
            quota, period = (root / "cpu.max").read_text().split()[:2]  # version 2: "max 100000" without a limit
        else:
            quota = (root / "cpu" / "cpu.cfs_quota_us").read_text()  # version 1: -1 without a limit
            period = (root / "cpu" / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None
    except (OSError, ValueError):
        return None


def usable_cores() -> int:
    """Counts the cores that this process may keep busy, by its affinity and its container's quota."""
    quota = cpu_quota(CGROUP)
    return cores() if quota is None else max(1, min(cores(), int(quota)))


def _cores() -> Finding:
    here, quota = os.cpu_count() or 1, cpu_quota(CGROUP)
    value = f"{cores()} of {here} usable" + ("" if quota is None else f", a quota of {quota:g}")
    cure = "its affinity or container keeps the others from this process: taskset, a cpuset or `docker run --cpus`"
    return Finding("cores", usable_cores() == here, value, cure)


def _threads() -> Finding:
    threads, usable = torch.get_num_threads(), usable_cores()
    wait = ", which then wait for each other" if threads > usable else ""
    cure = f"export OMP_NUM_THREADS={usable}, as many as there are cores"
    return Finding("threads", threads == usable, f"{threads} on {usable} cores{wait}", cure)


def _memory_nodes() -> Finding:
    nodes = len(list(NODES.glob("node[0-9]*"))) or 1
    cure = "keep a process on one node: numactl --cpunodebind=0 --membind=0 ldmseg ..., and start one for each node"
    return Finding("memory nodes", nodes == 1, str(nodes), cure)


def _allocator() -> Finding:
    loaded = LIBRARIES.read_text(errors="replace") if LIBRARIES.is_file() else ""
    found = next((name for name in ALLOCATORS if name in loaded), None)
    cure = "worth a try: install tcmalloc (Debian: libtcmalloc-minimal4) and start with LD_PRELOAD=FILE ldmseg ..."
    return Finding("allocator", found is not None, found or "the C library's", cure)


def _vectors() -> Finding:
    level = torch.backends.cpu.get_cpu_capability()
    if lowered := os.environ.get("ATEN_CPU_CAPABILITY"):
        return Finding("vector units", False, level, f"unset ATEN_CPU_CAPABILITY, which is {lowered}")
    return Finding("vector units", level != "DEFAULT", level, "no AVX2 here: if this is a virtual machine, pass it on")


def _bfloat16(cuda: bool) -> Finding:
    native = has_units("cuda" if cuda else "cpu", torch.bfloat16)
    amx = not cuda and native and torch.cpu._is_amx_tile_supported()
    value = ("AMX" if amx else "native") if native else "emulated"
    return Finding("bfloat16", native, value, "stay with float32, the default here; train.precision=bf16 is slower")


def _extension() -> Finding:
    from ldmseg_fast.native import _C

    cure = "install a C++17 compiler and reinstall ldmseg_fast; numpy serves meanwhile, more slowly"
    return Finding("C++ extension", _C is not None, "built" if _C is not None else "not built", cure)


def _deflate() -> Finding:
    version = version_of("deflate")
    cure = "pip install deflate; zlib writes maps meanwhile, more slowly"
    return Finding("deflate", version is not None, version or "not installed", cure)


def _for_gpus(subject: str, distribution: str, cure: str, cuda: bool) -> Finding:
    version = version_of(distribution)
    if version is None and not cuda:
        return Finding(subject, True, "not installed; only a GPU would use it")
    return Finding(subject, version is not None, version or "not installed", cure)
