"""Tries launch configurations of the Triton kernels and keeps the fastest.

python -m benchmarks.measuring.kernel_tuning SHARE SHARES [KERNEL ...]    # compiles its share of the candidates
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring.environment import ROOT
from benchmarks.measuring.timing import captured, measure
from ldmseg_fast.files import write_json
from ldmseg_fast.kernels import configs
from ldmseg_fast.kernels.attention.op import FP8_ARCHITECTURE
from ldmseg_fast.kernels.case import Case, all_cases

MOST = 16  # configurations that an entry tries: tuning has minutes


def candidates_of(kernel: str, shape_class: str) -> list[configs.Config]:
    """Returns what tuning tries for an entry of the table, the shipped configuration first, MOST at most."""
    shipped = configs.find_config(kernel, shape_class)
    names = set(shipped.constants)
    others = [c for c in configs.all_candidates().get(kernel, []) if set(c.constants) == names and c != shipped]
    return [shipped, *others[-(MOST - 1) :]]  # the last of a list are those with switches, which no others try


@contextmanager
def using(kernel: str, shape_class: str, config: configs.Config) -> Iterator[None]:
    """Launches `kernel` with `config` for a shape class."""
    table, sm = configs.all_configs()[kernel], configs.table_architecture()
    before = table.get(sm)
    table[sm] = {**(before or {}), shape_class: config}
    try:
        yield
    finally:
        if before is None:
            del table[sm]
        else:
            table[sm] = before


def entries_to_tune(cases: Sequence[Case], device: torch.device) -> Iterator[tuple[Case, tuple[Any, ...], str, str]]:
    """Yields (case, its arguments, kernel, shape class) for every table entry that the cases reach, headlines first."""
    done: set[tuple[str, str]] = set()
    for case in sorted(cases, key=lambda case: not case.headline):
        if case.fp8 and configs.current_architecture() < FP8_ARCHITECTURE:
            continue
        arguments = case.make(device)
        with configs.trace_lookups() as reached:
            case.triton(*arguments)
        for kernel, shape_class in sorted(reached - done):
            done.add((kernel, shape_class))
            yield case, arguments, kernel, shape_class


def compile_candidates(cases: Sequence[Case], share: int, shares: int, device: torch.device) -> int:
    """Launches every `shares`-th candidate once, so that Triton's cache on disk has it, and returns how many."""
    number = launched = 0
    for case, arguments, kernel, shape_class in entries_to_tune(cases, device):
        for config in candidates_of(kernel, shape_class):
            number += 1
            if number % shares != share:
                continue
            launched += 1
            with using(kernel, shape_class, config), suppress(Exception):  # `tune` leaves out what does not compile
                case.triton(*arguments)
    return launched


def compile_in_parallel(cases: Sequence[Case], seconds: float) -> None:
    """Compiles all candidates in processes beside each other, within `seconds`.

    Tuning then measures and does not wait for a compiler.
    """
    end = time.monotonic() + seconds
    shares = max(1, min(12, len(os.sched_getaffinity(0)) - 1))
    kernels = sorted({case.kernel for case in cases})
    command = [sys.executable, "-m", "benchmarks.measuring.kernel_tuning"]
    running = [subprocess.Popen([*command, str(share), str(shares), *kernels], cwd=ROOT) for share in range(shares)]
    try:
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, end - time.monotonic()))
    finally:
        for process in running:
            process.kill()
            process.wait()


def tune(cases: Sequence[Case], path: Path, end: float, device: torch.device) -> int:
    """Times every candidate of every table entry that the cases reach.

    path: gets the best ones, anew after each entry.
    end: of the time, as `time.monotonic` gives it.
    """
    sm = configs.table_architecture()
    best: configs.Table = {}
    for case, arguments, kernel, shape_class in entries_to_tune(cases, device):
        times: list[tuple[float, configs.Config]] = []
        for config in candidates_of(kernel, shape_class):
            if time.monotonic() > end:
                break
            with using(kernel, shape_class, config):
                try:
                    timing = measure({"": captured(lambda: case.triton(*arguments))}, device=device.type, rounds=10)  # noqa: B023
                except Exception:  # out of resources, or a block that the compiler refuses: not a candidate here
                    torch.cuda.synchronize()
                    continue
            times.append((timing[""].median, config))
        if times:
            least, winner = min(times, key=lambda timed: timed[0])
            best.setdefault(kernel, {}).setdefault(sm, {})[shape_class] = winner
            write_json(path, json.loads(configs.dump_configs(best)))
            print(f"{kernel} {shape_class}: {times[0][0]:.4f} -> {least:.4f} ms {winner}", flush=True)
    print(f"saved {path}; use it by {configs.ENVIRONMENT_VARIABLE}={path}" if best else "nothing was tuned")
    return 0


def main() -> None:
    share, shares, *kernels = sys.argv[1:]
    cases = [case for case in all_cases() if not kernels or case.kernel in kernels]
    compile_candidates(cases, int(share), int(shares), torch.device("cuda"))


if __name__ == "__main__":
    main()
