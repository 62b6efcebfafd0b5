"""Lists the parts of the GPU suite, the most valuable first, with their limits."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measuring.environment import ROOT
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.kernels.backend import KERNELS

OURS_ON_A_GPU = tuple(
    f"torch bfloat16, graph{more}" for more in ("", ", fused", ", fused epilogues", ", fp8 attention", ", fp8")
)
COMPILED_PEERS = tuple(
    f"{name}, compile{more}" for name in ("plain torch", "diffusers") for more in ("", ", float8")
)  # whichever of them this machine can run


@dataclass(frozen=True)
class Part:
    """Describes a process of the suite.

    command: may hold {minutes}, three quarters of the part's limit (the rest is for imports and the last call), and
        {out}, the part's own folder for result files.
    limit: seconds.
    needs: names of parts without which this one says nothing.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    needs: tuple[str, ...] = ()


def script(name: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments))


def make_plan(plan: str, device: str, quick: bool, work: Path, tune: Path | None = None) -> list[list[Part]]:
    """Returns the suite in stages, the most valuable first. The parts of one stage run beside each other.

    plan: "short", of about nine minutes, or "long", of about half an hour.
    tune: where the best launch configurations are written; without it nothing is tuned.
    """
    preset, model = "tiny" if quick else "coco", work / "model-random-weights"
    fast_preset, fast_model = "tiny" if quick else "coco-fast", work / "coco-fast-random-weights"
    scale = {"short": 1.0, "long": 3.0}[plan]
    bounded = ("--minutes", "{minutes}", "--out", "{out}")
    pytest = (sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=short")
    tested = () if quick or importlib.util.find_spec("pytest") is None else KERNELS
    tests = [
        Part(f"tests of {kernel}", (*pytest, *_test_files(kernel)), 110.0 * scale) for kernel in tested
    ]  # most of their time is the compiler's: they run beside each other and beside the writing of the weights
    weights = Part(
        "random weights", script("random_model", "--preset", preset, "--out", model), 110.0 * max(scale, 2.0)
    )
    fast_weights = Part(
        "random weights, coco-fast", script("random_model", "--preset", fast_preset, "--out", fast_model), 110.0 * scale
    )
    kernels = [
        Part(
            kernel,
            script("bench_kernels", "--quick", "--no-tests", "--only", kernel, *bounded),
            20.0 * scale,
            tuple(test.name for test in tests if test.name.endswith(f" {kernel}")),
        )
        for kernel in KERNELS
    ]
    own = ("--device", device, *bounded, "--sizes", "480x640", *(("--quick",) if quick else ()))
    common = ("--model", model, *own)
    on_cpu = device == "cpu"
    ours = ["torch float32"] if on_cpu else ["torch bfloat16", *OURS_ON_A_GPU]
    slow = [] if on_cpu else ["compile bfloat16", *COMPILED_PEERS]
    steps, batches = ((2,), (1,)) if quick else ((50, 4, 1), (1, 16))
    step = ("--parts", "step", "--batch", *batches)
    whole = ("--parts", "whole", "stages", "--batch", 1, "--steps", *steps)
    needs = (weights.name,)
    latency = [
        Part("UNet step", script("bench_latency", *common, *step, "--variants", *ours), 60.0 * scale, needs),
        Part("whole image", script("bench_latency", *common, *whole, "--variants", *ours), 60.0 * scale, needs),
    ]
    compiled = [
        Part("UNet step, compiled", script("bench_latency", *common, *step, "--variants", *slow), 120.0 * scale, needs),
        Part(
            "whole image, compiled", script("bench_latency", *common, *whole, "--variants", *slow), 120.0 * scale, needs
        ),
    ]  # processes of their own: what torch.compile takes costs the eager rows nothing
    profile = Part("profile", script("profile_loop", "--model", model, "--device", device, "--rows", 60), 60.0, needs)
    training = Part(
        "training step",
        script("bench_training", "--config", preset, "--no-zero", "--quick", *bounded),
        80.0 * scale,
    )
    runtime = Part(
        "ONNX Runtime",
        script("bench_latency", *common, *step, "--variants", "onnxruntime"),
        60.0 * scale,
        needs,
    )  # by itself: the export alone takes most of a minute
    rival = ("eomt",) if importlib.util.find_spec("transformers") else ()
    one_step = ("--parts", "whole", *rival, "--steps", 1, "--batch", *batches)
    fast = Part(
        "coco-fast beside EoMT-S",
        script("bench_latency", "--model", fast_model, *own, *one_step, "--variants", *ours),
        60.0 * scale,
        (fast_weights.name,),
    )
    alone = [*kernels, *latency, profile, *_counters(device, model), *(compiled if slow else [])]
    alone.append(fast)
    exports = all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnxscript"))
    alone += [runtime] if exports and plan == "long" else []
    alone += [training, *_engines(device, model, work, common)]
    if tune is not None:
        tuning = script("bench_kernels", "--tune", tune.absolute(), "--minutes", "{minutes}")
        alone.append(Part("tuning", tuning, 300.0, tuple(test.name for test in tests)))
    return [[*tests, weights, fast_weights], *([part] for part in alone)]


def _test_files(kernel: str) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests" / "kernels").glob(f"test_{kernel}*.py"))]


def _counters(device: str, model: Path) -> list[Part]:
    """One call of Nsight Compute, where it is installed: names of the kernels, issue rates, bandwidths."""
    if device == "cpu" or shutil.which("ncu") is None:
        return []
    kernels = "regex:attention_forward|panoptic_tile|apply_kernel|conv|gemm"
    counted = ("ncu", "--clock-control", "none", "--set", "basic", "-k", kernels, "-c", "40")
    loop = script("profile_loop", "--model", model, "--device", device, "--steps", 1)
    return [Part("ncu", (*counted, *loop), 80.0, ("random weights",))]


def _engines(device: str, model: Path, work: Path, common: Sequence[object]) -> list[Part]:
    """Building and timing TensorRT engines, where TensorRT can be imported."""
    if device == "cpu" or importlib.util.find_spec("tensorrt") is None:
        return []
    folder, build = work / "engines", "engines"
    command = (sys.executable, "export/to_trt.py", str(model), "--out", str(folder), "--max-batch", "16")
    timed = script("bench_latency", *common, "--parts", "step", "whole", "--batch", 1, 16, "--engine-dir", folder)
    return [
        Part(build, command, 600.0, ("random weights",)),
        Part("engines, latency", (*timed, "--variants", "none"), 180.0, (build,)),
    ]


def choose(plan: Sequence[Sequence[Part]], names: Sequence[str] | None) -> list[list[Part]]:
    """Returns the stages with the named parts and what they need; all of them without names.

    Raises:
        ArgumentError: no part has such a name.
    """
    if names is None:
        return [list(stage) for stage in plan]
    parts = {part.name: part for stage in plan for part in stage}
    if unknown := [name for name in names if name not in parts]:
        raise ArgumentError(f"--only {', '.join(unknown)}: no such part; there are {', '.join(parts)}")
    wanted = {name for each in names for name in (each, *parts[each].needs)}
    stages = [[part for part in stage if part.name in wanted] for stage in plan]
    return [stage for stage in stages if stage]
