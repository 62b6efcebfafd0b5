"""Times the points that `scaling.py` fits its cost model to: python benchmarks/bench_scaling.py [--minutes 2] [--quick]

The tiny UNet with random weights on one CPU thread, eager float32: denoising steps, and forward and backward passes, at
several batch sizes, all interleaved in one run, so that one load is on all of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import RESULTS, Run, measure
from benchmarks.measuring.options import parse_options
from benchmarks.reporting.scaling_tables import PASSES, STEP
from ldmseg_fast.config.presets import TINY
from ldmseg_fast.distributed.ending import run_command
from ldmseg_fast.models.unet import UNet

BATCHES = (1, 2, 4, 8, 16)


def measure_points(run: Run, minutes: float, batches: Sequence[int], rounds: tuple[int, int]) -> None:
    """Adds a row for each kind of work and batch size. `rounds`: at least, at most."""
    torch.manual_seed(0)
    side = TINY.data.image_size // TINY.mask_vae.downsampling
    unet = UNet(TINY.unet).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def step(batch: int, training: bool) -> torch.Tensor:
        sample = torch.ones(batch, TINY.unet.in_channels, side, side).contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(training):
            output = unet(sample, torch.zeros(batch))
            if training:
                unet.zero_grad()
                output.square().mean().backward()
        return output

    functions, operations = {}, {}
    for kind in (STEP, PASSES):
        for batch in batches:
            functions[kind, batch] = partial(step, batch, kind == PASSES)
            with FlopCounterMode(display=False) as counter:
                output = functions[kind, batch]()
            operations[kind, batch] = float(counter.get_total_flops())
            run.check(f"{kind}, batch {batch}: the output is finite", bool(output.isfinite().all()))
    calls = {f"{kind} {batch}": call for (kind, batch), call in functions.items()}
    timings = measure(
        calls, warmup=1, min_sample_ms=0, rounds=rounds[1], min_rounds=rounds[0], max_seconds=60 * minutes, memory=False
    )
    for kind, batch in functions:
        timing = {"torch float32": timings[f"{kind} {batch}"]}
        run.add(kind, timing, case={"model": "tiny", "batch": batch, "threads": 1}, flops=operations[kind, batch])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, help="time budget of the measurement")
    parser.add_argument("--quick", action="store_true", help="three small batches, three rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    args = parse_options(parser, argv)
    torch.set_num_threads(1)
    run = Run("scaling", quick=args.quick, folder=args.out)
    measure_points(run, args.minutes, BATCHES[:3] if args.quick else BATCHES, (3, 3) if args.quick else (5, 40))
    run.save(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
