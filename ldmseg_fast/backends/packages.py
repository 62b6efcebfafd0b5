"""Networks compiled for a CPU and kept in one file each: a later process loads them and compiles nothing.

A file is a package of PyTorch's AOTInductor: machine code with the weights in oneDNN's layout. It is named after
all that it depends on, so that none is ever out of date; those not used for longest go first.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldmseg_fast.backends.packed_weights import compile_frozen

LARGEST = 2**30  # bytes of weights, from where on a network is compiled in each process: its files would fill the cache
CACHE_BYTES = 4 * 2**30  # of all packages
SUFFIX, UNFINISHED = ".pt2", "unfinished-"
A_DAY = 86400  # seconds, after which what is unfinished was killed

Run = Callable[..., Any]


def can_package(network: Any) -> bool:
    """Whether a network is a module with weights of less than `LARGEST` bytes."""
    if not isinstance(network, nn.Module):
        return False
    return sum(value.nbytes for value in network.state_dict().values()) < LARGEST


class Packages:
    """Calls a network through its packages, one for each form of its inputs; what is missing is compiled and kept.

    Args:
        network: a module on the CPU, of tensors of any shape and dtype or None; its weights must not change after, and
            need no gradients from here on.
        folder: of the packages.
    """

    def __init__(self, network: nn.Module, folder: Path) -> None:
        self.network = network.requires_grad_(False)
        self.folder = folder
        self._runs: dict[tuple[Any, ...], Run] = {}
        self._lock = threading.Lock()
        self._identity = ""

    def __call__(self, *args: Tensor | None) -> Any:
        """Returns what the network does of the same arguments, tensors of any shape and dtype or None."""
        args = tuple(None if each is None else _dense(each) for each in args)
        form = tuple(None if each is None else (each.dtype, tuple(each.shape), each.stride()) for each in args)
        with self._lock:
            if form not in self._runs:
                self._runs[form] = self._load(form, args)
        return self._runs[form](*(each for each in args if each is not None))

    def _load(self, form: tuple[Any, ...], args: tuple[Tensor | None, ...]) -> Run:
        self._identity = self._identity or _identity(self.network)
        name = hashlib.sha256(f"{self._identity} {form} {torch.get_num_threads()}".encode()).hexdigest()[:32]
        path = self.folder / (name + SUFFIX)
        if (run := _opened(path)) is not None:
            return run
        try:
            _make(self.network, args, path)
        except OSError as error:  # a full disk, say
            warnings.warn(f"{path}: {error.strerror or error}; compiled for this process alone", stacklevel=4)
            return compile_frozen(_WithoutNone(self.network, tuple(each is None for each in args)))
        return _load_package(path)


def _dense(value: Tensor) -> Tensor:
    """A tensor itself, or copied where its strides are not those of a layout: a package relies on them unasked."""
    channels_last = value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
    return value if channels_last else value.contiguous()


def _opened(path: Path) -> Run | None:
    """A package that is there and whole; using it keeps it from being the first to go."""
    try:
        with zipfile.ZipFile(path) as file:
            whole = file.testzip() is None
        os.utime(path)
    except (OSError, zipfile.BadZipFile):
        return None
    return _load_package(path) if whole else None


def _load_package(path: Path) -> Run:
    from torch._inductor import aoti_load_package  # an import of seconds, which only this needs

    return aoti_load_package(str(path))


def _make(network: nn.Module, args: tuple[Tensor | None, ...], path: Path) -> None:
    """Compiles a network for inputs like `args` into the package `path`, which appears whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=path.parent) as made:
        package = Path(made) / path.name
        _compile(network, args, package)
        package.replace(path)
    _make_room(path.parent, path)


def _compile(network: nn.Module, args: tuple[Tensor | None, ...], path: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    with torch.inference_mode(False), torch.no_grad():
        given = tuple(each.clone() for each in args if each is not None)
        program = torch.export.export(_WithoutNone(network, tuple(each is None for each in args)), given, strict=False)
        aoti_compile_and_package(program, package_path=str(path), inductor_configs={"freezing": True})


class _WithoutNone(nn.Module):
    """A network of tensors alone, as a package takes them."""

    def __init__(self, network: nn.Module, absent: tuple[bool, ...]) -> None:
        super().__init__()
        self.network, self.absent = network, absent

    def forward(self, *given: Tensor) -> Any:
        rest = iter(given)
        return self.network(*(None if absent else next(rest) for absent in self.absent))


def _identity(network: nn.Module) -> str:
    """A digest of what a network computes and of what compiles it: code, settings, weights, libraries, processor."""
    digest = hashlib.blake2b(_surroundings().encode())
    settings = [type(network), network, getattr(network, "config", ""), getattr(network, "vae_config", "")]
    digest.update(repr(settings).encode())
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} {value.stride()}".encode())
        digest.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@cache
def _surroundings() -> str:
    sources = hashlib.blake2b()
    for room in ("models", "kernels", "backends"):
        spec = find_spec(f"ldmseg_fast.{room}")
        for folder in (spec and spec.submodule_search_locations) or ():
            for file in sorted(Path(folder).rglob("*.py")):
                sources.update(file.read_bytes())
    processor = ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    isa = [torch.backends.cpu.get_cpu_capability(), os.environ.get("ONEDNN_MAX_CPU_ISA", ""), processor]
    return f"{sources.hexdigest()} {torch.__version__} {sys.version} {isa} {torch.get_float32_matmul_precision()}"


def _make_room(folder: Path, newest: Path) -> None:
    """Deletes the packages that were not used for longest, until the rest fit into `CACHE_BYTES`, and leftovers."""
    for path in folder.glob(UNFINISHED + "*"):
        if time.time() - _used(path) > A_DAY:
            shutil.rmtree(path, ignore_errors=True)
    total = 0
    for path in sorted(folder.glob("*" + SUFFIX), key=_used, reverse=True):
        with suppress(OSError):  # another process deletes too
            total += path.stat().st_size
            if total > CACHE_BYTES and path != newest:
                path.unlink()


def _used(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0
