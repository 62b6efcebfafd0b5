"""The training engine against a plain loop at equal batch, and ZeRO's memory per rank against the formula.

python benchmarks/bench_training.py [--config coco] [--compile blocks] [--batch 8] [--quick] [--no-zero]

Plain: eager modules under autocast, pictures decoded and encoded in every step, AdamW parameter by parameter, and a
wait for the loss in every step. On a CPU a tiny model with an untrained TAESD encoder; on a GPU the full one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

from benchmarks.bench_data import plain_item
from benchmarks.harness import RESULTS, measure
from benchmarks.harness import Run as Record
from ldmseg_fast import distributed
from ldmseg_fast.checkpoints.model_folder import save_component, save_index
from ldmseg_fast.checkpoints.tensors import save_weights
from ldmseg_fast.commands.data_cache import build_cache, load_encoder
from ldmseg_fast.config import Config, ImageEncoderConfig, load_config, validate
from ldmseg_fast.config.precision import DTYPES
from ldmseg_fast.data.latent_cache import default_folder, picture_files
from ldmseg_fast.data.scenes import write_scenes
from ldmseg_fast.distributed.ending import run_command
from ldmseg_fast.distributed.liveness import Interrupt
from ldmseg_fast.kernels.backend import KERNELS, set_backend
from ldmseg_fast.models.image_vae import TaesdEncoder
from ldmseg_fast.models.mask_vae import MaskVAE
from ldmseg_fast.training.estimate import Counts, count_parameters, state_memory
from ldmseg_fast.training.loop import Run, learning_rate, make_dataset
from ldmseg_fast.training.stages import DiffusionStage

RANKS = 2
# 31 M parameters on 8x8 latents: seconds a step on a CPU, and large beside everything else that a process holds
ZERO_MODEL = ["unet.block_out_channels=64,192,384", "unet.in_channels=12", "train.batch_size=2"]


def make_parts(folder: Path, config: Config) -> tuple[Path, Path]:
    """An untrained mask auto-encoder's folder and an untrained TAESD file."""
    torch.manual_seed(0)
    model = folder / "autoencoder"
    save_component(model, "mask_vae", config.mask_vae, MaskVAE(config.mask_vae).state_dict())
    save_index(model, ["mask_vae"], {})
    encoder = TaesdEncoder(ImageEncoderConfig(kind="taesd"))
    taesd = folder / "taesd.safetensors"
    save_weights({key.removeprefix("layers."): value for key, value in encoder.state_dict().items()}, taesd)
    return model, taesd


def settings(args: argparse.Namespace, folder: Path, *overrides: str) -> Config:
    """A run with a frozen encoder and 8x downsampling, on generated scenes."""
    size = 64 if args.config == "tiny" else 512
    fixed = [f"data.root={folder / 'scenes'}", f"output_dir={folder / 'run'}", f"data.image_size={size}"]
    fixed += ["image_encoder.kind=taesd", "image_encoder.latent_channels=4", "image_encoder.downsampling=8"]
    fixed += [
        "image_encoder.scaling_factor=1",
        f"image_encoder.path={folder / 'taesd.safetensors'}",
        "unet.in_channels=12",
    ]
    if args.config == "tiny":
        fixed += ["mask_vae.widths=32,64,128,128", "unet.sample_size=8"]
    fixed += [f"model.mask_vae={folder / 'autoencoder'}", "data.cache=false", "train.threads=1", *overrides]
    return load_config(args.config, fixed)


class PlainLoop:
    """What a training loop looks like that nobody has tuned."""

    def __init__(self, config: Config, device: torch.device) -> None:
        torch.manual_seed(config.train.seed)
        self.config, self.device = config, device
        self.stage = DiffusionStage(config).to(device).train()
        self.dataset = make_dataset(config, "train2017", config.mask_vae.num_slots, train=True)
        self.parameters = [p for p in self.stage.parameters() if p.requires_grad]
        rate, decay = config.train.learning_rate, config.train.weight_decay
        self.adamw = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=decay, foreach=False, fused=False)
        self.step_number = 0

    def batch(self) -> dict[str, Any]:
        """Decoded in this process; float pictures, float bit planes and long masks travel to the device."""
        import numpy as np

        rng = np.random.default_rng(self.step_number)
        indices = rng.integers(0, len(self.dataset), self.config.train.batch_size)
        items = [plain_item(self.dataset, int(index), rng) for index in indices]
        batch = {key: torch.stack([item[key] for item in items]).to(self.device) for key in items[0]}
        slots = torch.arange(256, device=self.device).clamp(max=self.dataset.num_slots - 1).to(torch.uint8)
        image = ((batch["image"] + 1) * 127.5).round().to(torch.uint8)
        ids = [self.dataset.image_id(int(index)) for index in indices]
        return {
            "image": image,
            "segment_ids": batch["target"].to(torch.uint8),
            "table": slots.expand(len(items), -1),
            "image_id": ids,
        }

    def step(self) -> float:
        losses = self.stage(self.batch(), self.step_number)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.train.clip, foreach=False)
        self.adamw.step()
        self.adamw.zero_grad()
        self.step_number += 1
        return losses["loss"].item()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def split(run: Run, steps: int) -> dict[str, float]:
    """Milliseconds a step of each part, the device waited for in between."""
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
    """FLOP/s of a large matrix product on this device in this dtype, the best of ten."""
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
    config = settings(args, folder, *base)
    make_parts(folder, config)
    write_scenes(folder / "scenes", 64, max(64, min(config.data.image_size, 256)), 0)
    plain = PlainLoop(validate(replace(config, train=replace(config.train, channels_last=False))), device)

    dataset = make_dataset(config, "train2017", config.mask_vae.num_slots, train=True)
    encoder, encoder_settings = load_encoder(folder / "taesd.safetensors", config.data.image_size)
    cache = default_folder(config.data.root)
    build_cache(encoder.to(device), encoder_settings, picture_files(dataset), config.data.image_size, cache)
    options = ["data.latent_cache=auto", f"train.compile={args.compile}", f"data.num_workers={args.workers}"]
    run = Run("diffusion", settings(args, folder, *base, *options), Interrupt())

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


def live_bytes() -> int:
    """Bytes of all tensors that this process holds, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def zero_worker(args: argparse.Namespace) -> None:
    """One rank: build the run, take steps, and write what it holds when the gradients are reduced."""
    distributed.start()
    folder = Path(args.folder)
    config = settings(args, folder, *ZERO_MODEL, f"train.zero_stage={args.zero_worker}", "train.precision=fp32")
    config = replace(config, output_dir=str(folder / f"zero-{args.zero_worker}"))
    before = live_bytes()
    run = Run("diffusion", config, Interrupt())
    held: list[int] = []
    update = run.optimizer._update

    def watched_update() -> Any:
        held.append(live_bytes() - before)
        return update()

    run.optimizer._update = watched_update  # type: ignore[method-assign]
    run.take_step()
    run.take_step()
    values = distributed.gather_objects(max(held))
    if distributed.is_main():
        (folder / f"zero-{args.zero_worker}.json").write_text(json.dumps(values))
    run.close()
    distributed.stop()


def held_when_reduced(counts: Counts, config: Config, zero_stage: int) -> float:
    """The formula's share at that moment: gradients are cut by then, and buffers freed but at stage 3."""
    memory = state_memory(counts, config, RANKS, zero_stage, on_gpu=False)
    gradients = memory.gradients / RANKS if zero_stage == 1 else memory.gradients
    buffers = memory.buffers if zero_stage == 3 else 0.0
    return memory.weights + memory.optimizer + memory.averages + memory.frozen + gradients + buffers


def bench_zero(record: Record, args: argparse.Namespace, folder: Path) -> None:
    """Memory per rank at two ranks against the formula, which then tells what 8 and 64 ranks need."""
    from ldmseg_fast.commands.demo import free_port

    config = settings(args, folder, *ZERO_MODEL)
    counts = count_parameters("diffusion", config)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(RANKS), "--master_port"]
    for zero_stage in range(4):
        command = [*launcher, str(free_port()), __file__, "--zero-worker", str(zero_stage), "--folder", str(folder)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        result = folder / f"zero-{zero_stage}.json"
        record.check(f"ZeRO {zero_stage} ran on {RANKS} ranks", done.returncode == 0 and result.is_file())
        measured = max(json.loads(result.read_text())) / 2**20
        expected = held_when_reduced(counts, config, zero_stage) / 2**20
        case = {"zero": zero_stage, "ranks": RANKS, "parameters": counts.trainable}
        record.add_value("memory per rank", measured, "MiB", case=case, variant="measured", expected=expected)
        record.check(f"ZeRO {zero_stage}: the formula is within 5 %", abs(measured / expected - 1) < 0.05)
    full = load_config("coco")
    counts = count_parameters("diffusion", full)
    for zero_stage in range(4):
        for ranks in (1, 8, 64):
            memory = state_memory(counts, full, ranks, zero_stage).device / 2**30
            case = {"zero": zero_stage, "ranks": ranks, "parameters": counts.trainable}
            record.add_value("memory per rank, full model", memory, "GiB", case=case, variant="formula")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", choices=["tiny", "coco"], default="coco" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--batch", type=int, default=32 if torch.cuda.is_available() else 8)
    parser.add_argument("--precision", default="bf16" if torch.cuda.is_available() else "fp32")
    parser.add_argument("--compile", default="blocks" if torch.cuda.is_available() else "none")
    parser.add_argument("--workers", type=int, default=8 if torch.cuda.is_available() else 0)
    parser.add_argument("--no-zero", action="store_true", help="leave out the memory of ZeRO on two ranks")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--minutes", type=float, default=10.0, help="of which half is for the timed steps")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--zero-worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.zero_worker is not None:
        zero_worker(args)
        return
    torch.set_num_threads(1)
    record = Record("training", quick=args.quick)
    with tempfile.TemporaryDirectory() as name:
        bench_engine(record, args, Path(name))
        if not args.no_zero:
            bench_zero(record, args, Path(name))
    record.save(args.out)


if __name__ == "__main__":
    sys.exit(run_command(main))
