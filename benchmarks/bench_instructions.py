"""Counts what the kernels are compiled to, with no GPU: registers, matrix instructions, waits, instructions an element.

    python benchmarks/bench_instructions.py --sm 80 90

`python -m ldmseg_fast.kernels.aot --headline --sass` compiles each kernel function at its headline case. The counts
depend on Triton's version and on nothing of the machine. A build that spills or fails is a red row. Functions that have
switches are compiled again with each of them. Another Python's Triton is counted by running this with that Python.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

from benchmarks.harness import RESULTS, ROOT, BenchmarkError, Run
from benchmarks.measuring.options import parse_options
from ldmseg_fast.distributed.ending import run_command
from ldmseg_fast.kernels.aot import Build
from ldmseg_fast.kernels.backend import KERNELS

COUNTS = ("registers", "spill_bytes", "wgmma", "mma", "waits", "exponentials", "loop")
# a constant, and the kernels, each with its function, that have it; off in every shipped configuration
SWITCHES = {
    "PADDED=1": {"attention": "attention_forward_kernel"},
    "DELAYED=1": {"attention": "attention_forward_kernel"},
    "QUARTERS=1": {"attention": "attention_forward_kernel"},
    "DESCRIBED=1": {"attention": "attention_forward_kernel"},
    "SPLITS=4": {"linear": "linear_kernel", "convolution": "convolution_kernel"},
}


def add_rows(run: Run, builds: list[dict[str, Any]], switch: str = "") -> None:
    """Adds a row for each build, as `kernels.aot --json` writes them; red where it is unfit to ship.

    With a switch those of the functions that have it.
    """
    for each in builds:
        if switch and each["function"] not in SWITCHES[switch].values():
            continue
        per_element = round(each.pop("per_element"), 1)
        made = Build(**each)
        case = {"kernel": made.kernel, "warps": made.num_warps, "constants": made.constants}
        variant = f"sm_{made.sm}" + (f", {switch}" if switch else "")
        if made.faults:
            run.add_red(made.function, variant, "; ".join(made.faults), case=case)
            continue
        counts = {name: each[name] for name in COUNTS} | ({"per_element": per_element} if per_element else {})
        run.add_value(made.function, made.instructions, "instructions", variant=variant, case=case, **counts)


def compile_kernels(args: argparse.Namespace, switch: str) -> list[dict[str, Any]]:
    """Runs `kernels.aot` at headline cases, with a switch for its kernels only, and returns its builds."""
    only = args.only
    if switch:
        only = [kernel for kernel in SWITCHES[switch] if only is None or kernel in only]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "builds.json"
        command = [sys.executable, "-m", "ldmseg_fast.kernels.aot", "--headline", "--sass", "--json", path]
        command += ["--jobs", args.jobs, "--sm", *args.sm, *(["--only", *only] if only else [])]
        command += ["--with", switch] if switch else []
        paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, str(ROOT)])}  # its Triton is this process's
        done = subprocess.run([*map(str, command)], cwd=ROOT, env=environment, check=False)
        if not path.is_file():
            raise BenchmarkError(f"instructions: kernels.aot ended with exit code {done.returncode} and wrote nothing")
        return json.loads(path.read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, nargs="+", default=[80, 90], help="compute capabilities, as 80 for 8.0")
    parser.add_argument("--only", nargs="+", choices=KERNELS, help="these kernels only; a quick run")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    args = parse_options(parser, argv)
    run = Run("instructions", quick=args.only is not None, folder=args.out)
    for switch in ("", *(name for name, have in SWITCHES.items() if args.only is None or have.keys() & set(args.only))):
        add_rows(run, compile_kernels(args, switch), switch)
    run.save(args.out)
    return int(bool(run.red))


if __name__ == "__main__":
    sys.exit(run_command(main))
