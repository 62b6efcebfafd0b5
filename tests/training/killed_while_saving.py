"""killed_while_saving.py TRIALS SCENES FOLDER: kill -9 a process that saves without a pause, then resume; repeat.

Each trial is a fork of this process, which has paid for the imports. Every weight of a checkpoint equals its step, so
that a mixture of two would be seen. The last line of the output is JSON: kills, how many of them hit a checkpoint half
written, how many resumed, and how many checkpoints were lost that had been complete.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from ldmseg_fast.config import load_config
from ldmseg_fast.distributed.liveness import Interrupt
from ldmseg_fast.training.loop import Run


def forked(function, *arguments) -> int:
    child = os.fork()
    if child == 0:
        try:
            function(*arguments)
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
    return child


def save_forever(run: Run) -> None:
    if run.checkpoints.steps():
        run.progress = run.checkpoints.load(run.stage, run.optimizer, "autoencoder", print)
    while True:
        run.progress.step += 1
        for shard in run.optimizer.shards:
            shard.weight.fill_(run.progress.step)
        run.checkpoints.save(run.stage, run.optimizer, run.progress)


def check(run: Run, at_least: int) -> None:
    progress = run.checkpoints.load(run.stage, run.optimizer, "autoencoder", print)
    assert progress.step >= at_least, (progress.step, at_least)
    assert all((shard.weight == progress.step).all() for shard in run.optimizer.shards)


def main() -> None:
    trials, scenes, folder = int(sys.argv[1]), *map(Path, sys.argv[2:4])
    torch.set_num_threads(1)
    settings = [f"data.root={scenes}", f"output_dir={folder}", "train.threads=1", "train.keep=2"]
    run = Run("autoencoder", load_config(str(Path(__file__).with_name("tiny.yaml")), settings), Interrupt())
    rng = random.Random(0)
    resumed = unfinished = 0
    for _ in range(trials):
        before = run.checkpoints.steps()
        child = forked(save_forever, run)
        while run.checkpoints.steps()[-1:] <= before[-1:]:  # at least one more, or nothing would be tested
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.15))
        newest = run.checkpoints.steps()[-1]
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        unfinished += any(run.checkpoints.folder.glob(".new-*"))
        resumed += os.waitpid(forked(check, run, newest), 0)[1] == 0
    found = {"kills": trials, "half_written": unfinished, "resumed": resumed, "lost_checkpoints": trials - resumed}
    print(json.dumps(found))
    sys.exit(resumed != trials)


if __name__ == "__main__":
    main()
