"""What every benchmark shares: the environment record, fair timing, and one validated JSON file per run.

run = Run("evaluation")                                        # records environment and load before any work
run.check("ours equals panopticapi", ours == theirs)           # a run with a failed check is never saved
timings = measure({"ours": f, "numpy": g}, device="cpu")       # interleaved, so that drift hits both sides
run.add("joint histogram", timings, baseline="numpy", case={"size": "480x640"}, target=3.0)
run.save()                                                     # benchmarks/results/evaluation-<time>.json
"""

import ctypes
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
SCHEMA_VERSION = 1
PERCENTILES = (5, 20, 50, 80, 95, 99)
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "diffusers",
    "transformers",
    "deepspeed",
    "onnxruntime",
    "xformers",
    "hotcoco",
    "pillow",
)
_FLUSH_BYTES = 256 * 2**20  # more than any GPU's L2


class BenchmarkError(RuntimeError):
    """A red check or a record that does not follow the schema."""


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
    flush_l2: bool = True,
) -> dict[str, Timing]:
    """Times functions of no arguments: one sample of each per round, the order turning from round to round.

    On "cuda" by events after an L2 flush (`flush_l2`), otherwise by perf_counter. Calls shorter than `min_sample_ms`
    are repeated within a sample. Stops early, after at least 5 rounds, when `max_seconds` have gone by. Then one more
    call of each measures its peak memory.
    """
    cuda = torch.device(device).type == "cuda"
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device) if cuda and flush_l2 else None
    repeats = {}
    for name, function in functions.items():
        for _ in range(max(warmup, 1)):
            function()
        once = _sample(function, 1, cuda, None)
        # a flushed cache is only flushed for the first of several calls
        repeats[name] = 1 if flush is not None else max(1, math.ceil(min_sample_ms / max(once, 1e-4)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    started = time.perf_counter()
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(_sample(functions[name], repeats[name], cuda, flush))
        if index >= 4 and time.perf_counter() - started > max_seconds:
            break
    return {name: Timing(tuple(samples[name]), peak_memory(functions[name], device)) for name in names}


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
        ctypes.CDLL(None).malloc_trim(0)  # or memory freed earlier is reused unseen
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark VmHWM
        before = _status_bytes("VmRSS")
        function()
        return max(0, _status_bytes("VmHWM") - before)
    except (OSError, AttributeError):  # no procfs, no glibc
        return None


@dataclass
class Run:
    """One run of one suite. Construct it before any work, so that the load before the run is recorded."""

    suite: str
    quick: bool = False
    environment: dict[str, Any] = field(default_factory=lambda: environment())
    results: list[dict[str, Any]] = field(default_factory=list)
    checks: dict[str, bool] = field(default_factory=dict)

    def check(self, name: str, passed: bool) -> None:
        """Records a correctness test that stands beside the numbers; raises `BenchmarkError` if it is red."""
        self.checks[name] = bool(passed)
        if not passed:
            raise BenchmarkError(f"{self.suite}: check failed, nothing is recorded: {name}")

    def add(
        self,
        name: str,
        timings: Mapping[str, Timing],
        *,
        baseline: str | None = None,
        case: Mapping[str, Any] | None = None,
        items: int = 1,
        bytes_moved: float | None = None,
        flops: float | None = None,
        floor_ms: float | None = None,
        target: float | None = None,
        quality: Mapping[str, float] | None = None,
    ) -> list[dict[str, Any]]:
        """One row per timing, printed and kept. `items` calls' worth of work (images) is divided out of the times.

        `ratio` is the baseline's median over the row's; `target` is the ratio wanted (of a row without baseline: the
        milliseconds); `floor_share` is floor_ms over the median.
        """
        rows = []
        for variant, timing in timings.items():
            scaled = {f"p{percent}": timing.percentile(percent) / items for percent in PERCENTILES}
            row = {
                "name": name,
                "variant": variant,
                "case": dict(case or {}),
                "unit": "ms",
                **scaled,
                "samples": len(timing.samples),
                "spread": timing.spread,
                "peak_memory_bytes": timing.peak_memory_bytes,
                "baseline": baseline,
                "ratio": timings[baseline].median / timing.median if baseline else None,
                "bytes": bytes_moved,
                "flops": flops,
                "floor_share": floor_ms / scaled["p50"] if floor_ms else None,
                "target": target if variant != baseline else None,
                "quality": dict(quality or {}),
            }
            rows.append(row)
            print(format_row(row), flush=True)
        self.results += rows
        return rows

    def add_value(
        self, name: str, value: float, unit: str, *, case: Mapping[str, Any] | None = None, **more: Any
    ) -> None:
        """A number that is no distribution of times (a ratio, bytes, a PQ)."""
        row = {
            "name": name,
            "variant": more.pop("variant", "ours"),
            "case": dict(case or {}),
            "unit": unit,
            "value": value,
            **more,
        }
        self.results.append(row)
        print(format_row(row), flush=True)

    def save(self, folder: Path = RESULTS) -> Path:
        """Writes the run as a new file that no later run touches; raises `BenchmarkError` if it breaks the schema."""
        record = {
            "schema": SCHEMA_VERSION,
            "suite": self.suite,
            "quick": self.quick,
            "environment": self.environment,
            "checks": self.checks,
            "results": self.results,
        }
        validate(record)
        folder.mkdir(parents=True, exist_ok=True)
        stamp = self.environment["time"].replace("-", "").replace(":", "")
        path = folder / f"{self.suite}-{stamp}.json"
        with path.open("x", encoding="utf-8") as file:
            json.dump(record, file, indent=1, allow_nan=False)
            file.write("\n")
        print(f"saved {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
        return path


def environment() -> dict[str, Any]:
    """Where and how a run was measured. Holds no host name and no absolute path."""
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


def validate(record: Mapping[str, Any]) -> None:
    """Raises `BenchmarkError` naming the first field of a run's record that breaks the schema."""
    kinds: dict[str, type] = {
        "schema": int,
        "suite": str,
        "quick": bool,
        "environment": dict,
        "checks": dict,
        "results": list,
    }
    for key, kind in kinds.items():
        if not isinstance(record.get(key), kind):
            raise BenchmarkError(f"`{key}` must be a {kind.__name__}, got {record.get(key)!r:.80}")
    env = record["environment"]
    for key in ("time", "command", "commit", "python"):
        if not isinstance(env.get(key), str) or not env[key]:
            raise BenchmarkError(f"`environment.{key}` must be a non-empty string, got {env.get(key)!r}")
    if "cuda" not in env or not isinstance(env.get("gpu"), Mapping) or "name" not in env["gpu"]:
        raise BenchmarkError("`environment.cuda` and `environment.gpu.name` must be there (null on a CPU)")
    if not all(record["checks"].values()):
        raise BenchmarkError(f"red checks: {[name for name, passed in record['checks'].items() if not passed]}")
    if not record["results"]:
        raise BenchmarkError("`results` is empty")
    for index, row in enumerate(record["results"]):
        wanted: tuple[str, ...] = ("value",) if "value" in row else tuple(f"p{percent}" for percent in PERCENTILES)
        for key in ("name", "variant", "unit"):
            if not isinstance(row.get(key), str):
                raise BenchmarkError(f"`results[{index}].{key}` must be a string, got {row.get(key)!r}")
        for key in wanted:
            if not isinstance(row.get(key), int | float) or not math.isfinite(row[key]):
                raise BenchmarkError(f"`results[{index}].{key}` must be a finite number, got {row.get(key)!r}")


def format_row(row: Mapping[str, Any]) -> str:
    """One line of a table for people."""
    case = " ".join(f"{key}={value}" for key, value in row["case"].items())
    head = f"{row['name']:<28} {case:<28} {row['variant']:<22}"
    if "value" in row:
        return f"{head} {row['value']:>10.4g} {row['unit']}"
    ratio = f" {row['ratio']:6.2f}x" if row["ratio"] is not None else ""
    floor = f" floor {row['floor_share']:4.0%}" if row["floor_share"] is not None else ""
    memory = row["peak_memory_bytes"]
    peak = f" +{memory / 2**20:.1f} MiB" if memory is not None else ""
    return f"{head} {row['p50']:>10.4f} ms  p80/p20 {row['spread']:.2f}{ratio}{floor}{peak}"


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


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


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
