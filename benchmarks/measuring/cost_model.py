"""Predicts time, memory and communication of a training step on 1 to 64 GPUs.

Time of a step: operations over a share of the GPU's peak, the optimiser's bytes over its memory bandwidth, what the
reduction does not hide behind the backward pass, and the input pipeline where it is slower than all that. The form, so
much a call and so much an operation, can be fitted to measured points. Peaks and links are data-sheet values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring.result_file import BenchmarkError
from ldmseg_fast.config import Config, UNetConfig
from ldmseg_fast.models.unet import UNet
from ldmseg_fast.training.estimate import Counts, activation_memory, count_parameters, rank_memory

PER_NODE = 8
ITERATIONS, GLOBAL_BATCH = 200_000, 256  # the paper's run on COCO
# AdamW and the moving average in float32: weight, gradient, two moments and average read, all but the gradient written
OPTIMIZER_BYTES = 4 * (5 + 4)


@dataclass(frozen=True)
class Accelerator:
    """Holds a data sheet: operations/s (bfloat16, dense), bytes/s of memory, and of links, per GPU and direction."""

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
    """Holds something measured: `calls` of a network with `operations` in all took `seconds`."""

    name: str
    calls: float
    operations: float
    seconds: float
    kind: str = ""


@dataclass(frozen=True)
class Fit:
    """Says that seconds = calls * overhead + operations / rate."""

    overhead: float
    rate: float

    def seconds(self, point: Point) -> float:
        return point.calls * self.overhead + point.operations / self.rate


def fit(points: Sequence[Point]) -> Fit:
    """Fits by least squares of the relative error, both constants at least zero.

    Raises:
        BenchmarkError: fewer than two points.
    """
    if len(points) < 2:
        raise BenchmarkError(f"{len(points)} measured points: two are needed; run benchmarks/bench_scaling.py")
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
    """Returns each point's relative error under a fit to all others of its kind."""
    return [fit([q for q in points if q is not p and q.kind == p.kind]).seconds(p) / p.seconds - 1 for p in points]


@lru_cache
def unet_operations(config: UNetConfig, side: int) -> float:
    """Returns the operations of one UNet evaluation of one image, whose latents have `side` cells a row."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        UNet(config, "sdpa")(torch.empty(1, config.in_channels, side, side), torch.zeros(1))
    return float(counter.get_total_flops())


@dataclass(frozen=True)
class Prediction:
    """Says what a number of GPUs would do."""

    gpus: int
    images_per_second: float
    memory_bytes: float
    communication_seconds: float  # in a step
    exposed_seconds: float  # of it, not hidden behind the backward pass
    gpu_hours: float  # of all iterations

    @property
    def days(self) -> float:
        return self.gpu_hours / self.gpus / 24


@lru_cache
def _sizes(config: Config) -> tuple[float, float, Counts, int]:
    """Operations of an image's forward passes and backward pass, parameters, and bytes of its activations.

    `train.precision=auto` means bf16, in which the peaks are given, whatever this machine would train in.
    """
    if config.train.precision == "auto":
        config = replace(config, train=replace(config.train, precision="bf16"))
    forward = unet_operations(config.unet, config.data.image_size // config.mask_vae.downsampling)
    recompute = config.train.checkpointing != "none"
    passes = 1.0 + config.diffusion.self_condition
    counts = count_parameters("diffusion", config)
    activations = activation_memory(config, 1, recompute)
    return passes * forward, (2.0 + recompute) * forward, counts, activations


def gradient_traffic(parameters: int, ranks: int, zero_stage: int, forwards: float) -> tuple[float, float]:
    """Returns float32 bytes per rank and step: (reduction of the gradients, gathering of weights).

    After Rajbhandari et al. 2020, section 7. Under ZeRO 3 the weights come once for each forward pass and once for the
    backward pass.
    """
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
    """Predicts a training step of `batch` images over `gpus`; latents are cached.

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
    held = rank_memory(counts, config, gpus, zero_stage) + min(per_gpu, micro_batch) * activations
    hours = ITERATIONS * seconds * gpus / 3600
    return Prediction(gpus, batch / seconds, held, reduction + gathering, exposed, hours)
