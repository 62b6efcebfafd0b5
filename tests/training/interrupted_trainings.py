"""interrupted_trainings.py memory|disk COUNT FOLDER SCENES: a training that runs out of memory or disk again and again.

Memory: one of two ranks is killed in a step, as the kernel does when there is no memory left, or is refused memory, by
turns; which rank and which step is by chance. Disk: FOLDER is a small disk, of which a file leaves little or
nothing free. After each end the other rank must have ended, every file must be whole, and the newest checkpoint still
be there. Then the training goes on. At last losses and weights must be, bit for bit, those of a training that nothing
has disturbed. The last line of the output is JSON with what was counted.

Each start is a fork of this process, which has paid for the imports.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import deepspeed  # noqa: F401  (imported once, for all forks)
import torch

from ldmseg_fast.train import main as train
from ldmseg_fast.training import disk, loop
from tests.killed_commands import files, finish, is_half, is_temporary, start

TINY = Path(__file__).with_name("tiny.yaml")
PATIENCE = 300.0  # seconds for an end; the machine may be busy
TOO_MUCH = 2**50  # bytes
BALLAST = "ballast"


def arguments(folder: Path, scenes: Path, steps: int, *more: str) -> list[str]:
    """The command line of a training to `steps`, which goes on with what there is."""
    resume = ["--resume"] if newest(folder) else []
    fixed = [f"data.root={scenes}", f"output_dir={folder}", f"train.steps={steps}", "data.val_limit=1"]
    often = ["train.save_every=2", "train.log_every=1", "train.schedule=constant", "train.threads=1", "train.keep=2"]
    return ["autoencoder", "--config", str(TINY), *resume, *fixed, *often, "train.peer_timeout=60", *more]


def newest(folder: Path) -> int:
    """The step of the newest whole checkpoint; 0 without one."""
    found = [int(path.parent.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*/manifest.json")]
    return max(found, default=0)


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "logs" / "log.jsonl").read_text().splitlines()
    return [(record["step"], record["loss"]) for record in map(json.loads, lines) if "loss" in record]


def ends(processes: list[int]) -> list[int | None]:
    """Exit codes of processes; None of one that did not end, which is killed."""
    end, codes = time.monotonic() + PATIENCE, dict.fromkeys(processes)
    while None in codes.values() and time.monotonic() < end:
        for process in [process for process, code in codes.items() if code is None]:
            ended, status = os.waitpid(process, os.WNOHANG)
            codes[process] = os.waitstatus_to_exitcode(status) if ended else None
        time.sleep(0.05)
    for process in [process for process, code in codes.items() if code is None]:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return list(codes.values())


def without_memory(victim: int, step: int, killed: bool) -> Callable[[list[str]], int]:
    """A training whose rank `victim` gets no memory in its `step`-th step of this start."""

    def main(words: list[str]) -> int:
        take_step, taken = loop.Run.take_step, Counter[str]()

        def short_of_memory(run: loop.Run) -> dict[str, torch.Tensor]:
            taken["steps"] += 1
            if taken["steps"] == step and killed:
                os.kill(os.getpid(), signal.SIGKILL)
            elif taken["steps"] == step:
                torch.empty(TOO_MUCH, dtype=torch.uint8)
            return take_step(run)

        if os.environ["RANK"] == str(victim):
            loop.Run.take_step = short_of_memory  # type: ignore[method-assign]
        return train(words)

    return main


def filled_meanwhile(words: list[str]) -> int:
    """A training whose disk was large enough when it was asked."""
    disk.disk_need = lambda *_: disk.DiskNeed(0, 1, 0, -disk.SLACK)  # type: ignore[assignment]
    return train(words)


def look(folder: Path, before: int, found: Counter[str]) -> None:
    """Looks for half files and a checkpoint that is gone."""
    found["half"] += sum(is_half(path) for name, path in files(folder).items() if not is_temporary(name))
    found["lost"] += newest(folder) < before


def memory(count: int, folder: Path, scenes: Path) -> Counter[str]:
    """Runs out of memory `count` times on one of two ranks, which is killed first, then refused memory, and so on."""
    found, rng, log, run = Counter[str](lost=0, half=0, stuck=0), random.Random(0), folder / "log.txt", folder / "run"
    for number in range(count):
        before, said = newest(run), len(log.read_text()) if log.exists() else 0
        main = without_memory(rng.randrange(2), rng.randint(1, 5), killed=number % 2 == 0)
        codes = ends(start(main, arguments(run, scenes, before + 100), log, 2))
        assert 0 not in codes, log.read_text()[-3000:]
        found["killed" if -signal.SIGKILL in codes else "refused"] += 1
        found["stuck"] += codes.count(None)
        text = log.read_text()[said:]
        named = "out of memory (" if -signal.SIGKILL not in codes else " has gone"
        found["named"] += named in text
        look(run, before, found)
    return finished(run, scenes, log, 2, found)


def full_disk(count: int, folder: Path, scenes: Path) -> Counter[str]:
    """Fills the disk `count` times."""
    found, rng, run = Counter[str](lost=0, half=0, stuck=0), random.Random(0), folder / "run"
    log = scenes.parent / "log.txt"  # on another disk
    for _ in range(count):
        finish(start(train, arguments(run, scenes, newest(run) + 2, "train.keep=1"), log, 1), log)
        before, said = newest(run), len(log.read_text())
        left = rng.randrange(1_000_000)
        (folder / BALLAST).write_bytes(bytes(max(shutil.disk_usage(folder).free - left, 0)))
        codes = ends(start(filled_meanwhile, arguments(run, scenes, before + 100, "train.keep=50"), log, 1))
        text = log.read_text()[said:]
        assert 0 not in codes, text[-3000:]
        found["filled"] += 1
        found["stuck"] += codes.count(None)
        found["named"] += bool(re.search(r"error: .*No space left on device", text))
        (folder / BALLAST).unlink()
        look(run, before, found)
    return finished(run, scenes, log, 1, found)


def finished(run: Path, scenes: Path, log: Path, ranks: int, found: Counter[str]) -> Counter[str]:
    """Goes on to an end, undisturbed, and compares with a training that was never disturbed."""
    steps, whole = newest(run) + 2, scenes.parent / f"whole-{run.parent.name}"
    for folder in (run, whole):
        finish(start(train, arguments(folder, scenes, steps, "train.keep=1"), log, ranks), log)
    found["different"] = int(losses(run) != losses(whole))
    for path in whole.glob("*/model.safetensors"):
        found["different"] += path.read_bytes() != (run / path.relative_to(whole)).read_bytes()
    found["steps"] = steps
    found["left"] = sum(map(is_temporary, files(run)))
    return found


def main() -> int:
    mode, count, folder, scenes = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    found = {"memory": memory, "disk": full_disk}[mode](count, folder, scenes)
    print(json.dumps(found))
    return int(any(found[key] for key in ("lost", "half", "stuck", "different", "left")) or found["named"] != count)


if __name__ == "__main__":
    sys.exit(main())
