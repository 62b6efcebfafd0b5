"""Networks through `torch.compile`, in the fastest form that it has for inference, compiled once for all processes."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.backends.packages import Packages, can_package
from ldmseg_fast.backends.packed_weights import compile_frozen
from ldmseg_fast.backends.process_settings import CACHE_VARIABLE, compile_cache

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
        folder = user_cache("packages") if can_package(network) else None
        return FirstCalls(Packages(network, folder) if folder else compile_frozen(network), name)
    compiled = torch.compile(network, dynamic=False, options=dict(GPU_OPTIONS))
    return FirstCalls(compiled, name, cache_folder())


class FirstCalls:
    """Calls a compiled network, and reports how long the first call with inputs of new shapes took.

    cache: folder for what such a call compiles; None: where the process has it.
    """

    def __init__(self, compiled: Callable[..., Tensor], name: str, cache: str | None = None) -> None:
        self.compiled = compiled
        self.name = name
        self.cache = cache
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
        with compile_cache(self.cache):
            result = self.compiled(*args)
        size = "x".join(map(str, shapes[0] or ()))
        print(f"backend=compile: {self.name}, input {size}: {time.monotonic() - started:.1f} s", file=sys.stderr)
        return result


def cache_folder() -> str | None:
    """Returns the folder of the user's cache that what inductor compiles lies in; None where it lies elsewhere.

    By itself inductor keeps it among temporary files, which a restart empties. It stays there where the folder cannot
    be made, and goes where the environment says so.
    """
    utilities = sys.modules.get("torch._inductor.runtime.cache_dir_utils")  # it names its own folder once it compiles
    own = None if utilities is None else utilities.default_cache_dir()
    if os.environ.get(CACHE_VARIABLE, own) != own:
        return None
    folder = user_cache("inductor")
    return str(folder) if folder else None


def user_cache(kind: str) -> Path | None:
    """Makes a folder of the user's cache and returns it; None where that cannot be, or belongs to somebody else."""
    with suppress(OSError, RuntimeError):  # no home, or one that cannot be written
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldmseg_fast" / kind
        folder.mkdir(parents=True, exist_ok=True)
        is_own = not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()
        if is_own and os.access(folder, os.W_OK):
            return folder
    return None
