"""Times one picture, whole and stage by stage, beside the plain loop with diffusers' parts.

python benchmarks/bench_latency.py [--preset tiny|coco|coco-fast | --model MODEL_DIR] [--quick]
    [--parts step stages whole eomt openvino first] [--steps 1 4 10 20 50] [--batch 1 4 16 32] [--sizes 480x640]
    [--threads N] [--minutes M] [--engine-dir DIR ...]

Every backend's latents and maps are compared with the baseline's first. One that disagrees, or cannot run here, is a
red row with its reason, and is not timed. `whole image` is from the array to map and segments, `file to file` adds
reading the picture and writing PNG and JSON. Freed memory stays with the process, as `ldmseg` has it. Engines of
several precisions stand in one table, each named by its runtime and precision; a batch that they take in parts, or
filled up, is warned of and says so in its row. `eomt` times EoMT-S with random weights, forward alone and from array to
map. Several pictures at once take 10 steps, or the fewest of `--steps` where 10 is none of them. `openvino` times one
step of our graphs, in float32 and int8, in OpenVINO and in ONNX Runtime beside eager PyTorch. `first` times the first
picture of a process on a CPU, of the first of `--sizes`, from loading the model on, compiled with and without packages
that an earlier process kept. Exit code 1 where a row is red.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.harness import RESULTS, BenchmarkError, Run, Timing, measure, reason_of
from benchmarks.measuring.cost_model import unet_operations
from benchmarks.measuring.first_picture import BASELINE, KEPT, first_pictures
from benchmarks.measuring.options import parse_options, sides
from benchmarks.peers.candidates import OurPipeline, engine_candidates, our_candidates, plain_candidates
from benchmarks.peers.eomt import Eomt
from benchmarks.peers.openvino_step import openvino_step
from benchmarks.random_model import find_model
from ldmseg_fast.allocator import keep_freed_memory
from ldmseg_fast.backends.graphs.modules import DenoiserGraph
from ldmseg_fast.backends.graphs.specs import sample_inputs
from ldmseg_fast.backends.model_info import ModelInfo, read_model_info
from ldmseg_fast.backends.onnx_backend import load_onnx_backend
from ldmseg_fast.backends.torch_backend import TorchBackend
from ldmseg_fast.checkpoints.model_folder import load_component_config
from ldmseg_fast.data.scenes import generate_scene
from ldmseg_fast.diffusion.sampler import image_noise
from ldmseg_fast.distributed.ending import run_command
from ldmseg_fast.export.model_export import ExportSettings, resolve_options, write_graphs
from ldmseg_fast.kernels.roofline import find_gpu

PARTS = ("step", "stages", "whole")  # by default
MORE_PARTS = ("eomt", "openvino", "first")  # rivals, and what compiles for minutes
TARGETS = {"cpu": 2.0, "cuda": 5.0}  # whole image, times the plain loop
LOOP = 10  # steps of the loop that `step` is a share of
SECONDS_TO_COMPILE = 60  # with less time left nothing is compiled
# largest difference of latents from the baseline's, relative to their norm, and least share of equal pixels
FLOAT32, HALF, EIGHT_BITS = (1e-3, 0.999), (0.1, 0.9), (0.5, 0.5)  # on either side; random weights decide little


@dataclass
class Bench:
    """Holds what every part needs: the run, the model, the candidates that are still alive, and the clock."""

    run: Run
    info: ModelInfo
    model: str
    device: str
    rounds: int
    deadline: float
    makers: dict[str, Any]
    baseline: str
    pipelines: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, dict[str, float]] = field(default_factory=dict)

    def case(self, **more: Any) -> dict[str, Any]:
        return {"model": self.model, "threads": torch.get_num_threads(), **more}

    def noise(self, batch: int) -> Tensor:
        return image_noise(0, range(batch), self.info.latent_shape)

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def load(self, pictures: list[np.ndarray]) -> None:
        """Makes each candidate and compares it with the baseline; one that fails either becomes a red row."""
        noise = self.noise(1)
        steps = min(LOOP, self.info.num_inference_steps)  # beyond its own a model of few steps falls into noise
        reference: tuple[Tensor, np.ndarray] | None = None
        for name, make in self.makers.items():
            if reference is not None and self.seconds_left() < SECONDS_TO_COMPILE * ("compile" in name):
                print(f"{name}: not measured (time budget)")
                continue
            try:
                pipeline = make()
                latents = (
                    pipeline.sample(noise, pipeline.encode(pipeline.preprocess(pictures[:1])), steps).float().cpu()
                )
                maps = pipeline.whole(pictures[:1], noise, steps)[0].segmentation
            except Exception as error:  # a backend's refusal, whatever its type, is a row and not the end
                if reference is None:
                    raise
                self.run.add_red("agreement", name, reason_of(error), case=self.case())
                continue
            if reference is None:
                reference = latents, maps
            error_of_latents = float((latents - reference[0]).norm() / reference[0].norm())
            agreement = float((maps == reference[1]).mean())
            most, least = self._tolerances(name)
            close = bool(latents.isfinite().all()) and error_of_latents <= most and agreement >= least
            detail = f"latents {error_of_latents:.2g} apart, {agreement:.2%} of the pixels alike"
            print(f"{name}: {detail}")
            if not close:
                self.run.add_red("agreement", name, f"differs from {self.baseline}: {detail}", case=self.case())
                continue
            self.run.check(f"{name} equals {self.baseline}: {detail}", True)
            self.pipelines[name] = pipeline
            self.quality[name] = {"latent_error": error_of_latents, "pixels_alike": agreement}

    def _tolerances(self, name: str) -> tuple[float, float]:
        if any(word in name for word in ("fp8", "float8", "int8")):
            return EIGHT_BITS
        half = any(word in name for word in ("float16", "fp16", "bf16"))
        return FLOAT32 if self.device == "cpu" and not half else HALF

    def compare(
        self,
        row: str,
        call: Callable[[Any, str], Any],
        names: list[str],
        case: dict[str, Any],
        **options: Any,
    ) -> None:
        """Times `call(pipeline, its name)`: one row per pipeline in `names`, interleaved with the baseline."""
        if self.seconds_left() < 0:
            print(f"{row} {case}: not measured (time budget)")
            return
        functions, of_label = {}, {}
        for name in names:
            if name not in self.pipelines:
                continue
            function = partial(call, self.pipelines[name], name)
            label = self._label(name, case["batch"])
            of_label[label] = name
            if label != name:
                print(f"warning: {row}: {label} ({name} takes no batch of {case['batch']})", file=sys.stderr)
            try:
                function()
            except Exception as error:  # out of memory at this batch, say: the others are timed all the same
                if name == self.baseline:
                    raise
                self.run.add_red(row, name, reason_of(error), case=case)
                continue
            functions[label] = function
        timings: dict[str, Timing] = measure(
            functions,
            device=self.device,
            rounds=self.rounds,
            warmup=1,
            max_seconds=max(2.0, min(60.0, self.seconds_left() / 4)),
            flush_l2=False,
        )
        rows = self.run.add(row, timings, baseline=self.baseline, case=case, **options)
        for each in rows:
            each["quality"] = self.quality[of_label[each["variant"]]]

    def _label(self, name: str, batch: int) -> str:
        """Returns the name of a row: the candidate's, and how it takes the batch where it does not as a whole."""
        pipeline = self.pipelines[name]
        return name + pipeline.label(batch) if isinstance(pipeline, OurPipeline) else name


def bench_step(bench: Bench, batch: int, names: list[str]) -> None:
    """Times one denoising step: a tenth of a loop of ten."""
    flops = unet_operations(load_component_config(bench.info.folder, "unet")[0], bench.info.latent_shape[1])
    gpu = find_gpu(bench.run.environment["gpu"]["name"])
    shape = (batch, bench.info.image_latent_channels, *bench.info.latent_shape[1:])
    latents, noise = torch.randn(shape, generator=torch.Generator().manual_seed(1)), bench.noise(batch)
    image_latents = {name: latents.to(each.device, each.dtype) for name, each in bench.pipelines.items()}

    def run_loop(pipeline: Any, name: str) -> Tensor:
        return pipeline.sample(noise, image_latents[name], LOOP)

    bench.compare(
        "one step", run_loop, names, bench.case(batch=batch), items=LOOP * batch, flops=flops,
        floor_ms=1e3 * flops / gpu.half_operations if gpu else None,
    )  # fmt: skip


def bench_stages(bench: Bench, picture: np.ndarray, names: list[str], scratch: Path) -> None:
    """Times each stage by itself at batch 1, and the whole way between files."""
    size = picture.shape[:2]
    file = scratch / "picture.jpg"
    Image.fromarray(picture).save(file, quality=95)
    noise = bench.noise(1)
    inputs = {name: pipeline.preprocess([picture]) for name, pipeline in bench.pipelines.items()}
    encoded = {name: pipeline.encode(inputs[name]) for name, pipeline in bench.pipelines.items()}
    latents = {name: p.sample(noise, encoded[name], LOOP) for name, p in bench.pipelines.items()}
    results = {name: pipeline.finish(latents[name], [size])[0] for name, pipeline in bench.pipelines.items()}
    stages: dict[str, Callable[[Any, str], Any]] = {
        "decode file": lambda p, name: p.decode_file(file),
        "pre-process": lambda p, name: p.preprocess([picture]),
        "image encoder": lambda p, name: p.encode(inputs[name]),
        f"{LOOP} steps": lambda p, name: p.sample(noise, encoded[name], LOOP),
        "decoder and head": lambda p, name: p.finish(latents[name], [size]),
        "write files": lambda p, name: p.write(results[name], scratch / "map.png"),
        "file to file": lambda p, name: p.write(p.whole([p.decode_file(file)], noise, LOOP)[0], scratch / "map.png"),
    }
    case = bench.case(batch=1, size=f"{size[0]}x{size[1]}", steps=LOOP)
    for stage, call in stages.items():
        bench.compare(stage, call, names, case)


def bench_whole(bench: Bench, picture: np.ndarray, batch: int, steps: int, names: list[str]) -> None:
    height, width = picture.shape[:2]
    pictures, noise = [picture] * batch, bench.noise(batch)
    case = bench.case(batch=batch, size=f"{height}x{width}", steps=steps)
    target = TARGETS[bench.device] if (batch, steps) == (1, LOOP) or bench.device == "cuda" else None
    bench.compare("whole image", lambda p, _: p.whole(pictures, noise, steps), names, case, items=batch, target=target)


def bench_eomt(bench: Bench, picture: np.ndarray, batch: int, quick: bool) -> None:
    """Times the rival by itself: eager, and compiled on a GPU; one that cannot run here is a red row."""
    height, width = picture.shape[:2]
    case = {"batch": batch, "size": f"{height}x{width}", "threads": torch.get_num_threads()}
    dtype = torch.bfloat16 if bench.device == "cuda" else torch.float32
    options = {"image_size": 64, "hidden_size": 48, "num_hidden_layers": 4, "num_blocks": 1} if quick else {}
    for name, compiled in (("EoMT-S", False), ("EoMT-S, compile", True)):
        if compiled and (quick or bench.device == "cpu" or bench.seconds_left() < SECONDS_TO_COMPILE):
            print(f"{name}: not measured ({'quick' if quick else bench.device})")
            continue
        try:
            rival = Eomt(bench.device, dtype, compiled, **options)
            inputs = rival.preprocess([picture] * batch)
            for row, call in (
                ("EoMT forward", partial(rival.forward, inputs)),
                ("EoMT whole image", partial(rival.whole, [picture] * batch)),
            ):
                call()
                timing = measure({name: call}, device=bench.device, rounds=bench.rounds, warmup=1, flush_l2=False)
                bench.run.add(row, timing, baseline=None, case=case, items=batch)
        except Exception as error:  # no transformers, or one that does not know it: a row and not the end
            bench.run.add_red("EoMT forward", name, reason_of(error), case=case)


def bench_openvino(bench: Bench, batch: int, scratch: Path) -> None:
    """Times one step of our graphs on a CPU; a runtime that is not there, or computes something else, is a red row."""
    info, threads, name = bench.info, torch.get_num_threads(), "step of graphs in OpenVINO"
    case = bench.case(batch=batch)
    reference = TorchBackend(info, "cpu", torch.float32)
    module = DenoiserGraph(reference.unet, info.scheduler.prediction_type)
    steps: dict[str, Callable[[], Any]] = {}
    for precision in ("fp32", "int8"):
        folder, settings = scratch / f"openvino-{precision}-{batch}", ExportSettings(precision)
        folder.mkdir()
        graph = write_graphs(info, folder, resolve_options(info, settings), settings).graphs["denoiser"]
        inputs = sample_inputs(graph.spec, info, {"batch": batch})
        ours = load_onnx_backend(info, folder, "cpu", threads=threads)
        steps.setdefault("torch eager", torch.inference_mode()(partial(module, **inputs)))
        steps[f"onnxruntime {precision}"] = partial(ours.run_graph, "denoiser", inputs)
        variant = f"openvino {precision}"
        try:
            steps[variant] = openvino_step(folder / graph.file, inputs, threads)
            expected = steps["torch eager"]()[0]
            error = float((steps[variant]() - expected).norm() / expected.norm())
        except Exception as failure:  # not installed, or a graph that it does not take
            steps.pop(variant, None)
            bench.run.add_red(name, variant, reason_of(failure), case=case)
            continue
        if error > (FLOAT32 if precision == "fp32" else HALF)[0]:
            del steps[variant]
            bench.run.add_red(name, variant, f"differs from torch eager: {error:.2g}", case=case)
            continue
        bench.run.check(f"{variant} equals torch eager at batch {batch}: {error:.2g} apart", True)
    timings = measure(steps, device="cpu", rounds=bench.rounds, warmup=2, flush_l2=False)
    bench.run.add(name, timings, baseline="torch eager", case=case)


def bench_first(bench: Bench, picture: np.ndarray, steps: int, scratch: Path) -> None:
    """Times the first picture of a process on a CPU, eager and compiled, with and without kept packages."""
    np.save(scratch / "picture.npy", picture)
    case = bench.case(batch=1, size="x".join(map(str, picture.shape[:2])), steps=steps)
    about = (bench.info.folder, scratch / "picture.npy", steps, torch.get_num_threads(), scratch)
    try:
        found = first_pictures(*about, rounds=1 if bench.run.quick else 3)
    except BenchmarkError as error:
        bench.run.add_red("first picture", KEPT, reason_of(error), case=case)
        return
    expected = found[BASELINE][0][1]
    alike = min(float((made == expected).mean()) for results in found.values() for _, made in results)
    if alike < FLOAT32[1]:
        bench.run.add_red("first picture", KEPT, f"maps differ: {alike:.2%} of the pixels alike", case=case)
        return
    bench.run.check(f"first pictures of all processes agree: {alike:.2%} of the pixels alike", True)
    timings = {name: Timing(tuple(each for each, _ in results)) for name, results in found.items()}
    bench.run.add("first picture", timings, baseline=BASELINE, case=case, quality={"pixels_alike": alike})


def make_picture(size: str) -> np.ndarray:
    """Returns a generated scene, uint8 [H, W, 3]."""
    height, width = (int(side) for side in size.split("x"))
    return np.ascontiguousarray(generate_scene(max(height, width), 0, 0, version=1)[0][:height, :width])


def benchmark(args: argparse.Namespace, scratch: Path) -> Run:
    run = Run("latency", quick=args.quick, folder=args.out)
    folder, model = find_model(args.model, args.preset, scratch)
    info = read_model_info(folder)
    plain = plain_candidates(info, args.device, slow=not args.quick)
    ours = our_candidates(info, args.device, scratch, slow=not args.quick)
    engines = engine_candidates(info, args.device, args.engine_dir)
    makers = {**plain, **ours}
    if args.variants:
        for name in sorted({*args.variants} - makers.keys() - {"none"}):
            print(f"{name}: not measured (no such variant here; there are {', '.join(makers)})")
        makers = {name: make for name, make in makers.items() if name == next(iter(plain)) or name in args.variants}
    makers |= engines
    makers = dict(sorted(makers.items(), key=lambda item: "compile" in item[0]))  # a stable sort: the baseline is first
    bench = Bench(
        run, info, model, args.device, 5 if args.quick else 20, time.monotonic() + 60 * args.minutes, makers,
        next(iter(plain)),
    )  # fmt: skip
    pictures = [make_picture(size) for size in args.sizes]
    bench.load(pictures)
    everyone = list(bench.pipelines)
    # a compiled network is compiled again for every batch size
    light = [name for name in everyone if "compile" not in name or args.device == "cuda"]
    if "step" in args.parts:
        for batch in args.batch:
            bench_step(bench, batch, everyone if batch == 1 else light)
    if "whole" in args.parts:
        for picture, steps in itertools.product(pictures, args.steps):
            bench_whole(bench, picture, 1, steps, everyone if steps == LOOP else light)
        steps = LOOP if LOOP in args.steps else min(args.steps)
        for batch in args.batch:
            if batch > 1:
                bench_whole(bench, pictures[0], batch, steps, light)
    if "eomt" in args.parts:
        for batch in args.batch:
            bench_eomt(bench, pictures[0], batch, args.quick)
    if "openvino" in args.parts:
        for batch in args.batch:
            bench_openvino(bench, batch, scratch)
    if "first" in args.parts:
        bench_first(bench, pictures[0], min(LOOP, info.num_inference_steps), scratch)
    if "stages" in args.parts:
        for picture in pictures:
            bench_stages(bench, picture, everyone, scratch)
    return run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="MODEL_DIR", help="trained weights; default random ones of --preset")
    parser.add_argument("--preset", choices=["tiny", "coco", "coco-fast"], default="tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="batch 1, 10 steps, one size, nothing compiled")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, *MORE_PARTS], default=PARTS)
    parser.add_argument("--variants", nargs="+", help="beside the baseline and the engines, these only")
    parser.add_argument("--steps", type=int, nargs="+")
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--sizes", nargs="+", type=sides, default=None, help="of pictures, HEIGHTxWIDTH")
    parser.add_argument("--threads", type=int, default=1, help="of torch and ONNX Runtime on a CPU")
    parser.add_argument("--minutes", type=float, default=60.0, help="time budget; what is left out is named")
    parser.add_argument(
        "--engine-dir", type=Path, nargs="+", default=[], metavar="DIR", help="engines, or ONNX graphs, of --model"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    args = parse_options(parser, argv)
    if "first" in args.parts and args.device != "cpu":
        raise BenchmarkError("--parts first: packages are kept on a CPU; add --device cpu")
    args.steps = args.steps or ([LOOP] if args.quick else [1, 4, 10, 20, 50])
    args.batch = args.batch or ([1] if args.quick else [1, 4, 16, 32])
    args.sizes = args.sizes or (["480x640"] if args.quick else ["480x640", "64x64"])
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as scratch:
        run = benchmark(args, Path(scratch))
    run.save(args.out)
    return int(bool(run.red))


if __name__ == "__main__":
    sys.exit(run_command(main))
