"""Print what each kernel must move and compute, and the least time that takes on data sheets.

    python -m ldmseg_fast.kernels.roofline [--only attention] [--json FILE]

The floor is the largest of bytes over memory bandwidth, operations over dense tensor throughput (of float16, or of e4m3
for fp8 cases), and exponentials over the rate of the special-function units (16 a clock and multiprocessor, at the
clock behind the tensor figure). No kernel can be faster; one that overlaps nothing needs up to the sum.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldmseg_fast.kernels.case import Case, all_cases


@dataclass(frozen=True)
class Gpu:
    """Quotes a data sheet: bytes, dense float16 and e4m3 operations (0: it has none), exponentials; all per second."""

    name: str
    bandwidth: float
    half_operations: float
    fp8_operations: float
    exponentials: float


GPUS = (
    Gpu("H100", 3.35e12, 989e12, 1979e12, 132 * 16 * 1.83e9),
    Gpu("H200", 4.80e12, 989e12, 1979e12, 132 * 16 * 1.83e9),
    Gpu("A100", 2.04e12, 312e12, 0.0, 108 * 16 * 1.41e9),
    Gpu("4090", 1.01e12, 165e12, 330e12, 128 * 16 * 2.52e9),
)


def floor_us(case: Case, gpu: Gpu) -> float:
    """Computes the least time of `case` on `gpu`, in microseconds; infinite where the GPU lacks what the case needs."""
    rate = gpu.fp8_operations if case.fp8 else gpu.half_operations
    if not rate:
        return math.inf
    return 1e6 * max(case.bytes_moved / gpu.bandwidth, case.operations / rate, case.exponentials / gpu.exponentials)


def find_gpu(name: str | None) -> Gpu | None:
    """Finds the data sheet of a device name such as "NVIDIA H100 80GB HBM3"; None where the table has none."""
    return next((gpu for gpu in GPUS if name and gpu.name in name), None)


def format_row(case: Case) -> str:
    """Writes one line of the table."""
    floors = "".join(f"{floor_us(case, gpu):>9.1f}".replace("inf", "  -") for gpu in GPUS)
    amounts = f"{case.bytes_moved / 1e6:>10.2f}{case.operations / 1e9:>10.1f}{case.exponentials / 1e6:>9.1f}"
    dtype = str(case.dtype).removeprefix("torch.")
    return f"{case.kernel:<17}{case.name:<46}{dtype:<10}{case.batch:>4}{amounts}{floors}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="kernels (folders) to print")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(arguments)
    cases = [case for case in all_cases() if not options.only or case.kernel in options.only]
    print(
        f"{'kernel':<17}{'case':<46}{'dtype':<10}{'B':>4}{'MB':>10}{'GFLOP':>10}{'M exp':>9}"
        + "".join(f"{gpu.name + ' us':>9}" for gpu in GPUS)
    )
    for case in cases:
        print(format_row(case))
    if options.json:
        rows = [
            {
                "kernel": case.kernel,
                "case": case.name,
                "dtype": str(case.dtype).removeprefix("torch."),
                "batch": case.batch,
                "bytes": case.bytes_moved,
                "operations": case.operations,
                "exponentials": case.exponentials,
                "floor_us": {gpu.name: floor_us(case, gpu) for gpu in GPUS if floor_us(case, gpu) < math.inf},
            }
            for case in cases
        ]
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
