"""Counts pictures a second of `ldmseg predict` in several processes on one machine, and how they share uneven work."""

from __future__ import annotations

import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.harness import ROOT, BenchmarkError, Run
from ldmseg_fast.data.scenes import generate_scene

UNEVEN = ((1536, 2048), (192, 256))  # sizes that take turns: without sharing one of two processes gets all the large
_RATE = re.compile(r"(\d+) pictures in ([\d.]+) s")


def write_uneven(folder: Path, count: int, sizes: Sequence[tuple[int, int]] = UNEVEN) -> list[Path]:
    """Writes generated scenes as JPEGs, whose sizes (H, W) take turns."""
    folder.mkdir()
    for index in range(count):
        height, width = sizes[index % len(sizes)]
        rgb = generate_scene(256, 0, index, version=1)[0]
        rgb = np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.BILINEAR))
        Image.fromarray(rgb).save(folder / f"{index:06d}.jpg", quality=95)
    return sorted(folder.iterdir())


def predict_seconds(options: Sequence[str], inputs: Sequence[Sequence[str]], outs: Sequence[Path], ranks: int) -> float:
    """Runs `ldmseg predict`, and returns the seconds of work of the slowest start, without imports and loading.

    Args:
        options: of the command, behind its inputs.
        inputs: of each start.
        outs: of each start, made anew.
        ranks: of each start, on this machine; starts and ranks share its cores.

    Raises:
        BenchmarkError: a process fails.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // (ranks * len(inputs)))
    started: list[list[subprocess.Popen]] = []
    for given, out in zip(inputs, outs):
        shutil.rmtree(out, ignore_errors=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        common = os.environ | {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        words = [sys.executable, "-m", "ldmseg_fast.cli", "predict", *options, *given, "--out", str(out)]
        started.append(
            [
                subprocess.Popen(
                    [*words, "--threads", str(threads)],
                    env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                for rank in range(ranks)
            ]
        )
    seconds = []
    for processes in started:
        said = [process.communicate() for process in processes]
        found = _RATE.search(said[0][0])
        if any(process.returncode for process in processes) or found is None:
            raise BenchmarkError(f"predict failed: {''.join(error for _, error in said)[-2000:]}")
        seconds.append(float(found[2]))
    return max(seconds)


def contents(folders: Sequence[Path]) -> dict[str, bytes]:
    """Reads all results of some folders by name."""
    return {path.name: path.read_bytes() for folder in folders for path in folder.iterdir()}


def measure_processes(
    run: Run, model: Path, case: dict[str, object], scratch: Path, counts: Sequence[int], images: int, minutes: float
) -> None:
    """Adds rows of pictures a second for each number of processes, and of static beside dynamic sharing.

    There are at most five rounds, and no round begins that would end after `minutes`; the first always does.
    """
    steps, batch = str(case["steps"]), str(case["batch"])
    options = [str(model), "--steps", steps, "--batch-size", batch]
    files = write_uneven(scratch / "uneven", images)
    even = scratch / "even"
    write_uneven(even, images, ((480, 640),))
    seconds: dict[str, list[float]] = {}
    started = time.monotonic()
    for done in range(5):  # they take turns, so that a load on the machine hits all
        if done and (time.monotonic() - started) * (done + 1) / done > 60 * minutes:
            break
        for count in counts:
            name = f"{count} processes"
            taken = predict_seconds(options, [[str(even)]], [scratch / f"out-{count}"], count)
            seconds.setdefault(name, []).append(taken)
        halves = [[str(file) for file in files[half::2]] for half in range(2)]
        outs = [scratch / f"static-{half}" for half in range(2)]
        seconds.setdefault("static", []).append(predict_seconds(options, halves, outs, 1))
        dynamic = predict_seconds(options, [[str(scratch / "uneven")]], [scratch / "dynamic"], 2)
        seconds.setdefault("dynamic", []).append(dynamic)
    first = contents([scratch / f"out-{counts[0]}"])
    for count in counts[1:]:
        same = contents([scratch / f"out-{count}"]) == first
        run.check(f"{count} processes write the files of {counts[0]}", same)
    run.check("both ways write as many files", contents(outs).keys() == contents([scratch / "dynamic"]).keys())
    case = {key: value for key, value in case.items() if key != "size"} | {"images": images}
    for name, taken_all in seconds.items():
        rate = images / statistics.median(taken_all)
        if name.endswith("processes"):
            title, more = "pictures per second of processes", {"size": "480x640"}
        else:
            title, more = "uneven pictures in two processes", {"sizes": "1536x2048 and 192x256"}
        spread = max(taken_all) / min(taken_all)
        run.add_value(title, rate, "images/s", case=case | more, variant=name, spread=spread, rounds=len(taken_all))
