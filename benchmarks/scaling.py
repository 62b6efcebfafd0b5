"""Images a second, memory and the cost of COCO's 200 k iterations on 1 to 64 GPUs, on paper.

python benchmarks/scaling.py [--gpu H100|H200] [--zero 1] [--batch 256] [--micro-batch 32] [--cores 12] [--share 0.4]

Time of a step: operations over a share of the GPU's peak, the optimiser's bytes over its memory bandwidth, what the
reduction does not hide behind the backward pass, and the input pipeline where it is slower than all that. The form, so
much a call and so much an operation, is fitted to what was measured on a CPU, each kind of work by itself, and tested
on points that were left out; `bench_scaling.py` measures them. Peaks and links are data-sheet values.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

from benchmarks.reporting.tables import RESULTS, load_rows, table
from ldmseg_fast.config import Config
from ldmseg_fast.config.presets import COCO
from ldmseg_fast.distributed.ending import run_command
from ldmseg_fast.models.unet import UNet
from ldmseg_fast.training.estimate import Counts, activation_memory, count_parameters, state_memory

GIB = 2**30
PER_NODE = 8
ITERATIONS, GLOBAL_BATCH = 200_000, 256  # the paper's run on COCO
# AdamW and the moving average in float32: weight, gradient, two moments and average read, all but the gradient written
OPTIMIZER_BYTES = 4 * (5 + 4)
STEP, PASSES = "denoising step", "forward and backward"
# shares of the bfloat16 peak: what MosaicML published for SD 2 on A100s, and our target
SHARES = (0.28, 0.40)


@dataclass(frozen=True)
class Accelerator:
    """A data sheet: operations/s (bfloat16, dense), bytes/s of memory, and of the links, per GPU and direction."""

    name: str
    peak: float
    bandwidth: float
    nvlink: float
    network: float


ACCELERATORS = {
    "H100": Accelerator("H100", 989e12, 3.35e12, 450e9, 50e9),
    "H200": Accelerator("H200", 989e12, 4.80e12, 450e9, 50e9),
}


@dataclass(frozen=True)
class Point:
    """Something measured: `calls` of a network with `operations` in all took `seconds`."""

    name: str
    calls: float
    operations: float
    seconds: float
    kind: str = ""


@dataclass(frozen=True)
class Fit:
    """seconds = calls * overhead + operations / rate."""

    overhead: float
    rate: float

    def seconds(self, point: Point) -> float:
        return point.calls * self.overhead + point.operations / self.rate


@lru_cache
def unet_operations(config: Config) -> float:
    """Of one evaluation for one image."""
    side = config.data.image_size // config.mask_vae.downsampling
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        UNet(config.unet, "sdpa")(torch.empty(1, config.unet.in_channels, side, side), torch.zeros(1))
    return float(counter.get_total_flops())


def cpu_points(folder: Path = RESULTS) -> list[Point]:
    """Eager float32 on one CPU thread: denoising steps, and forward and backward passes of training, by batch size."""
    points = []
    for row in load_rows("scaling", folder):
        batch, seconds = row["case"]["batch"], row["p50"] / 1e3
        points.append(Point(f"{row['name']}, batch {batch}", 1, row["flops"], seconds, row["name"]))
    for row in [] if points else load_rows("latency", folder):  # fewer points of the same kind
        if row["name"] == "one step" and row["variant"] == "torch float32" and row["case"]["threads"] == 1:
            batch = row["case"]["batch"]
            seconds = batch * row["p50"] / 1e3
            points.append(Point(f"{STEP}, batch {batch}", 1, batch * row["flops"], seconds, STEP))
    return points


def engine_point(folder: Path = RESULTS) -> Point | None:
    """Forward and backward of a training step of the engine on a CPU, from the training suite; None without one."""
    rows = load_rows("training", folder)
    both = [row["value"] for row in rows if row["name"] in ("engine: forward", "engine: backward")]
    step = next((row for row in rows if row["name"] == "training step" and row["variant"] == "engine"), None)
    if step is None or len(both) != 2 or step["environment"]["gpu"]["name"]:
        return None
    batch = step["case"]["batch"]
    return Point(f"the engine's forward and backward, batch {batch}", 1, step["flops"], sum(both) / 1e3, PASSES)


def fit(points: Sequence[Point]) -> Fit:
    """Least squares of the relative error, both constants at least zero. Raises ValueError for under two points."""
    if len(points) < 2:
        raise ValueError(f"{len(points)} measured points: two are needed; run benchmarks/bench_latency.py")
    features = np.array([[point.calls, point.operations] for point in points])
    seconds = np.array([point.seconds for point in points])
    relative = features / seconds[:, None]
    solution = np.linalg.lstsq(relative, np.ones(len(points)), rcond=None)[0]
    if (solution <= 0).any():  # then one of the two explains the points better than both
        alone = (relative.sum(0)) / (relative**2).sum(0)
        errors = ((relative * alone - 1) ** 2).sum(0)
        solution = np.where(np.arange(2) == errors.argmin(), alone, 0.0)
    return Fit(float(solution[0]), float(1 / solution[1]) if solution[1] else float("inf"))


def held_out_errors(points: Sequence[Point]) -> list[float]:
    """Each point's relative error under a fit to all others of its kind."""
    return [fit([q for q in points if q is not p and q.kind == p.kind]).seconds(p) / p.seconds - 1 for p in points]


def data_seconds(folder: Path = RESULTS) -> float | None:
    """Seconds of one core for a COCO image at 512x512, as measured; None where it was not."""
    rows = [r for r in load_rows("data", folder) if r["name"] == "items on one core" and r["variant"] == "ours"]
    values = [row["p50"] / 1e3 for row in rows if row["case"]["size"] == 512]
    return values[0] if values else None


def optimizer_bandwidth(folder: Path = RESULTS) -> float | None:
    """Bytes/s that the optimiser reached on the CPU, as measured."""
    rows = load_rows("training", folder)
    times = [(row["value"] / 1e3, row["case"]["parameters"]) for row in rows if row["name"] == "engine: step"]
    return OPTIMIZER_BYTES * times[0][1] / times[0][0] if times else None


def measured_share(folder: Path = RESULTS) -> float | None:
    """Share of the peak that a measured training step on a GPU reached; None until there is one."""
    rows = [row for row in load_rows("gpu", folder) if row["name"] == "training step" and row["variant"] == "engine"]
    for row in rows:
        gpu = next((a for a in ACCELERATORS.values() if a.name in (row["environment"]["gpu"]["name"] or "")), None)
        if gpu is not None and row["flops"]:
            return row["flops"] / (row["case"]["batch"] * row["p50"] / 1e3) / gpu.peak
    return None


@dataclass(frozen=True)
class Prediction:
    gpus: int
    images_per_second: float
    memory_bytes: float
    exposed_seconds: float  # of communication in a step
    gpu_hours: float  # of all iterations

    @property
    def days(self) -> float:
        return self.gpu_hours / self.gpus / 24


@lru_cache
def _sizes(config: Config) -> tuple[float, float, Counts, int]:
    """Operations of an image's forward passes and backward pass, parameters, and bytes of its activations."""
    forward = unet_operations(config)
    recompute = config.train.checkpointing != "none"
    passes = 1.0 + config.diffusion.self_condition
    counts = count_parameters("diffusion", config)
    activations = activation_memory(config, 1, recompute)
    return passes * forward, (2.0 + recompute) * forward, counts, activations


def gradient_traffic(parameters: int, ranks: int, zero_stage: int, forwards: float) -> tuple[float, float]:
    """Bytes per rank and step: (reduction of the gradients, gathering of weights), float32 (Rajbhandari et al. 2020,
    section 7). Under ZeRO 3 the weights come once for each forward pass and once for the backward pass."""
    once = 4.0 * parameters * (ranks - 1) / ranks
    if zero_stage == 0:
        return 2 * once, 0.0
    return once, once if zero_stage < 3 else (forwards + 1) * once


def predict(
    config: Config,
    gpu: Accelerator,
    gpus: int,
    share: float,
    *,
    zero_stage: int = 1,
    batch: int = GLOBAL_BATCH,
    micro_batch: int = 32,
    cores: int = 12,
    data: float | None = None,
) -> Prediction:
    """A training step of `batch` images over `gpus`; latents are cached.

    Args:
        share: of `gpu.peak` that the passes reach.
        micro_batch: images a GPU takes at once; beyond it gradients are accumulated.
        cores: CPU cores per GPU for the input pipeline. data: core seconds an image.
    """
    forward, backward, counts, activations = _sizes(config)
    per_gpu = batch / gpus
    compute = [per_gpu * operations / (share * gpu.peak) for operations in (forward, backward)]
    update = OPTIMIZER_BYTES * counts.trainable / (gpus if zero_stage else 1) / gpu.bandwidth
    link = gpu.nvlink if gpus <= PER_NODE else gpu.network
    traffic = gradient_traffic(counts.trainable, gpus, zero_stage, 1 + config.diffusion.self_condition)
    reduction, gathering = (volume / link for volume in traffic)
    exposed = max(0.0, reduction - compute[1]) + gathering
    seconds = sum(compute) + update + exposed
    if data is not None:
        seconds = max(seconds, per_gpu * data / cores)
    held = state_memory(counts, config, gpus, zero_stage).device + min(per_gpu, micro_batch) * activations
    return Prediction(gpus, batch / seconds, held, exposed, ITERATIONS * seconds * gpus / 3600)


def scaling_section(folder: Path = RESULTS, gpu: Accelerator = ACCELERATORS["H200"], zero_stage: int = 1) -> str:
    """The fit with its held-out errors, and the predictions, as Markdown."""
    points, data, share = cpu_points(folder), data_seconds(folder), measured_share(folder)
    lines = [fit_section(points, folder)]
    shares = (share,) if share else SHARES
    said = f"{share:.0%} of peak, as measured" if share else f"assumed {SHARES[0]:.0%} to {SHARES[1]:.0%} of peak"
    rows = []
    for gpus in (1, 2, 4, 8, 16, 32, 64):
        found = [predict(COCO, gpu, gpus, s, zero_stage=zero_stage, data=data) for s in shares]
        rate = " to ".join(f"{p.images_per_second:.0f}" for p in found)
        days = " to ".join(f"{p.days:.1f}" for p in found)
        hours = " to ".join(f"{p.gpu_hours:.0f}" for p in found)
        memory, exposed = f"{found[0].memory_bytes / GIB:.1f}", f"{1e3 * found[0].exposed_seconds:.1f}"
        rows.append([str(gpus), rate, memory, exposed, hours, days])
    header = ["GPUs", "images/s", "GiB a GPU", "exposed communication, ms", "GPU hours", "days"]
    lines.append(
        f"The paper's run, {ITERATIONS:,} iterations of {GLOBAL_BATCH} images at 512x512 with self-conditioning and "
        f"cached latents, on {gpu.name}s under ZeRO {zero_stage}; {said}. Data-sheet values: {gpu.peak / 1e12:.0f} "
        f"TFLOP/s, {gpu.bandwidth / 1e12:.2f} TB/s, NVLink {gpu.nvlink / 1e9:.0f} GB/s within {PER_NODE} GPUs, "
        f"{gpu.network / 1e9:.0f} GB/s beyond.\n"
    )
    if share is None:
        lines.append("No GPU point has been measured yet: the table is an estimate that no measurement has tested.\n")
    return "\n".join([*lines, table(header, rows)])


def fit_section(points: Sequence[Point], folder: Path) -> str:
    """What was fitted to the CPU points of each kind, and how far each held-out point is off."""
    lines, rows = [], []
    kinds: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        kinds[point.kind].append(point)
    kinds = {kind: group for kind, group in kinds.items() if len(group) > 2}
    for kind, group in kinds.items():
        model, errors = fit(group), held_out_errors(group)
        lines.append(
            f"Fitted to {len(group)} points of `{kind}` on one CPU thread (eager, float32): "
            f"{1e3 * model.overhead:.2f} ms a call and {model.rate / 1e9:.1f} GFLOP/s. Each point under a fit to the "
            f"others is off by {np.median(np.abs(errors)):.0%} in the median, {np.max(np.abs(errors)):.0%} at most.\n"
        )
        rows += [compared(point, point.seconds * (1 + error)) for point, error in zip(group, errors)]
    other = engine_point(folder)
    if other is not None and other.kind in kinds:
        rows.append(compared(other, fit(kinds[other.kind]).seconds(other), "another run, a smaller picture"))
    if rows:
        lines.append(table(["held-out point", "measured", "predicted", "error"], rows))
    else:
        lines.append("Too few CPU points for a fit: run `python benchmarks/bench_scaling.py`.\n")
    facts = []
    if (bandwidth := optimizer_bandwidth(folder)) is not None:
        facts.append(f"the optimiser moved {bandwidth / 1e9:.1f} GB/s")
    if (data := data_seconds(folder)) is not None:
        facts.append(f"an image costs one core {1e3 * data:.1f} ms")
    memory = [row for row in load_rows("training", folder) if row["name"] == "memory per rank" and "expected" in row]
    if memory:
        worst = max(abs(row["value"] / row["expected"] - 1) for row in memory)
        facts.append(f"memory per rank, measured under ZeRO 0-3, is within {worst:.1%} of the formula used here")
    return "\n".join([*lines, f"Also measured: {'; '.join(facts)}.\n"] if facts else lines)


def compared(point: Point, predicted: float, note: str = "") -> list[str]:
    """A row of the table of held-out points."""
    name = f"{point.name} ({note})" if note else point.name
    return [name, f"{1e3 * point.seconds:.1f} ms", f"{1e3 * predicted:.1f} ms", f"{predicted / point.seconds - 1:+.0%}"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=list(ACCELERATORS), default="H200")
    parser.add_argument("--zero", type=int, choices=[0, 1, 2, 3], default=1)
    parser.add_argument("--batch", type=int, help="over all GPUs; one line for it instead of the tables")
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--cores", type=int, default=12, help="CPU cores per GPU")
    parser.add_argument("--share", type=float, default=SHARES[1], help="of the peak")
    args = parser.parse_args(argv)
    gpu = ACCELERATORS[args.gpu]
    if args.batch is None:
        print(scaling_section(RESULTS, gpu, args.zero))
        return 0
    found = predict(
        COCO, gpu, args.gpus, args.share, zero_stage=args.zero, batch=args.batch, micro_batch=args.micro_batch,
        cores=args.cores, data=data_seconds(),
    )  # fmt: skip
    print(f"{found.images_per_second:.1f} images/s, {found.memory_bytes / GIB:.1f} GiB a GPU, {found.days:.1f} days")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
