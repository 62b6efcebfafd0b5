"""Prints where the sampling loop's time goes, kernel by kernel: python benchmarks/profile_loop.py --model MODEL_DIR

Prints torch.profiler's table of one loop and the share of time that the device was busy.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measuring.options import parse_options
from benchmarks.random_model import find_model
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.backends.torch_backend import TorchBackend
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.distributed.ending import run_command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="MODEL_DIR", help="trained weights; default random ones of --preset")
    parser.add_argument("--preset", choices=["tiny", "coco"], default="tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=20)
    args = parse_options(parser, argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder, _ = find_model(args.model, args.preset, Path(scratch))
        info = read_model_info(folder)
        backend = TorchBackend(info, args.device)
        scheduler = Scheduler(info.scheduler).to(args.device)
        noise = torch.randn(args.batch, *info.latent_shape, device=args.device)
        shape = (args.batch, info.image_latent_channels, *info.latent_shape[1:])
        image_latents = torch.randn(shape, device=args.device, dtype=backend.dtype)

        def loop() -> float:
            start = time.perf_counter()
            backend.sample(noise, image_latents, scheduler, args.steps)
            if args.device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        loop()
        plain = min(loop() for _ in range(3))
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if args.device == "cuda" else [])
        with profile(activities=activities) as trace:
            loop()
    averages = trace.key_averages()
    column = "self_device_time_total" if args.device == "cuda" else "self_cpu_time_total"
    print(averages.table(sort_by=column, row_limit=args.rows, max_name_column_width=70))
    busy = sum(getattr(event, column) for event in averages) / 1e6
    print(f"{args.steps} steps, batch {args.batch}: {1e3 * plain:.3f} ms; device busy {busy / plain:.0%} of it")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
