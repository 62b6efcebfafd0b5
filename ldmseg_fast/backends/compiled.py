"""Networks through `torch.compile`, in the fastest form that it has for inference, compiled once for all processes."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.backends.packed_weights import compile_frozen

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
# of inductor, on a GPU: products and convolutions are tuned, 1x1 convolutions are products, the tuned are tuned again.
# CUDA graphs are ours, see `graphs.loop`: one around the whole loop, and not one for each network.
GPU_OPTIONS = {"max_autotune": True, "coordinate_descent_tuning": True, "conv_1x1_as_mm": True}


def compile_network(network: Any, name: str, device: torch.device) -> Callable[..., Tensor]:
    """Compiles a network for inference; its weights must not change after.

    It is compiled when first called, and anew for another batch or size: that is faster than code for any size. The
    first call of each says on stderr what it took. What was compiled is kept in inductor's cache for later processes:
    for a GPU in the user's cache folder, for a CPU among temporary files, as code with packed weights is for this
    machine alone.

    Args:
        network: a module, or a function, of tensors of any shape and dtype.
        name: for the message.
        device: where it runs.
    """
    if device.type == "cpu":
        compiled = compile_frozen(network)
    else:
        keep_cache()
        compiled = torch.compile(network, dynamic=False, options=dict(GPU_OPTIONS))
    return FirstCalls(compiled, name)


class FirstCalls:
    """Calls a compiled network, and reports how long the first call with inputs of new shapes took."""

    def __init__(self, compiled: Callable[..., Tensor], name: str) -> None:
        self.compiled = compiled
        self.name = name
        self._seen: set[tuple[Any, ...]] = set()
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Tensor:
        """Returns what the network does of the same arguments, tensors of any shape and dtype."""
        shapes = tuple(tuple(each.shape) if isinstance(each, Tensor) else None for each in args)
        with self._lock:
            is_new = shapes not in self._seen
            self._seen.add(shapes)
        if not is_new:
            return self.compiled(*args)
        started = time.monotonic()
        result = self.compiled(*args)
        size = "x".join(map(str, shapes[0] or ()))
        print(f"backend=compile: {self.name}, input {size}: {time.monotonic() - started:.1f} s", file=sys.stderr)
        return result


def keep_cache() -> None:
    """Points inductor's cache to the user's cache folder, unless the environment names another.

    By itself inductor keeps it among temporary files, which a restart empties. Where the folder cannot be made it stays
    there.
    """
    if CACHE_VARIABLE in os.environ:
        return
    with suppress(OSError, RuntimeError):  # no home, or one that cannot be written
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldmseg_fast" / "inductor"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ[CACHE_VARIABLE] = str(folder)


@contextmanager
def tuned_convolutions(device: torch.device) -> Iterator[None]:
    """Lets cuDNN try its algorithms for each new shape within the block, and keep the fastest; nothing on a CPU."""
    before = torch.backends.cudnn.benchmark
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
