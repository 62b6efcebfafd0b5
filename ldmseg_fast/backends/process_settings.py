"""Settings of PyTorch that belong to the whole process, held for the length of our calls and then put back."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Held:
    """Holds a setting of the process while any caller is inside, in any thread.

    PyTorch has one value for all threads: what else runs beside our calls sees ours. The first to enter keeps the value
    from before, and the last to leave puts it back, whatever the order and also after an exception.

    Args:
        read, write: the setting.
    """

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], None]) -> None:
        self._read = read
        self._write = write
        self._lock = threading.Lock()
        self._inside = 0
        self._before: Any = None

    @contextmanager
    def at(self, value: Any) -> Iterator[None]:
        """Holds `value` within the block."""
        with self._lock:
            if not self._inside:
                self._before = self._read()
            self._write(value)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._write(self._before)


def _read_products() -> tuple[bool | None, str]:
    matmul = torch.backends.cuda.matmul
    try:
        return matmul.allow_tf32, matmul.fp32_precision
    except RuntimeError:  # the process uses the newer of the two settings, and must not mix them
        return None, matmul.fp32_precision


def _write_products(value: tuple[bool | None, str]) -> None:
    old, new = value
    if old is not None:
        torch.backends.cuda.matmul.allow_tf32 = old
    torch.backends.cuda.matmul.fp32_precision = new


def _write_convolutions(value: bool) -> None:
    torch.backends.cudnn.allow_tf32 = value


def _write_benchmark(value: bool) -> None:
    torch.backends.cudnn.benchmark = value


def _write_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_BENCHMARK = Held(lambda: torch.backends.cudnn.benchmark, _write_benchmark)
_PRODUCTS = Held(_read_products, _write_products)
_CONVOLUTIONS = Held(lambda: torch.backends.cudnn.allow_tf32, _write_convolutions)
_CACHE = Held(lambda: os.environ.get(CACHE_VARIABLE), lambda value: _write_variable(CACHE_VARIABLE, value))


@contextmanager
def gpu_settings(device: torch.device, tf32: bool = False) -> Iterator[None]:
    """Holds within the block what makes networks fast on a GPU; nothing on a CPU.

    cuDNN tries its algorithms for each new shape, and keeps the fastest.

    Args:
        device: where the networks run.
        tf32: round the factors of float32 products and convolutions to TF32; else that stays as the process has it.
    """
    if device.type != "cuda":
        yield
        return
    with _BENCHMARK.at(True):
        if not tf32:
            yield
            return
        old = None if _read_products()[0] is None else True
        with _PRODUCTS.at((old, "tf32")), _CONVOLUTIONS.at(True):
            yield


@contextmanager
def compile_cache(folder: str | None) -> Iterator[None]:
    """Lets inductor keep what it compiles within the block in `folder`; None: where the process has it."""
    if folder is None:
        yield
        return
    with _CACHE.at(folder):
        yield
