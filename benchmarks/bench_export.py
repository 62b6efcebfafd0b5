"""Measures export and engine builds at full size, and times steps in ONNX Runtime beside eager PyTorch.

python benchmarks/bench_export.py [--quick] [--parts tiny unet to_onnx to_trt] [--out FOLDER]

Full size is Stable Diffusion's UNet without cross-attention, random weights saved in float32, exported in half. Then
`to_onnx.py` runs in float32 with its parity report, and `to_trt.py --flavour rtx`, as people run them. Each runs in a
process of its own, whose peak memory is reported, with and without pages of mapped files.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

import torch

from benchmarks.harness import RESULTS, ROOT, Run, measure
from benchmarks.measuring.options import parse_options
from benchmarks.random_model import save_random_model
from ldmseg_fast.backends.graphs.modules import DenoiserGraph
from ldmseg_fast.backends.graphs.specs import sample_inputs
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.backends.onnx_backend import load_onnx_backend
from ldmseg_fast.backends.torch_backend import TorchBackend
from ldmseg_fast.config.presets import COCO, TINY
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.distributed.ending import run_command
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.export.model_export import ExportSettings, export_model

PARTS = ("tiny", "unet", "to_onnx", "to_trt")
MAX_MINUTES, MAX_GIB = 4.0, 4.0
MAX_COMMAND_MINUTES, MAX_COMMAND_GIB = 20.0, 6.0  # of whole commands, on two cores
STEPS = 4
EXPORT = """
import sys
from pathlib import Path
from typing import Any
import torch
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.backends.graphs.modules import build_graph
from ldmseg_fast.backends.graphs.specs import GraphOptions, graph_specs
from ldmseg_fast.export.graph_export import export_graph
from ldmseg_fast.export.networks import load_network
info = read_model_info(sys.argv[1])
spec = graph_specs(info, GraphOptions("float16", image_size=info.image_size))["denoiser"]
module = build_graph(spec, info, {"unet": load_network(info, "unet", torch.float16)})
export_graph(spec, module, info, Path(sys.argv[2]), 21, {})
"""
# the kernel's own high-water mark: what getrusage tells of a child includes the parent's memory at the fork
PEAK = """
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""
SAMPLING_SECONDS = 0.05
BUILD = """
import sys
from pathlib import Path
from typing import Any
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.backends.graphs.specs import GraphOptions, graph_specs
from ldmseg_fast.backends.trt.api import load_api
from ldmseg_fast.backends.trt.settings import BuildSettings
from ldmseg_fast.export.engine_build import shapes_of
info = read_model_info(sys.argv[1])
spec = graph_specs(info, GraphOptions("float16", image_size=info.image_size))["denoiser"]
shapes = shapes_of(spec, {"batch": (1, 1, 8)})
built = load_api("rtx").build(Path(sys.argv[2]) / "denoiser.onnx", [shapes], BuildSettings(("sm89",)))
(Path(sys.argv[2]) / "denoiser.engine").write_bytes(built.engine)
"""
COMMAND = """
import importlib
import sys
from pathlib import Path
code = importlib.import_module(f"ldmseg_fast.export.{sys.argv[1]}").main(sys.argv[2:])
assert code == 0, f"exit code {code}"
"""


@dataclass(frozen=True)
class Cost:
    """Holds what a script took.

    Attributes:
        minutes: from its start to its end.
        resident: its peak of resident memory in GiB, pages of mapped files included, which the system can take back.
        own: the peak of the rest, sampled.
    """

    minutes: float
    resident: float
    own: float


def run_apart(script: str, *arguments: str | Path) -> Cost:
    """Runs a script in a process of its own.

    Raises:
        subprocess.CalledProcessError: the script failed.
    """
    start, own = time.perf_counter(), 0
    command = [sys.executable, "-c", script + PEAK, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, text=True) as process:
            while process.poll() is None:
                own = max(own, _own_kib(process.pid))
                time.sleep(SAMPLING_SECONDS)
        minutes = (time.perf_counter() - start) / 60
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, text)
    return Cost(minutes, int(text.split()[-2]) / 2**20, own / 2**20)


def _own_kib(process: int) -> int:
    with contextlib.suppress(OSError):  # it has ended
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1])
    return 0


def _add_cost(run: Run, what: str, cost: Cost, case: dict[str, str], minutes: float | None, gib: float | None) -> None:
    run.add_value(what, cost.minutes, "minutes", case=case, target=minutes)
    run.add_value(f"{what}, peak memory of its own", cost.own, "GiB", case=case, target=gib)
    run.add_value(f"{what}, peak memory with mapped files", cost.resident, "GiB", case=case)


def full_size(run: Run, model: Path, out: Path) -> None:
    """Measures the export of the full-size UNet in half, and its build where TensorRT-RTX is installed."""
    out.mkdir()
    case = {"precision": "fp16", "size": "512x512"}
    _add_cost(run, "full-size UNet to ONNX", run_apart(EXPORT, model, out), case, MAX_MINUTES, MAX_GIB)
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        case = case | {"target": "sm89"}
        _add_cost(run, "full-size UNet, TensorRT-RTX build", run_apart(BUILD, model, out), case, None, None)
        size = (out / "denoiser.engine").stat().st_size / 2**30
        run.add_value("full-size UNet, engine", size, "GiB", case=case)
    shutil.rmtree(out)


def whole_commands(run: Run, model: Path, out: Path, size: str, names: Sequence[str]) -> None:
    """Measures `to_onnx.py` in float32, parity report included, and `to_trt.py` for TensorRT-RTX where it is installed.

    Args:
        run: gets the rows.
        model: MODEL_DIR.
        out: gets both commands' folders.
        size: of the model, for the rows.
        names: of the commands.
    """
    commands = {"to_onnx": ["--precision", "fp32"]}
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        commands["to_trt"] = ["--flavour", "rtx", "--target", "sm89"]
    for name, options in ((name, commands[name]) for name in names if name in commands):
        case = {"model": size, "options": " ".join(options)}
        try:
            cost = run_apart(COMMAND, name, model, "--out", out / name, *options)
        except subprocess.CalledProcessError as error:
            print(error.stdout)
            run.add_red(f"{name}.py", "ours", f"exit code {error.returncode}", case=case)
            continue
        _add_cost(run, f"{name}.py", cost, case, MAX_COMMAND_MINUTES, MAX_COMMAND_GIB)


def tiny_on_the_cpu(run: Run, folder: Path, rounds: int) -> None:
    """Times a denoising step of the tiny model, and four, in ONNX Runtime beside eager PyTorch."""
    model = save_random_model(folder / "tiny", TINY)
    settings = ExportSettings(parity_images=4, sampler_steps=str(STEPS))
    start = time.perf_counter()
    report = export_model(model, folder / "tiny-graphs", settings)
    run.add_value("tiny model to ONNX, parity report included", time.perf_counter() - start, "s")
    run.check("the graphs equal PyTorch", report is not None and report.ok)
    info = read_model_info(model)
    reference, scheduler = TorchBackend(info, "cpu", torch.float32), Scheduler(info.scheduler)
    module = DenoiserGraph(reference.unet, info.scheduler.prediction_type)
    threads_before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0))  # more threads than cores wait for each other
    for threads, batch in itertools.product([number for number in (1, 2) if number <= cores], (1, 8)):
        torch.set_num_threads(threads)
        ours = load_onnx_backend(info, folder / "tiny-graphs", "cpu", threads=threads)
        stepwise = load_onnx_backend(info, folder / "tiny-graphs", "cpu", threads=threads)
        del stepwise.specs[f"sampler_{STEPS}"]  # so that it loops over the denoiser's graph
        inputs = sample_inputs(ours.specs["denoiser"], info, {"batch": batch})
        noise, image_latents = inputs["noisy_latents"], inputs["image_latents"]
        case = {"batch": batch, "threads": threads}
        steps = {
            "onnxruntime": partial(ours.run_graph, "denoiser", inputs),
            "torch eager": torch.inference_mode()(partial(module, **inputs)),
        }
        timings = measure(steps, device="cpu", rounds=rounds)
        run.add("one step, tiny model", timings, baseline="torch eager", case=case, target=1.0)
        loops = {
            f"onnxruntime, {name}": partial(backend.sample, noise, image_latents, scheduler, STEPS)
            for name, backend in (("one graph", ours), ("step by step", stepwise))
        }
        loops["torch eager"] = partial(reference.sample, noise, image_latents, scheduler, STEPS)
        timings = measure(loops, device="cpu", rounds=rounds)
        run.add(f"{STEPS} steps, tiny model", timings, baseline="torch eager", case=case, target=1.0)
    torch.set_num_threads(threads_before)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench_export.py", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the tiny model only")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    args = parse_options(parser, argv)
    if args.quick and "tiny" not in args.parts:
        raise ArgumentError("--quick measures the part tiny alone, which --parts leaves out: leave one out")
    run = Run("export", quick=args.quick, folder=args.out)
    with tempfile.TemporaryDirectory() as scratch:
        if args.quick or "tiny" in args.parts:
            tiny_on_the_cpu(run, Path(scratch), 6 if args.quick else 20)
        if not args.quick and args.parts != ["tiny"]:
            model = save_random_model(Path(scratch) / "model", COCO)
            if "unet" in args.parts:
                full_size(run, model, Path(scratch) / "graphs")
            whole_commands(run, model, Path(scratch) / "commands", "coco, random weights", args.parts)
    run.save(args.out)
    return int(bool(run.red))


if __name__ == "__main__":
    sys.exit(run_command(main))
