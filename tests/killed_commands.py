"""killed_commands.py COMMAND KILLS FOLDER: kill -9 a command at random moments, start it again, and compare the end.

COMMAND is one of COMMANDS below. Each start is a fork of this process, which has paid for the imports. After each kill
every file is looked at, and what an earlier start had completed must still be there. A start that goes through must
leave, bit for bit, what a run without kills left; then all begins anew. Of several ranks every second time one alone is
killed, and the others must end by themselves. The last line of the output is JSON: kills, starts that went through,
files lost, half files, leftovers, differences, and ranks that did not end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import deepspeed  # noqa: F401  (imported once, for all forks)
import torch
from PIL import Image

from ldmseg_fast import cli
from ldmseg_fast.checkpoints.tensors import load_weights, save_weights
from ldmseg_fast.config import ImageEncoderConfig
from ldmseg_fast.data import latent_cache
from ldmseg_fast.data.scenes import write_scenes
from ldmseg_fast.models.image_vae import TaesdEncoder
from ldmseg_fast.train import main as train
from ldmseg_fast.training import loop  # noqa: F401  (imported once, for all forks)
from tests.conftest import make_model

TINY = Path(__file__).parent / "training" / "tiny.yaml"
TEMPORARY = (".ldmseg", ".import-", ".new-", ".old-")
MANIFEST = "manifest.json"
PATIENCE = 15.0  # seconds; the machine may be busy
Main = Callable[[list[str]], int]


@dataclass
class Campaign:
    """Holds what a campaign found.

    Attributes:
        kills: of commands at work.
        ends: starts that went through.
        lost: complete files that were gone after a kill.
        half: files that cannot be read, but for temporary ones.
        left: temporary files after the last start.
        different: files that are not those of a run without kills.
        stuck: ranks that did not end within PATIENCE seconds after another was killed.
    """

    kills: int = 0
    ends: int = 0
    lost: list[str] = field(default_factory=list)
    half: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    stuck: int = 0

    def look_at_kill(self, folder: Path, complete: set[str]) -> set[str]:
        """Looks for half and lost files; `complete` were there before. Returns which are there now."""
        there = {name: path for name, path in files(folder).items() if not is_temporary(name)}
        self.half += [name for name, path in there.items() if is_half(path)]
        kept = {name for name in complete if not name.startswith("checkpoints/step-")}
        self.lost += sorted(kept - there.keys())
        newest, now = (max((n for n in names if n.endswith(MANIFEST)), default="") for names in (complete, there))
        self.lost += [newest] if newest > now else []
        return set(there)

    def look_at_end(self, whole: Path, folder: Path, skipped: tuple[str, ...]) -> None:
        """Compares what a start that went through has left with what a run without kills has."""
        self.ends += 1
        self.left += [name for name in files(folder) if is_temporary(name)]
        first, second = compared(whole, skipped), compared(folder, skipped)
        self.different += sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))

    def counts(self) -> dict[str, int]:
        return {key: value if isinstance(value, int) else len(value) for key, value in vars(self).items()}


def forked(main: Main, arguments: list[str], log: Path, **environment: str) -> int:
    """Starts a command in a fork and returns its process id."""
    child = os.fork()
    if child:
        return child
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    code = 99
    try:
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def start(main: Main, arguments: list[str], log: Path, ranks: int) -> list[int]:
    """Starts a command, or each of its ranks, in a fork."""
    if ranks == 1:
        return [forked(main, arguments, log)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [forked(main, arguments, log, **place, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(ranks)]


def finish(processes: list[int], log: Path) -> float:
    """Waits for a command and returns how long it took from now on."""
    begun = time.monotonic()
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    assert set(codes) == {0}, (codes, log.read_text()[-3000:])
    return time.monotonic() - begun


def kill(processes: list[int], rng: random.Random) -> bool:
    """Kills a command's processes in any order; tells whether one of them was at work."""
    rng.shuffle(processes)
    at_work = False
    for process in processes:
        ended, _ = os.waitpid(process, os.WNOHANG)
        if not ended:
            at_work = True
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    return at_work


def kill_one(processes: list[int], rng: random.Random) -> tuple[bool, int]:
    """Kills one rank and waits for the others; tells whether it was at work, and how many did not end by themselves."""
    rng.shuffle(processes)
    ended, _ = os.waitpid(processes[0], os.WNOHANG)
    if ended:  # it has come to its end, and so do the others
        for process in processes[1:]:
            os.waitpid(process, 0)
        return False, 0
    os.kill(processes[0], signal.SIGKILL)
    os.waitpid(processes[0], 0)
    end, left = time.monotonic() + PATIENCE, processes[1:]
    while left and time.monotonic() < end:
        left = [process for process in left if not os.waitpid(process, os.WNOHANG)[0]]
        time.sleep(0.05)
    for process in left:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return True, len(left)


def files(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def is_temporary(name: str) -> bool:
    return any(part.startswith(TEMPORARY) for part in Path(name).parts)


def is_half(path: Path) -> bool:
    """Whether a file cannot be read as what its name says."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".safetensors":
            load_weights(path)
        elif path.suffix == ".html":
            return not path.read_text().endswith("</html>\n")
        elif path.suffix == ".csv":
            return not path.read_text().endswith("\n")
    except Exception:
        return True
    return False


def content(path: Path) -> str:
    """A digest of what must be equal: without times, process numbers and the folder's own name."""
    if path.name == "log.jsonl":
        records = [json.loads(line) for line in path.read_text().splitlines()]
        wanted = ("step", "loss", "lr", "val/pq", "val/sq", "val/rq")
        text = json.dumps([{key: record[key] for key in wanted if key in record} for record in records])
    elif path.suffix in (".json", ".jsonl"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        text = json.dumps([without_times(json.loads(line)) for line in lines])
    else:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return hashlib.sha256(text.encode()).hexdigest()


def without_times(value: object) -> object:
    if isinstance(value, dict):
        return {
            key: without_times(inner) for key, inner in value.items() if "seconds" not in key and key != "output_dir"
        }
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def compared(folder: Path, skipped: tuple[str, ...]) -> dict[str, str]:
    return {
        name: content(path)
        for name, path in files(folder).items()
        if not any(name == each or name.startswith(each) for each in skipped)
    }


# what hangs on times and on the number of starts, or names the folder
OF_STARTS = ("logs/starts.jsonl", "logs/tensorboard", "settings.txt", "config.json", "README.md", "best/README.md")


def refused_when_there(arguments: list[str]) -> int:
    """Makes a split; one that is there is refused, which is no fault after a kill."""
    out = Path(arguments[2] if arguments[1] == "merge" else arguments[4])
    done = (out / "annotations" / "panoptic_train2017.json").is_file()
    code = cli.main(arguments)
    return 0 if done and code == 2 else code


class Commands:
    """Prepares a command: its function, its arguments for an output folder, and what need not be equal there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scenes = write_scenes(folder / "scenes", 24, 32, 0, workers=1, version=1)
        self.results = self.scenes / "annotations" / "panoptic_val2017.json"

    def train(self) -> tuple[Main, Callable[[Path], list[str]], tuple[str, ...]]:
        def arguments(out: Path) -> list[str]:
            resume = ["--resume"] if list(out.glob("checkpoints/step-*/manifest.json")) else []
            settings = ["train.steps=12", "train.save_every=2", "train.validate_every=4", "train.keep_best=1"]
            settings += ["train.keep=3", "train.threads=1", "train.peer_timeout=10"]
            settings += [f"data.root={self.scenes}", f"output_dir={out}"]
            return ["autoencoder", "--config", str(TINY), *resume, *settings]

        # the wall time in state.json is in its digest
        return train, arguments, (*OF_STARTS, *(f"checkpoints/step-{step:08d}/manifest.json" for step in range(13)))

    def evaluate(self) -> tuple[Main, Callable[[Path], list[str]], tuple[str, ...]]:
        model = make_model(self.folder / "model")

        def arguments(out: Path) -> list[str]:
            files = ["--out", out / "results", "--json", out / "x.json", "--page", out / "x.html"]
            options = ["--instances", out / "i.json", "--steps", 1, "--batch-size", 2, "--worst", 2, "--random", 2]
            return list(map(str, ["evaluate", model, "--data", self.scenes, *files, *options]))

        return cli.main, arguments, ()

    def predict(self) -> tuple[Main, Callable[[Path], list[str]], tuple[str, ...]]:
        model = make_model(self.folder / "model")
        return (
            cli.main,
            lambda out: list(
                map(str, ["predict", model, self.scenes / "train2017", "--out", out, "--steps", 1, "--batch-size", 2])
            ),
            (),
        )

    def cache(self) -> tuple[Main, Callable[[Path], list[str]], tuple[str, ...]]:
        latent_cache.PER_SHARD = 3
        torch.manual_seed(3)
        encoder = TaesdEncoder(ImageEncoderConfig(kind="taesd"))
        path = self.folder / "taesd.safetensors"
        save_weights({key.removeprefix("layers."): value for key, value in encoder.state_dict().items()}, path)
        fixed = ["data", "cache", self.scenes, "--image-vae", path, "--size", 32, "--workers", 0, "--batch-size", 1]
        return cli.main, lambda out: list(map(str, [*fixed, "--out", out])), ()

    def merge(self) -> tuple[Main, Callable[[Path], list[str]], tuple[str, ...]]:
        sources = [f"{self.scenes}:train2017", f"{self.scenes}:val2017"]
        return refused_when_there, lambda out: ["data", "merge", str(out), *sources], ()

    def imports(self) -> tuple[Main, Callable[[Path], list[str]], tuple[str, ...]]:
        fixed = ["data", "import", "coco-panoptic", str(self.scenes)]
        return refused_when_there, lambda out: [*fixed, str(out), "--split", "train2017"], ()

    def exports(self) -> tuple[Main, Callable[[Path], list[str]], tuple[str, ...]]:
        fixed = ["data", "export", "coco-panoptic", str(self.scenes)]
        return refused_when_there, lambda out: [*fixed, str(out), "--split", "train2017"], ()

    def pq(self) -> tuple[Main, Callable[[Path], list[str]], tuple[str, ...]]:
        maps = self.scenes / "panoptic_val2017"
        given = [self.results, self.results, "--gt-folder", maps, "--pred-folder", maps, "--worst", 4, "--random", 4]

        def arguments(out: Path) -> list[str]:
            files = ["--json", out / "x.json", "--csv", out / "x.csv", "--page", out / "x.html"]
            return list(map(str, ["pq", *given, *files]))

        return cli.main, arguments, ()


# name -> method of `Commands`, ranks
COMMANDS = {"train": ("train", 1), "train-2-ranks": ("train", 2), "predict-2-ranks": ("predict", 2)} | {
    name: (name, 1) for name in ("evaluate", "predict", "cache", "merge", "imports", "exports", "pq")
}


def campaign(name: str, kills: int, folder: Path) -> Campaign:
    method, ranks = COMMANDS[name]
    main, arguments, skipped = getattr(Commands(folder), method)()
    log, whole, killed = folder / "log.txt", folder / "whole", folder / "killed"
    seconds = finish(start(main, arguments(whole), log, ranks), log)
    found, rng = Campaign(), random.Random(name)
    complete: set[str] = set()
    while found.kills < kills:
        processes = start(main, arguments(killed), log, ranks)
        time.sleep(rng.uniform(0.0, seconds))
        if name == "predict-2-ranks" and rng.random() < 0.5:
            at_work, stuck = kill_one(processes, rng)
            found.stuck += stuck
        else:
            at_work = kill(processes, rng)
        if not at_work:  # it had come to its end, which is looked at; then all begins anew
            found.look_at_end(whole, killed, skipped)
            shutil.rmtree(killed)
            complete, seconds = set(), 0.9 * seconds
            continue
        found.kills += 1
        complete = found.look_at_kill(killed, complete)
    finish(start(main, arguments(killed), log, ranks), log)
    found.look_at_end(whole, killed, skipped)
    return found


def main() -> int:
    name, kills, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(parents=True)
    found = campaign(name, kills, folder)
    print(found)
    print(json.dumps(found.counts()))
    return int(bool(found.lost or found.half or found.left or found.different or found.stuck))


if __name__ == "__main__":
    sys.exit(main())
