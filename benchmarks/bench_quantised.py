"""Measures quantised graphs of a trained model: time, size, the PQ that they lose, and what TensorRT-RTX fuses in them.

python benchmarks/bench_quantised.py [MODEL_DIR] [--parts graphs quality engines] [--images N] [--seeds N]
    [--out FOLDER] [--data ROOT:TRAIN:TEST ...]

Without --data a model of scenes is scored on new ones. With it, scales come from pictures of the first set's TRAIN, and
the first --images of each TEST are scored.

`graphs` measures sizes and the time of a step, `quality` the PQ that is lost.

int8 for a CPU runs in ONNX Runtime. Graphs for TensorRT are emulated in PyTorch, which rounds where they do; so their
PQ is what rounding costs, and says nothing of an engine's own kernels. So it is with PyTorch's own fp8. `engines`
builds the denoiser's with TensorRT-RTX, which needs no GPU, and counts by the builder's log what becomes of the graph's
nodes.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

import onnx
import torch

from benchmarks.harness import RESULTS, Run, measure
from benchmarks.measuring.builder_log import build_logged, fusions
from benchmarks.measuring.options import parse_options
from ldmseg_fast.backends.graphs.manifest import Manifest
from ldmseg_fast.backends.graphs.modules import DenoiserGraph
from ldmseg_fast.backends.graphs.specs import sample_inputs
from ldmseg_fast.backends.model_info import ModelInfo, read_model_info
from ldmseg_fast.backends.onnx_backend import load_onnx_backend
from ldmseg_fast.backends.torch_backend import TorchBackend
from ldmseg_fast.backends.trt.api import load_api
from ldmseg_fast.checkpoints.hub_names import shown_name
from ldmseg_fast.checkpoints.shipped import resolve_model_dir
from ldmseg_fast.config import DataConfig
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.data.joined_sets import set_places
from ldmseg_fast.data.scenes import write_scenes
from ldmseg_fast.diffusion.sampler import image_noise
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.distributed.ending import run_command
from ldmseg_fast.evaluation import OBJECT, in_percent
from ldmseg_fast.export.calibration import calibrate
from ldmseg_fast.export.engine_build import shapes_of
from ldmseg_fast.export.model_export import ExportSettings, resolve_options, write_graphs
from ldmseg_fast.export.parity import calibration_pictures
from ldmseg_fast.export.parity_reference import Quantised, ReferenceBackend
from ldmseg_fast.metrics.pq import PanopticQuality

PLAIN, CPU_INT8, TORCH_FP8 = "torch float32", "int8, onnxruntime", "fp8, torch"
EXPORTS = {
    "fp32": ExportSettings("fp32"),
    "fp16": ExportSettings("fp16"),
    CPU_INT8: ExportSettings("int8"),
    "int8, tensorrt": ExportSettings("int8", runtime="tensorrt"),
    "fp8, tensorrt": ExportSettings("fp8"),
}
PARTS = ("graphs", "quality", "engines")
BUILT = ("fp16", "int8, tensorrt", "fp8, tensorrt")  # by TensorRT-RTX
SIZES = {CPU_INT8: ("fp32", 0.30), "int8, tensorrt": ("fp16", 0.55), "fp8, tensorrt": ("fp16", 0.55)}
LOSSES = {CPU_INT8: 0.3, "int8, tensorrt": 0.5, "fp8, tensorrt": 0.3, TORCH_FP8: 0.3}  # points of PQ
SPEED_WITH_VNNI, SPEED = 4.0, 2.6
BATCH = 25
TARGET = "sm89"  # of the engines
SEED = 1  # of the scenes; calibration sees those of seed 0


def step_times(run: Run, info: ModelInfo, graphs: Path, rounds: int, named: dict[str, str]) -> None:
    """Times a denoising step at batch 1 on one thread beside eager PyTorch in float32."""
    reference = TorchBackend(info, "cpu", torch.float32)
    module = DenoiserGraph(reference.unet, info.scheduler.prediction_type)
    backends = {name: load_onnx_backend(info, graphs / name, "cpu", threads=1) for name in ("fp32", CPU_INT8)}
    inputs = sample_inputs(backends["fp32"].specs["denoiser"], info, {"batch": 1})
    steps: dict[str, Any] = {"torch eager": torch.inference_mode()(partial(module, **inputs))}
    steps |= {name: partial(backend.run_graph, "denoiser", inputs) for name, backend in backends.items()}
    found = torch.cpu.get_capabilities()
    vnni = bool(found.get("avx512_vnni") or found.get("avx_vnni"))
    case = named | {"batch": 1, "threads": 1, "size": f"{info.image_size}x{info.image_size}", "vnni": vnni}
    target = SPEED_WITH_VNNI if vnni else SPEED
    run.add("one step", measure(steps, rounds=rounds), baseline="torch eager", case=case, target=target)


def sizes(run: Run, manifests: dict[str, Manifest], graphs: Path, named: dict[str, str]) -> None:
    """Compares the denoiser's files with those of the floats that they stand for."""

    def size(name: str) -> int:
        graph = manifests[name].graphs["denoiser"]
        return sum((graphs / name / file).stat().st_size for file in (graph.file, graph.weights) if file)

    for name, (floats, target) in SIZES.items():
        ratio = size(name) / size(floats)
        run.add_value("size of the denoiser", ratio, f"of {floats}", case=named, variant=name, target=target)


def losses(
    run: Run, info: ModelInfo, manifests: dict[str, Manifest], graphs: Path, sets: dict[str, CocoPanoptic], seeds: int,
    named: dict[str, str],
) -> None:  # fmt: skip
    """Scores each export on held-out pictures, at the model's own number of steps, beside PyTorch in float32."""
    plain: dict[str, float] = {}
    for name, limit in {PLAIN: None, **LOSSES}.items():
        if name == PLAIN:
            backend: Any = TorchBackend(info, "cpu", torch.float32)
        elif name == TORCH_FP8:
            backend = TorchBackend(info, "cpu", precision="fp8-emulated")
        else:
            backend = backend_of(info, manifests[name], graphs / name)
        for data, dataset in sets.items():
            about = named | ({"data": data} if named else {})
            case = about | {"images": len(dataset), "seeds": seeds, "steps": info.num_inference_steps}
            found = mean_pq(backend, dataset, seeds)
            run.add_value("PQ", found, "%", case=case, variant=name)
            plain.setdefault(data, found)
            if limit is not None:
                run.add_value("PQ lost", plain[data] - found, "points", case=case, variant=name, target=limit)
        backend.close()


def engines(run: Run, info: ModelInfo, manifests: dict[str, Manifest], graphs: Path) -> None:
    """Builds the denoiser of the exports for TensorRT and counts its layers by the builder's log."""
    api = load_api("rtx")
    case = {"model": info.folder.name, "target": TARGET, "builder": api.name}
    for name, manifest in manifests.items():
        graph = manifest.graphs["denoiser"]
        shapes = shapes_of(graph.spec, {"batch": (1, 1, 8)})
        layers, size = build_logged(api, graphs / name / graph.file, shapes, TARGET)
        nodes = onnx.load(str(graphs / name / graph.file), load_external_data=False).graph.node
        found = fusions(layers, {node.name: node.op_type for node in nodes})
        for what, (value, unit) in (found | {"engine": (size / 2**20, "MiB")}).items():
            run.add_value(what, value, unit, case=case, variant=name)


def held_out(args: argparse.Namespace, info: ModelInfo, scratch: Path) -> dict[str, CocoPanoptic]:
    """Returns the sets to score on, by their names: `--data`, or generated scenes."""
    places = {"scenes": (str(scratch / "scenes"), "val2017")}
    if args.data:
        config = DataConfig(root=",".join(args.data))
        places = {f"{place.name} {place.val_split}": (place.root, place.val_split) for place in set_places(config)}
    else:
        write_scenes(scratch / "scenes", 8, info.image_size, SEED, workers=1, val_images=args.images, version=1)
    options: dict[str, Any] = {"num_slots": info.mask_vae.num_slots, "picture_size": info.picture_size}
    return {
        name: CocoPanoptic(root, split, info.image_size, limit=args.images, **options)
        for name, (root, split) in places.items()
    }


def backend_of(info: ModelInfo, manifest: Manifest, folder: Path) -> Any:
    """Returns ONNX Runtime over graphs for a CPU; of others the emulation in PyTorch."""
    if manifest.is_for_cpu:
        return load_onnx_backend(info, folder, "cpu", threads=1)
    pictures = calibration_pictures(info, manifest.calibration, manifest.precision)
    scales = calibrate(info, manifest.precision, torch.float16, pictures)
    return ReferenceBackend(info, manifest.options, Quantised(manifest.precision, scales, flows=True))


@torch.inference_mode()
def mean_pq(backend: Any, dataset: CocoPanoptic, seeds: int) -> float:
    """Returns the mean class-agnostic PQ in percent over noise seeds."""
    info, values = backend.info, []
    batches = [list(range(start, min(start + BATCH, len(dataset)))) for start in range(0, len(dataset), BATCH)]
    encoded = [
        backend.encode_image(torch.stack([torch.as_tensor(dataset[index]["image"]) for index in indices]))
        for indices in batches
    ]
    for seed in range(seeds):
        stat = PanopticQuality(OBJECT, class_agnostic=True)
        for indices, image_latents in zip(batches, encoded):
            noise = image_noise(seed, indices, info.latent_shape, info.scheduler.init_noise_sigma)
            latents = backend.sample(noise, image_latents, Scheduler(info.scheduler), info.num_inference_steps)
            for index, latent in zip(indices, latents):
                ids, segments = dataset.ground_truth(index)
                (result,) = backend.decode_mask(latent[None].float(), ids.shape)
                stat.add(ids, segments, result.segmentation, result.segments_info, image_id=index)
        values.append(in_percent(stat.compute())["pq"])
    return sum(values) / len(values)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench_quantised.py", description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", nargs="?", default="tiny", help="a model of scenes; default tiny")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--images", type=int, default=500, help="held-out pictures of a set")
    parser.add_argument("--seeds", type=int, default=3, help="of the noise")
    parser.add_argument("--data", nargs="+", metavar="ROOT:TRAIN:TEST", help="COCO-panoptic folders; default scenes")
    parser.add_argument("--rounds", type=int, default=60, help="of the timing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    args = parse_options(parser, argv)
    torch.set_num_threads(1)
    run = Run("quantised", folder=args.out)
    info = read_model_info(args.model_dir)
    named = {"model": shown_name(resolve_model_dir(args.model_dir))} if args.data else {}
    manifests = {}
    with tempfile.TemporaryDirectory() as scratch:
        sets = held_out(args, info, Path(scratch)) if "quality" in args.parts else {}
        for name, settings in EXPORTS.items():
            if set(args.parts) == {"engines"} and name not in BUILT:
                continue
            if args.data:
                place = set_places(DataConfig(root=args.data[0]))[0]
                settings = replace(settings, data=place.root, split=place.train_split)
            folder = Path(scratch) / name
            folder.mkdir()
            manifests[name] = write_graphs(info, folder, resolve_options(info, settings), settings)
        if "graphs" in args.parts:
            sizes(run, manifests, Path(scratch), named)
            step_times(run, info, Path(scratch), args.rounds, named)
        if "quality" in args.parts:
            losses(run, info, manifests, Path(scratch), sets, args.seeds, named)
        if "engines" in args.parts and importlib.util.find_spec("tensorrt_rtx") is None:
            print("engines: not built, TensorRT-RTX is not installed; pip install 'ldmseg_fast[rtx]'")
        elif "engines" in args.parts:
            engines(run, info, {name: manifests[name] for name in BUILT if name in manifests}, Path(scratch))
    run.save(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
