"""Measures what matters on one GPU within a few minutes: python benchmarks/gpu_suite.py --minutes 9

Runs from a checkout with PYTHONPATH=. on a machine with torch, triton and transformers only. The parts come in order of
value; each is a process of its own with a share of what is left of the time, and what fails or is late is named and
does not stop the others. Writes one result file, gpu-TIME.json, and prints the targets beside what was measured.
`--quick --device cpu` walks through the same parts at toy size.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

from benchmarks.harness import RESULTS, ROOT, BenchmarkError, Run, read_results
from benchmarks.reporting.gpu_targets import format_table
from ldmseg_fast.distributed.ending import run_command

CLOSING_SECONDS = 5.0  # for the table and the file
LEAST_SECONDS = 10.0  # under that a part is not begun
TAIL = 1500  # characters of a part's output that are kept


@dataclass(frozen=True)
class Part:
    """`command` may hold {minutes}: three quarters of the part's limit, the rest being for imports and the last call.
    `share`: of the time left, at most."""

    name: str
    command: tuple[str, ...]
    share: float


@dataclass(frozen=True)
class Outcome:
    status: str  # "passed", "failed", "late", "no time left"
    seconds: float
    output: str


def script(name: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments))


def make_parts(device: str, quick: bool, model: Path, out: Path) -> list[Part]:
    """Returns the suite, most valuable part first; the parts after "random weights" read `model`, which it writes."""
    preset = "tiny" if quick else "coco"
    common = ("--model", model, "--device", device, "--out", out, "--minutes", "{minutes}", "--sizes", "480x640")
    variants = ["torch float32"] if device == "cpu" else ["torch bfloat16", "torch bfloat16, graph", "compile bfloat16"]
    latency = (*(["--quick"] if quick else []), "--variants", *variants, "plain torch, compile", "diffusers, compile")
    # the kernels' tests run first and in parallel; where they are red or late, no kernel is timed
    tests = () if importlib.util.find_spec("pytest") and not quick else ("--no-tests",)
    steps, batches = ((2,), (1,)) if quick else ((50, 4, 1), (1, 16))
    training = ("--config", preset, "--no-zero", "--quick", "--minutes", "{minutes}", "--out", out)
    return [
        Part("kernels", script("bench_kernels", "--quick", *tests, "--minutes", "{minutes}", "--out", out), 0.45),
        Part("random weights", script("peers.random_model", "--preset", preset, "--out", model), 0.5),
        Part("UNet step", script("bench_latency", *common, *latency, "--parts", "step", "--batch", *batches), 0.4),
        Part(
            "whole image",
            script("bench_latency", *common, *latency, "--parts", "whole", "stages", "--batch", 1, "--steps", *steps),
            0.5,
        ),
        Part("training step", script("bench_training", *training), 0.7),
        Part("profile", script("profile_loop", "--model", model, "--device", device), 1.0),
    ]


def run_part(part: Part, seconds: float) -> Outcome:
    """Runs the part as a process group of its own, ended with all its children where it is late."""
    command = [word.replace("{minutes}", f"{0.75 * seconds / 60:.3f}") for word in part.command]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return Outcome("failed", 0.0, str(error))
        try:
            status = "failed" if process.wait(seconds) else "passed"
        except subprocess.TimeoutExpired:
            status = "late"
        finally:  # also where the suite itself is ended, and for what a finished part has left behind
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        output = log.read().replace(str(ROOT), ".")
    return Outcome(status, time.monotonic() - started, output[-TAIL:] if part.name != "profile" else output)


def run_suite(run: Run, parts: Sequence[Part], out: Path, end: float) -> None:
    """Runs the parts, and takes over the rows and checks of every result file that they leave in `out`."""
    for part in parts:
        left = end - CLOSING_SECONDS - time.monotonic()
        seconds = max(part.share * left, min(left, LEAST_SECONDS))
        outcome = run_part(part, seconds) if left >= LEAST_SECONDS else Outcome("no time left", 0.0, "")
        rows = 0
        for path in sorted(out.glob("*.json")):
            try:
                record = read_results(path)
            except BenchmarkError as error:  # half a file of a part that was ended
                print(error)
            else:
                run.results += record["results"]
                run.checks |= record["checks"]
                rows += len(record["results"])
            path.unlink()
        print(f"== {part.name}: {outcome.status} after {outcome.seconds:.1f} s, {rows} rows")
        if outcome.status in ("failed", "late") or part.name == "profile":
            print(outcome.output)
        run.add_value("part", outcome.seconds, "s", variant=part.name, status=outcome.status, output=outcome.output)


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="the suite ends within this time")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts by name")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --quick --device cpu walks through the parts", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside; what was measured is kept"))
    run = Run("gpu", quick=args.quick)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "results"
        out.mkdir()
        parts: list[Part] = make_parts(args.device, args.quick, Path(scratch) / "model-random-weights", out)
        if args.only:
            parts = [part for part in parts if part.name in (*args.only, "random weights")]
        try:
            run_suite(run, parts, out, started + 60 * args.minutes)
        finally:
            if run.results:
                close(run, args.out)
    return 0


def close(run: Run, out: Path) -> None:
    """Writes the file first, then prints the table."""
    run.save(out)
    print(format_table(run.results))
    outcomes: dict[str, Any] = {row["variant"]: row["status"] for row in run.results if row["name"] == "part"}
    print(json.dumps(outcomes))


if __name__ == "__main__":
    sys.exit(run_command(main))
