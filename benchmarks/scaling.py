"""Predicts images a second, memory and the cost of COCO's 200 k iterations on 1 to 64 GPUs, on paper.

python benchmarks/scaling.py [--gpu H100|H200] [--zero 1] [--batch 256] [--micro-batch 32] [--cores 12] [--share 0.4]
python benchmarks/scaling.py --price 3.5       of a GPU hour, which adds what the run costs
python benchmarks/scaling.py --image coco coco-fast [--gpu H100|H200] [--share 0.4]

Prints the cost model (`measuring/cost_model.py`): its fit to what `bench_scaling.py` measured on a CPU, each kind of
work by itself and tested on points that were left out, and its predictions.
"""

from __future__ import annotations

import argparse
import math
import sys

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

from benchmarks.measuring.cost_model import ACCELERATORS, predict
from benchmarks.measuring.image_cost import image_lines
from benchmarks.measuring.options import parse_options, refuse_unused
from benchmarks.reporting.rows import RESULTS
from benchmarks.reporting.scaling_tables import GIB, SHARES, data_seconds, scaling_section
from ldmseg_fast.config.presets import COCO, PRESETS
from ldmseg_fast.distributed.ending import run_command


def price(text: str) -> float:
    """Reads a price; raises ValueError for what is none."""
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(text)
    return value


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=list(ACCELERATORS), default="H200")
    parser.add_argument("--zero", type=int, choices=[0, 1, 2, 3], default=1)
    parser.add_argument("--batch", type=int, help="over all GPUs; one line for it instead of the tables")
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--cores", type=int, default=12, help="CPU cores per GPU")
    parser.add_argument("--share", type=float, default=SHARES[1], help="of the peak")
    parser.add_argument("--price", type=price, help="of a GPU hour, in any currency")
    parser.add_argument("--image", nargs="+", choices=list(PRESETS), help="forecast a whole image of presets instead")
    args = parse_options(parser, argv)
    gpu = ACCELERATORS[args.gpu]
    if args.image:
        unused = ("batch", "zero", "price", "gpus", "micro_batch", "cores")
        refuse_unused(args, parser, "as --image forecasts one picture on one GPU", *unused)
        for name in args.image:
            print("\n".join(image_lines(name, PRESETS[name], gpu, args.share)))
        return 0
    if args.batch is None:
        refuse_unused(args, parser, "as the tables have columns of it", "gpus", "micro_batch", "cores", "share")
        print(scaling_section(RESULTS, gpu, args.zero, args.price))
        return 0
    found = predict(
        COCO, gpu, args.gpus, args.share, zero_stage=args.zero, batch=args.batch, micro_batch=args.micro_batch,
        cores=args.cores, data=data_seconds(),
    )  # fmt: skip
    print(f"{found.images_per_second:.1f} images/s, {found.memory_bytes / GIB:.1f} GiB a GPU, {found.days:.1f} days")
    if args.price is not None:
        print(f"{found.gpu_hours:.0f} GPU hours at {args.price:g}: {found.gpu_hours * args.price:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
