"""Export and engine builds: time and peak memory at full size, and a step in ONNX Runtime beside eager PyTorch.

python benchmarks/bench_export.py [--quick] [--out FOLDER]

Full size is Stable Diffusion's UNet without cross-attention, random weights saved in float32, exported in half. The
export and the build each run in a process of their own, whose peak resident memory is what is reported.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.harness import RESULTS, ROOT, Run, measure
from ldmseg_fast.backends.base import read_model_info
from ldmseg_fast.backends.graph_backend import GraphBackend
from ldmseg_fast.backends.graphs import DenoiserGraph
from ldmseg_fast.backends.onnx_backend import load_onnx_backend
from ldmseg_fast.backends.specs import sample_inputs
from ldmseg_fast.backends.torch_backend import TorchBackend
from ldmseg_fast.checkpoint import postprocess_settings, save_component, save_index
from ldmseg_fast.config import COCO, TINY, Config
from ldmseg_fast.export.model_export import ExportSettings, export_model
from ldmseg_fast.models.image_vae import build_image_encoder
from ldmseg_fast.models.mask_vae import MaskVAE
from ldmseg_fast.models.unet import UNet

MAX_MINUTES, MAX_GIB = 4.0, 4.0
EXPORT = """
import sys
from pathlib import Path
from typing import Any
import torch
from ldmseg_fast.backends.base import read_model_info
from ldmseg_fast.backends.graphs import build_graph
from ldmseg_fast.backends.specs import GraphOptions, graph_specs
from ldmseg_fast.export.graph_export import export_graph
from ldmseg_fast.export.model_export import load_network
info = read_model_info(sys.argv[1])
spec = graph_specs(info, GraphOptions("float16", image_size=info.image_size))["denoiser"]
module = build_graph(spec, info, {"unet": load_network(info, "unet", torch.float16)})
export_graph(spec, module, info, Path(sys.argv[2]), 21, {})
"""
# the kernel's own high-water mark: what getrusage tells of a child includes the parent's memory at the fork
PEAK = """
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""
BUILD = """
import sys
from pathlib import Path
from typing import Any
from ldmseg_fast.backends.base import read_model_info
from ldmseg_fast.backends.specs import GraphOptions, graph_specs
from ldmseg_fast.backends.trt_api import BuildSettings, load_api
from ldmseg_fast.export.engine_build import shapes_of
info = read_model_info(sys.argv[1])
spec = graph_specs(info, GraphOptions("float16", image_size=info.image_size))["denoiser"]
shapes = shapes_of(spec, {"batch": (1, 1, 8)})
built = load_api("rtx").build(Path(sys.argv[2]) / "denoiser.onnx", [shapes], BuildSettings(("sm89",)))
(Path(sys.argv[2]) / "denoiser.engine").write_bytes(built.engine)
"""


def save_random_model(folder: Path, config: Config) -> Path:
    """A model folder of a preset's size with random weights."""
    torch.manual_seed(0)
    encoder = build_image_encoder(config.image_encoder)
    vae_config: Any = getattr(encoder, "vae_config", None)
    extra = {"_vae_config": dict(vae_config)} if vae_config else None
    save_component(folder, "unet", config.unet, UNet(config.unet).state_dict())
    save_component(folder, "mask_vae", config.mask_vae, MaskVAE(config.mask_vae).state_dict())
    save_component(folder, "image_vae", config.image_encoder, encoder.state_dict(), extra)
    save_component(folder, "scheduler", config.scheduler, None)
    settings = {"image_size": config.data.image_size, "num_inference_steps": config.num_inference_steps}
    settings |= {"self_condition": True} | postprocess_settings(config.postprocess)
    save_index(folder, ["unet", "mask_vae", "image_vae", "scheduler"], settings)
    return folder


def run_apart(script: str, *arguments: Path) -> tuple[float, float]:
    """Minutes and peak resident GiB of a script in a process of its own. Raises CalledProcessError where it fails."""
    start = time.perf_counter()
    command = [sys.executable, "-c", script + PEAK, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return (time.perf_counter() - start) / 60, int(output.split()[-2]) / 2**20


def full_size(run: Run, folder: Path) -> None:
    """Export, and where TensorRT-RTX is installed its build, of the full-size UNet in half."""
    model = save_random_model(folder / "model", COCO)
    out = folder / "graphs"
    out.mkdir()
    minutes, gib = run_apart(EXPORT, model, out)
    case = {"precision": "fp16", "size": "512x512"}
    run.add_value("full-size UNet to ONNX", minutes, "minutes", case=case, target=MAX_MINUTES)
    run.add_value("full-size UNet to ONNX, peak memory", gib, "GiB", case=case, target=MAX_GIB)
    run.check("the export keeps to its time", minutes <= MAX_MINUTES)
    run.check("the export keeps to its memory", gib <= MAX_GIB)
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        minutes, gib = run_apart(BUILD, model, out)
        case["target"] = "sm89"
        run.add_value("full-size UNet, TensorRT-RTX build", minutes, "minutes", case=case)
        run.add_value("full-size UNet, TensorRT-RTX build, peak memory", gib, "GiB", case=case)
        size = (out / "denoiser.engine").stat().st_size / 2**30
        run.add_value("full-size UNet, engine", size, "GiB", case=case)


def one_step(run: Run, folder: Path) -> None:
    """A denoising step of the tiny model on the CPU: ONNX Runtime beside eager PyTorch."""
    model = save_random_model(folder / "tiny", TINY)
    report = export_model(model, folder / "tiny-graphs", ExportSettings(parity_images=4))
    run.check("the graphs equal PyTorch", report is not None and report.ok)
    info = read_model_info(model)
    reference = TorchBackend(info, "cpu", torch.float32)
    module = DenoiserGraph(reference.unet, info.scheduler.prediction_type)
    for threads, batch in itertools.product(sorted({1, torch.get_num_threads()}), (1, 8)):
        torch.set_num_threads(threads)
        ours = load_onnx_backend(info, folder / "tiny-graphs", "cpu", threads=threads)
        inputs = sample_inputs(ours.specs["denoiser"], info, {"batch": batch})

        def eager(inputs: dict = inputs) -> None:
            with torch.inference_mode():
                module(*inputs.values())

        def graph(inputs: dict = inputs, ours: GraphBackend = ours) -> None:
            ours.run_graph("denoiser", inputs)

        case = {"batch": batch, "threads": threads}
        timings = measure({"onnxruntime": graph, "torch eager": eager}, device="cpu")
        run.add("one step, tiny model", timings, baseline="torch eager", case=case, target=1.0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench_export.py", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the tiny model only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    args = parser.parse_args(argv)
    run = Run("export", quick=args.quick)
    with tempfile.TemporaryDirectory() as scratch:
        one_step(run, Path(scratch))
        if not args.quick:
            full_size(run, Path(scratch))
    run.save(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
