"""Holds what every benchmark shares: the environment record, fair timing, and one validated JSON file per run.

run = Run("evaluation", folder=RESULTS)                        # records environment and load before any work
run.check("ours equals panopticapi", ours == theirs)           # a run with a failed check is never saved
run.add_red("joint histogram", "numpy", "MemoryError")         # one case failed; the run goes on
timings = measure({"ours": f, "numpy": g}, device="cpu")       # interleaved, so that drift hits both sides
run.add("joint histogram", timings, baseline="numpy", case={"size": "480x640"}, target=3.0)
run.save()                                                     # benchmarks/results/evaluation-<time>.json

python benchmarks/harness.py --self-test [--device cuda]       # A/A: one function under two names, within 3 %
"""

import argparse
import sys

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

import torch

from benchmarks.measuring.environment import PACKAGES, ROOT, environment
from benchmarks.measuring.options import parse_options
from benchmarks.measuring.result_file import (
    PERCENTILES,
    RESULTS,
    SCHEMA_VERSION,
    BenchmarkError,
    Run,
    format_row,
    read_journal,
    read_results,
    reason_of,
    validate,
)
from benchmarks.measuring.timing import Timing, measure, peak_memory
from ldmseg_fast.distributed.ending import run_command

__all__ = [
    "PACKAGES",
    "PERCENTILES",
    "RESULTS",
    "ROOT",
    "SCHEMA_VERSION",
    "BenchmarkError",
    "Run",
    "Timing",
    "environment",
    "format_row",
    "measure",
    "peak_memory",
    "read_journal",
    "read_results",
    "reason_of",
    "validate",
]
SELF_TEST_LIMIT = 0.03
ATTEMPTS = 3  # other people's load comes and goes


def self_test(device: str = "cpu", rounds: int = 60) -> bool:
    """Times one matrix product under two names, and returns whether their medians agree within `SELF_TEST_LIMIT`.

    Prints both spreads (p80/p20). A difference beyond the limit is measured again, at most `ATTEMPTS` times in all.
    """
    side = 4096 if torch.device(device).type == "cuda" else 384
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    for attempt in range(ATTEMPTS):
        timings = measure({"A": lambda: a @ b, "A again": lambda: a @ b}, device=device, rounds=rounds, min_sample_ms=4)
        first, second = timings.values()
        difference = abs(first.median / second.median - 1)
        spreads = f"p80/p20 {first.spread:.3f} and {second.spread:.3f}"
        print(f"A/A {attempt + 1}: {first.median:.4f} and {second.median:.4f} ms, apart {difference:.2%}; {spreads}")
        if difference <= SELF_TEST_LIMIT:
            return True
    return False


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the harness itself: the same function under two names.")
    parser.add_argument("--self-test", action="store_true", required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parse_options(parser, argv)
    return 0 if self_test(args.device) else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
