"""Times the training engine beside a plain loop at equal batch, and weighs ZeRO's memory against the formula.

python benchmarks/bench_training.py [--config coco] [--compile blocks] [--batch 8] [--quick] [--no-zero]
    [--parts engine categories moments fp8]

Plain: eager modules under autocast, pictures decoded and encoded in every step, AdamW parameter by parameter, and a
wait for the loss in every step. On a CPU a tiny model with an untrained TAESD encoder; on a GPU the full one.
The part `categories` times steps of the preset `tiny` with categories beside the same without. The part `moments`
trains the same weights on the same pictures with AdamW's moments in 8 bits and in 32, and compares losses, memory and
times; the part `fp8` with `train.fp8` and without, which needs a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import RESULTS, measure
from benchmarks.harness import Run as Record
from benchmarks.measuring.options import parse_options
from benchmarks.measuring.training_parts import make_parts, settings
from benchmarks.measuring.zero_memory import bench_zero
from benchmarks.peers.plain_loop import PlainLoop
from ldmseg_fast import distributed
from ldmseg_fast.commands.data_cache import build_cache, load_encoder
from ldmseg_fast.config import load_config, validate
from ldmseg_fast.config.precision import DTYPES
from ldmseg_fast.data.latent_cache import default_folder, picture_files
from ldmseg_fast.data.scenes import CATEGORIES, write_scenes
from ldmseg_fast.distributed.ending import run_command
from ldmseg_fast.distributed.liveness import Interrupt
from ldmseg_fast.kernels.backend import KERNELS, set_backend
from ldmseg_fast.models.fp8_layers import why_not_fp8_products
from ldmseg_fast.training.estimate import count_parameters
from ldmseg_fast.training.inputs import training_set
from ldmseg_fast.training.loop import Run, learning_rate


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def split(run: Run, steps: int) -> dict[str, float]:
    """Returns milliseconds a step of each part, the device waited for in between."""
    times: dict[str, float] = dict.fromkeys(("data", "encode", "forward", "backward", "step"), 0.0)

    def timed(name: str, function: Callable[[], Any]) -> Any:
        synchronize(run.device)
        start = time.perf_counter()
        result = function()
        synchronize(run.device)
        times[name] += 1000 * (time.perf_counter() - start) / steps
        return result

    for _ in range(steps):
        run.optimizer.set_learning_rate(learning_rate(run.progress.step, run.config.train))
        [batch] = timed("data", lambda: next(run.prefetched))
        run.stage.prepare([batch])
        with run.stage.autocast(), torch.no_grad():
            batch["image_latents"] = timed("encode", lambda b=batch: run.stage.image_latents(b).detach())
        losses = timed("forward", lambda b=batch: run.optimizer.forward(b, run.progress.step))
        timed("backward", lambda x=losses: run.optimizer.backward(x["loss"], last=True))
        timed("step", run.optimizer.step)
        run.progress.step += 1
    return times


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOP/s of a large matrix product on this device in this dtype, the best of ten."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def bench_engine(record: Record, args: argparse.Namespace, folder: Path) -> None:
    device = distributed.device()
    base = [f"train.batch_size={args.batch}", "train.warmup=1", f"train.precision={args.precision}"]
    config = settings(args.config, folder, *base)
    make_parts(folder, config)
    write_scenes(folder / "scenes", 64, max(64, min(config.data.image_size, 256)), 0, version=1)
    plain = PlainLoop(validate(replace(config, train=replace(config.train, channels_last=False))), device)

    dataset = training_set(config, config.mask_vae.num_slots)
    encoder, encoder_settings = load_encoder(folder / "taesd.safetensors", config.data.image_size)
    cache = default_folder(config.data.root)
    build_cache(encoder.to(device), encoder_settings, picture_files(dataset), config.data.image_size, cache)
    options = ["data.latent_cache=auto", f"train.compile={args.compile}", f"data.num_workers={args.workers}"]
    run = Run("diffusion", settings(args.config, folder, *base, *options), Interrupt())

    def engine_step() -> None:
        run.window.add(run.take_step())

    def plain_step() -> None:
        for kernel in KERNELS:
            set_backend(kernel, "torch")
        plain.step()
        for kernel in KERNELS:
            set_backend(kernel, "auto")

    losses = [plain.step() for _ in range(3)]
    first = float(run.take_step()["loss"])
    record.check("both losses are finite and start alike", all(0 < loss < 10 * first for loss in losses))
    timings = measure(
        {"plain": plain_step, "engine": engine_step},
        device=device.type,
        rounds=5 if args.quick else 20,
        max_seconds=30 * args.minutes,
        flush_l2=False,
    )
    [batch] = next(run.prefetched)
    with FlopCounterMode(display=False) as counter:
        run.stage(batch, 0)["loss"].backward()
    flops = counter.get_total_flops()
    dtype = DTYPES[args.precision]
    peak = peak_flops(device, dtype)
    counts = count_parameters("diffusion", config)
    case = {"model": args.config, "batch": args.batch, "precision": args.precision, "parameters": counts.trainable}
    record.add(
        "training step", timings, baseline="plain", case=case, items=args.batch, flops=flops,
        floor_ms=1000 * flops / peak / args.batch, target=2.3 if device.type == "cuda" else None,
    )  # fmt: skip
    for name, timing in timings.items():
        record.add_value("images per second", 1000 * args.batch / timing.median, "images/s", case=case, variant=name)
    for name, milliseconds in split(run, 3 if args.quick else 20).items():
        record.add_value(f"engine: {name}", milliseconds, "ms a step", case=case)
    run.close()


def bench_categories(record: Record, args: argparse.Namespace, folder: Path) -> None:
    """Times training steps of models with categories beside those without, on the same scenes."""
    write_scenes(folder / "scenes", 64, 64, 0, version=2)
    things_and_stuff = len(CATEGORIES[2])
    base = [f"data.root={folder / 'scenes'}", f"train.batch_size={args.batch}", f"train.precision={args.precision}"]
    base += ["train.threads=1", "few_step.train_decoder=true", "data.num_workers=0"]
    folders: dict[int, Path] = {}
    for stage in ("autoencoder", "one_step"):
        runs: dict[str, Run] = {}
        for name, count in (("with categories", things_and_stuff), ("without", 0)):
            own = [*base, f"mask_vae.num_categories={count}", f"output_dir={folder / f'{stage}-{count}'}"]
            if stage == "one_step":
                own.append(f"model.mask_vae={folders[count]}")
            runs[name] = Run(stage, load_config("tiny", own), Interrupt())
            if stage == "autoencoder":
                folders[count] = folder / f"{stage}-{count}" / "untrained"
                runs[name].export(folders[count])
        steps = {name: (lambda run=run: run.window.add(run.take_step())) for name, run in runs.items()}
        rounds, seconds = 5 if args.quick else 20, 15 * args.minutes
        timings = measure(steps, device=distributed.device().type, rounds=rounds, max_seconds=seconds, flush_l2=False)
        case = {"model": "tiny", "stage": stage, "batch": args.batch, "categories": things_and_stuff}
        record.add("training step with categories", timings, baseline="without", target=1 / 1.05, case=case)
        for run in runs.values():
            run.close()


def bench_variants(record: Record, args: argparse.Namespace, folder: Path, what: str, variants: dict[str, str]) -> None:
    """Compares losses, moments' memory and times of runs that differ in one setting; the first is the baseline."""
    config = settings(args.config, folder)
    make_parts(folder, config)
    write_scenes(folder / "scenes", 64, max(64, min(config.data.image_size, 256)), 0, version=1)
    base = [f"train.batch_size={args.batch}", "train.warmup=1", f"train.precision={args.precision}"]
    base += [f"train.compile={args.compile}", f"data.num_workers={args.workers}"]
    runs: dict[str, Run] = {}
    for name, setting in variants.items():
        own = [*base, setting, f"output_dir={folder / name}"]
        runs[name] = Run("diffusion", settings(args.config, folder, *own), Interrupt())
    count = 10 if args.quick else 200
    losses = {name: [float(run.take_step()["loss"]) for _ in range(count)] for name, run in runs.items()}
    case = {"model": args.config, "batch": args.batch, "steps": count}
    for name, values in losses.items():
        half = values[count // 2 :]
        record.add_value("mean loss of the last half", sum(half) / len(half), "", case=case, variant=name, curve=values)
        moments = sum(moment.nbytes for shard in runs[name].optimizer.shards for moment in shard.moments.values())
        record.add_value("moments", moments / 2**20, "MiB", case=case, variant=name)
    steps = {name: (lambda run=run: run.window.add(run.take_step())) for name, run in runs.items()}
    rounds, seconds = 5 if args.quick else 20, 15 * args.minutes
    timings = measure(steps, device=distributed.device().type, rounds=rounds, max_seconds=seconds, flush_l2=False)
    record.add(f"training step, {what}", timings, baseline=next(iter(variants)), case=case, items=args.batch)
    for run in runs.values():
        run.close()


# settings that a part compares, the baseline first
VARIANTS = {
    "fp8": ("products in eight bits", {"bf16": "train.fp8=false", "fp8": "train.fp8=true"}),
    "moments": (
        "moments in eight bits",
        {"moments of 32 bits": "train.optimizer=adamw", "moments of 8 bits": "train.optimizer=adamw_8bit"},
    ),
}
PARTS = ("engine", "categories", "moments", "fp8")


def parts_of(device: torch.device) -> tuple[str, ...]:
    """Returns the parts that can run here."""
    lacking = why_not_fp8_products(device) or importlib.util.find_spec("torchao") is None
    return PARTS[:-1] if lacking else PARTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", choices=["tiny", "coco"], default="coco" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--batch", type=int, default=32 if torch.cuda.is_available() else 8)
    parser.add_argument("--precision", default="bf16" if torch.cuda.is_available() else "fp32")
    parser.add_argument("--compile", default="blocks" if torch.cuda.is_available() else "none")
    parser.add_argument("--workers", type=int, default=8 if torch.cuda.is_available() else 0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=parts_of(distributed.device()))
    parser.add_argument("--no-zero", action="store_true", help="leave out the memory of ZeRO on two ranks")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--minutes", type=float, default=10.0, help="of which half is for the timed steps")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    args = parse_options(parser)
    torch.set_num_threads(1)
    record = Record("training", quick=args.quick, folder=args.out)
    with tempfile.TemporaryDirectory() as name:
        if "engine" in args.parts:
            bench_engine(record, args, Path(name))
            if not args.no_zero:
                bench_zero(record, args.config, Path(name))
    if "categories" in args.parts:
        with tempfile.TemporaryDirectory() as name:
            bench_categories(record, args, Path(name))
    for part in (part for part in args.parts if part in VARIANTS):
        with tempfile.TemporaryDirectory() as name:
            bench_variants(record, args, Path(name), *VARIANTS[part])
    record.save(args.out)


if __name__ == "__main__":
    sys.exit(run_command(main))
