"""Memory per rank under DeepSpeed ZeRO 0-3, measured on two ranks beside the formula of `training.estimate`.

`python -m benchmarks.measuring.zero_memory PRESET FOLDER ZERO_STAGE` is one rank of it, under a launcher.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring.environment import ROOT
from benchmarks.measuring.result_file import Run as Record
from benchmarks.measuring.training_parts import settings
from ldmseg_fast import distributed
from ldmseg_fast.config import Config, load_config
from ldmseg_fast.distributed.ending import run_command
from ldmseg_fast.distributed.liveness import Interrupt
from ldmseg_fast.training.estimate import Counts, count_parameters, state_memory
from ldmseg_fast.training.launch import free_port
from ldmseg_fast.training.loop import Run

RANKS = 2
# 31 M parameters on 8x8 latents: seconds a step on a CPU, and large beside everything else that a process holds
ZERO_MODEL = ["unet.block_out_channels=64,192,384", "unet.in_channels=12", "train.batch_size=2"]


def live_bytes() -> int:
    """Returns the bytes of all tensors that this process holds, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure_rank(preset: str, folder: Path, zero_stage: int) -> None:
    """One rank: builds the run, takes steps, and writes what it holds when the gradients are reduced."""
    distributed.start()
    config = settings(preset, folder, *ZERO_MODEL, f"train.zero_stage={zero_stage}", "train.precision=fp32")
    config = replace(config, output_dir=str(folder / f"zero-{zero_stage}"))
    before = live_bytes()
    run = Run("diffusion", config, Interrupt())
    held: list[int] = []
    update = run.optimizer._update

    def watched_update() -> Any:
        held.append(live_bytes() - before)
        return update()

    run.optimizer._update = watched_update  # type: ignore[method-assign]
    run.take_step()
    run.take_step()
    values = distributed.gather_objects(max(held))
    if distributed.is_main():
        (folder / f"zero-{zero_stage}.json").write_text(json.dumps(values))
    run.close()
    distributed.stop()


def held_when_reduced(counts: Counts, config: Config, zero_stage: int) -> float:
    """Returns the formula's share at that moment: gradients are cut by then, and buffers freed but at stage 3."""
    memory = state_memory(counts, config, RANKS, zero_stage, on_gpu=False)
    gradients = memory.gradients / RANKS if zero_stage == 1 else memory.gradients
    buffers = memory.buffers if zero_stage == 3 else 0.0
    return memory.weights + memory.optimizer + memory.averages + memory.frozen + gradients + buffers


def bench_zero(record: Record, preset: str, folder: Path) -> None:
    """Adds memory per rank at two ranks beside the formula, which then tells what 8 and 64 ranks need.

    Raises:
        BenchmarkError: a run of two ranks failed, or its memory is 5 % off the formula.
    """
    config = settings(preset, folder, *ZERO_MODEL)
    counts = count_parameters("diffusion", config)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(RANKS), "--master_port"]
    for zero_stage in range(4):
        command = [*launcher, str(free_port()), "--module", __spec__.name, preset, str(folder), str(zero_stage)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        result = folder / f"zero-{zero_stage}.json"
        record.check(f"ZeRO {zero_stage} ran on {RANKS} ranks", done.returncode == 0 and result.is_file())
        measured = max(json.loads(result.read_text())) / 2**20
        expected = held_when_reduced(counts, config, zero_stage) / 2**20
        case = {"zero": zero_stage, "ranks": RANKS, "parameters": counts.trainable}
        record.add_value("memory per rank", measured, "MiB", case=case, variant="measured", expected=expected)
        record.check(f"ZeRO {zero_stage}: the formula is within 5 %", abs(measured / expected - 1) < 0.05)
    full = load_config("coco")
    counts = count_parameters("diffusion", full)
    for zero_stage in range(4):
        for ranks in (1, 8, 64):
            memory = state_memory(counts, full, ranks, zero_stage).device / 2**30
            case = {"zero": zero_stage, "ranks": ranks, "parameters": counts.trainable}
            record.add_value("memory per rank, full model", memory, "GiB", case=case, variant="formula")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=["tiny", "coco"])
    parser.add_argument("folder", type=Path, help="what `training_parts` wrote, and where the result goes")
    parser.add_argument("zero_stage", type=int, choices=range(4))
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    measure_rank(args.preset, args.folder, args.zero_stage)


if __name__ == "__main__":
    sys.exit(run_command(main))
