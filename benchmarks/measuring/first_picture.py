"""Times the first picture of a process on a CPU, from loading the model to the map, with and without kept packages.

    python -m benchmarks.measuring.first_picture MODEL_DIR PICTURE.npy --backend compile --steps 1 --out MAP.npy

A process of its own measures each, since a process keeps what it has compiled. It prints the milliseconds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.measuring.environment import ROOT
from benchmarks.measuring.result_file import BenchmarkError
from ldmseg_fast.backends.process_settings import CACHE_VARIABLE
from ldmseg_fast.pipeline import LDMSegPipeline

BASELINE = "torch float32"
NOTHING_KEPT, KEPT = "compile float32, nothing kept", "compile float32, packages kept"


def first_pictures(model: Path, picture: Path, steps: int, threads: int, folder: Path, rounds: int) -> dict[str, list]:
    """Runs each variant `rounds` times, in turns: its name to (milliseconds, map int [H, W]) of each process.

    Packages are kept in `folder`, where each round's process with an empty cache leaves them for the next.

    Raises:
        BenchmarkError: a process failed; with the end of what it wrote.
    """
    found: dict[str, list] = {BASELINE: [], NOTHING_KEPT: [], KEPT: []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            for name, results in found.items():
                made = Path(cache) / "map.npy"
                command = [sys.executable, "-m", "benchmarks.measuring.first_picture", model, picture, "--out", made]
                command += ["--backend", name.split()[0], "--steps", steps, "--threads", threads]
                with tempfile.TemporaryDirectory(dir=cache) as inductor:  # empty: packages alone are kept
                    own = {"XDG_CACHE_HOME": cache, CACHE_VARIABLE: inductor, "PYTHONPATH": str(ROOT)}
                    done = subprocess.run(
                        [*map(str, command)],
                        env=os.environ | own,
                        cwd=ROOT,
                        capture_output=True,
                        text=True,
                        check=False,
                    )
                if done.returncode:
                    raise BenchmarkError(f"first picture: {name}: {done.stderr.strip()[-500:]}")
                results.append((float(done.stdout.split()[-1]), np.load(made)))
    return found


def time_first(load: Callable[[], LDMSegPipeline], picture: np.ndarray, steps: int) -> tuple[float, np.ndarray]:
    """Times loading and the first call: (milliseconds, map int [H, W]); picture is uint8 [H, W, 3]."""
    started = time.perf_counter()
    (result,) = load()(picture, steps)
    return 1e3 * (time.perf_counter() - started), result.segmentation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--backend", choices=["torch", "compile"], required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    milliseconds, found = time_first(
        lambda: LDMSegPipeline.from_pretrained(args.model, args.backend, device="cpu", dtype=torch.float32),
        np.load(args.picture),
        args.steps,
    )
    np.save(args.out, found)
    print(milliseconds)


if __name__ == "__main__":
    main()
