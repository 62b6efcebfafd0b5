"""Fair timing: interleaved rounds, so that drift hits both sides; CUDA events or perf_counter; peak memory."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldmseg_fast.errors import UserError
from ldmseg_fast.export.memory import free_memory

_FLUSH_BYTES = 256 * 2**20  # more than any GPU's L2


@dataclass(frozen=True)
class Timing:
    """Samples of one function, in milliseconds a call."""

    samples: tuple[float, ...]
    peak_memory_bytes: int | None = None

    @property
    def median(self) -> float:
        return self.percentile(50)

    @property
    def spread(self) -> float:
        """p80 / p20: 1 is perfectly steady."""
        return self.percentile(80) / self.percentile(20)

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.samples, percent))


def measure(
    functions: Mapping[str, Callable[[], Any]],
    *,
    device: str = "cpu",
    warmup: int = 3,
    rounds: int = 20,
    min_sample_ms: float = 1.0,
    max_seconds: float = 60.0,
    min_rounds: int = 5,
    flush_l2: bool = True,
    memory: bool = True,
) -> dict[str, Timing]:
    """Times functions of no arguments: one sample of each per round, the order turning from round to round.

    On "cuda" by events after an L2 flush (`flush_l2`), otherwise by perf_counter. Calls shorter than `min_sample_ms`
    are repeated within a sample; 0: never. Stops early, after at least `min_rounds` rounds, when another round would
    not end within `max_seconds`. Then, with `memory`, one more call of each measures its peak memory.
    """
    cuda = torch.device(device).type == "cuda"
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device) if cuda and flush_l2 else None
    repeats = {}
    for name, function in functions.items():
        for _ in range(warmup):
            function()
        # a flushed cache is only flushed for the first of several calls
        once = math.inf if flush is not None or not min_sample_ms else _sample(function, 1, cuda, None)
        repeats[name] = max(1, math.ceil(min_sample_ms / max(once, 1e-4)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    started = time.perf_counter()
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(_sample(functions[name], repeats[name], cuda, flush))
        rounds_done, seconds = index + 1, time.perf_counter() - started
        if rounds_done >= min_rounds and seconds * (rounds_done + 1) / rounds_done > max_seconds:
            break
    peaks = {name: peak_memory(functions[name], device) if memory else None for name in names}
    return {name: Timing(tuple(samples[name]), peaks[name]) for name in names}


def time_differences(
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]], images: int, rounds: int, slow: tuple[str, ...] = ()
) -> dict[str, Timing]:
    """Times functions by the difference of two calls, so that start-up costs drop out.

    Args:
        calls: by name, a call with fewer and one with more images; the names take turns.
        images: by how many images the two calls differ.
        rounds: samples of each name.
        slow: names of which three samples are enough.

    Returns:
        Milliseconds an image.

    Raises:
        UserError: a call with more images was never the longer one.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name, (few, many) in calls.items():
            if name in slow and turn >= 3:
                continue
            seconds = seconds_of(many) - seconds_of(few)
            if seconds > 0:  # else something else ran during the smaller one
                samples[name].append(1e3 * seconds / images)
    if disturbed := [name for name, values in samples.items() if not values]:
        raise UserError(f"{', '.join(disturbed)}: more images never took longer; measure on an idle machine")
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def seconds_of(function: Callable[[], Any]) -> float:
    """Returns the wall time of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def peak_memory(function: Callable[[], Any], device: str = "cpu") -> int | None:
    """Bytes that one call needs above what was held before; None where the system does not tell."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        free_memory()  # or what was freed earlier is reused unseen
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark VmHWM
        before = _status_bytes("VmRSS")
        function()
        return max(0, _status_bytes("VmHWM") - before)
    except OSError:  # no procfs
        return None


def _sample(function: Callable[[], Any], repeats: int, cuda: bool, flush: torch.Tensor | None) -> float:
    """Milliseconds a call, over `repeats` calls."""
    if not cuda:
        started = time.perf_counter_ns()
        for _ in range(repeats):
            function()
        return (time.perf_counter_ns() - started) / 1e6 / repeats
    if flush is not None:
        flush.zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def captured(function: Callable[[], Any]) -> Callable[[], Any]:
    """Returns a replay of a CUDA graph of `function`, so that the time of the GPU is taken and not that of Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay
