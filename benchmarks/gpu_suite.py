"""Measures what matters on one GPU, in parts of which none can lose another's rows.

    python benchmarks/gpu_suite.py --minutes 9                        # the short plan, in one call
    python benchmarks/gpu_suite.py --plan long --minutes 9 --work W   # as much of the long plan as fits in 9 minutes
    python benchmarks/gpu_suite.py --plan long --minutes 9 --work W --resume    # and on from there

Runs from a checkout with PYTHONPATH=. on a machine with torch, triton and transformers only. It prints what it will do
and when it stops. Each part is a process of its own with its own limit; what fails, is late or disagrees is a red row
with its reason, and the next part begins. Every row is on disk the moment it is measured: `--resume` takes what an
interrupted suite left in `--work`, and measures only what is missing. Writes one result file, gpu-TIME.json, and prints
the targets beside what was measured. Exit code 1 where a row is red. `--quick --device cpu` walks through the same
parts at toy size.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

import torch

from benchmarks.harness import RESULTS, ROOT, BenchmarkError, Run, read_journal, read_results
from benchmarks.measuring.gpu_plan import Part, choose, make_plan
from benchmarks.measuring.options import check_options
from benchmarks.reporting.gpu_targets import format_table
from ldmseg_fast.distributed.ending import run_command
from ldmseg_fast.errors import ArgumentError

CLOSING_SECONDS = 5.0  # for the table and the file
LEAST_SECONDS = 10.0  # under that a part is not begun
TAIL = 1500  # characters of a part's output that are kept
FINAL = ("passed", "failed", "late", "left out")  # what `--resume` does not measure again
PRINTED = ("profile", "ncu")  # parts whose result is what they print
STATE = "state.jsonl"


@dataclass
class Outcome:
    """Holds how a part ended: passed, failed, late (beyond its limit), cut (the suite's time was up), left out."""

    status: str
    seconds: float = 0.0
    output: str = ""
    results: list[dict[str, Any]] = field(default_factory=list)
    checks: dict[str, bool] = field(default_factory=dict)


def run_stage(parts: Sequence[Part], left: float, work: Path) -> list[Outcome]:
    """Runs the parts beside each other, each as a process group that is ended with all its children where it is late.

    left: seconds until the suite ends.
    """
    started = time.monotonic()
    running: list[tuple[Part, Path, Any, Any]] = []
    outcomes: list[Outcome] = []
    try:
        for part in parts:
            out = work / "parts" / re.sub(r"\W+", "-", part.name)
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            minutes = 0.75 * min(part.limit, left) / 60
            command = [word.replace("{minutes}", f"{minutes:.3f}").replace("{out}", str(out)) for word in part.command]
            environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
            log = (out / "log.txt").open("w+", encoding="utf-8", errors="replace")
            try:
                process = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            except OSError as error:
                log.write(str(error))
                process = None
            running.append((part, out, process, log))
        for part, out, process, log in running:
            status = "failed" if process is None else _wait(process, started, part.limit, left)
            log.seek(0)
            output = log.read().replace(str(ROOT), ".").replace(str(work), "WORK")
            kept = output if part.name in PRINTED else output[-TAIL:]
            outcomes.append(_collect(Outcome(status, time.monotonic() - started, kept), out))
    finally:  # also where the suite itself is ended, and for what a finished part has left behind
        for _, _, process, log in running:
            log.close()
            if process is not None and process.returncode is None:
                _end(process)
    return outcomes


def _wait(process: subprocess.Popen, started: float, limit: float, left: float) -> str:
    try:
        return "failed" if process.wait(max(0.1, min(limit, left) - (time.monotonic() - started))) else "passed"
    except subprocess.TimeoutExpired:
        return "late" if limit <= left else "cut"
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _collect(outcome: Outcome, out: Path) -> Outcome:
    """Takes over rows and checks from the part's result files, or from the journals of runs that did not end."""
    for path in sorted(out.glob("*.json*")):
        try:
            record = (read_journal if path.suffix == ".jsonl" else read_results)(path)
        except BenchmarkError as error:
            outcome.output += f"\n{error}"
        else:
            outcome.results += record["results"]
            outcome.checks |= record["checks"]
    return outcome


class Suite:
    """Runs a plan until the time is up. `done` holds how parts ended, also those of earlier calls."""

    def __init__(self, plan: Sequence[Sequence[Part]], work: Path, end: float) -> None:
        self.plan, self.work, self.end = plan, work, end
        self.done: dict[str, Outcome] = {}

    def load(self) -> None:
        """Takes what earlier calls measured, without the half line that a suite that was killed may leave."""
        state = self.work / STATE
        lines = [line for line in state.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        state.write_text("".join(lines), encoding="utf-8")
        for line in lines:
            entry = json.loads(line)
            name = entry.pop("part")
            self.done[name] = Outcome(**entry)

    def missing(self) -> list[list[Part]]:
        """Returns the stages, without the parts that have ended for good."""
        left = [[part for part in stage if self._status(part.name) not in FINAL] for stage in self.plan]
        return [stage for stage in left if stage]

    def _status(self, name: str) -> str:
        return self.done[name].status if name in self.done else ""

    def run(self) -> None:
        """Runs the stages that are missing; each part's outcome is on disk before the next stage begins."""
        for stage in self.missing():
            seconds = self.end - CLOSING_SECONDS - time.monotonic()
            parts, lacking = [], {}
            for part in stage:
                failed = [name for name in part.needs if self._status(name) in ("failed", "late", "left out")]
                waiting = [name for name in part.needs if self._status(name) not in FINAL]
                if failed:
                    lacking[part.name] = Outcome("left out", output=f"without {', '.join(failed)} it says nothing")
                elif seconds < LEAST_SECONDS or waiting:
                    lacking[part.name] = Outcome("cut", output="no time left")
                else:
                    parts.append(part)
            for name, outcome in lacking.items():
                self._keep(name, outcome)
            for part, outcome in zip(parts, run_stage(parts, seconds, self.work)):
                self._keep(part.name, outcome)

    def _keep(self, name: str, outcome: Outcome) -> None:
        self.done[name] = outcome
        with (self.work / STATE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"part": name, **asdict(outcome)}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        red = sum("red" in row for row in outcome.results)
        print(
            f"== {name}: {outcome.status} after {outcome.seconds:.1f} s, {len(outcome.results)} rows, {red} red",
            flush=True,
        )
        if outcome.status in ("failed", "late") or name in PRINTED:
            print(outcome.output, flush=True)

    def fill(self, run: Run) -> None:
        """Gives `run` all rows: the parts' own, and one for each part, red where it did not pass."""
        for name, outcome in self.done.items():
            run.results += outcome.results
            run.checks |= outcome.checks
            if outcome.status == "passed":
                run.add_value("part", outcome.seconds, "s", variant=name, output=outcome.output)
            else:
                reason = f"{outcome.status} after {outcome.seconds:.0f} s"
                run.add_red("part", name, reason, output=outcome.output[-TAIL:])


def print_plan(stages: Sequence[Sequence[Part]], minutes: float) -> None:
    print("It will run, one line after the other:")
    for stage in stages:
        print("  " + ", ".join(f"{part.name} ({part.limit:.0f} s)" for part in stage))
    most = sum(max(part.limit for part in stage) for stage in stages)
    stop = datetime.now().astimezone() + timedelta(minutes=minutes)
    print(f"At most {most / 60:.0f} minutes of work; this call stops at {stop:%H:%M:%S}.", flush=True)


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=["short", "long"], default="short", help="about 9 minutes, or half an hour")
    parser.add_argument("--minutes", type=float, default=9.0, help="the call ends within this time")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts by name, and what they need")
    parser.add_argument("--tune", type=Path, metavar="FILE", help="also tune launch configurations, into FILE")
    parser.add_argument("--work", type=Path, help="folder for what is under way; default a new one, removed at the end")
    parser.add_argument("--resume", action="store_true", help="go on with what --work holds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --quick --device cpu walks through the parts", file=sys.stderr)
        return 1
    check_options(args)
    if args.resume and not (args.work and (args.work / STATE).is_file()):
        raise ArgumentError("--resume: --work names no folder of an unfinished suite")
    if not args.resume and args.work and (args.work / STATE).is_file():
        raise ArgumentError(f"{args.work} holds a suite: add --resume to go on with it, or name another folder")
    run = Run("gpu", quick=args.quick)
    with tempfile.TemporaryDirectory() as scratch:
        work = (args.work or Path(scratch)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        plan = choose(make_plan(args.plan, args.device, args.quick, work, args.tune), args.only)
        suite = Suite(plan, work, started + 60 * args.minutes)
        if args.resume:
            suite.load()
        print_plan(suite.missing(), args.minutes)
        try:
            suite.run()
        finally:
            if suite.done:
                suite.fill(run)
                run.save(args.out)
                print(format_table(run.results))
        missing = [part.name for stage in suite.missing() for part in stage]
        if missing and args.work:
            print(f"not measured yet: {', '.join(missing)}; the same command with --resume goes on")
    return int(bool(run.red))


if __name__ == "__main__":
    sys.exit(run_command(main))
