"""Faults in flight: what cannot be read, what is not finite, what does not fit, what hangs, what dies."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmseg_fast.config import Config, load_config
from ldmseg_fast.distributed.liveness import Interrupt
from ldmseg_fast.errors import DataError, NonFiniteError, OutOfMemory, Stopped
from ldmseg_fast.training import validation
from ldmseg_fast.training.loop import Run, train
from ldmseg_fast.training.run_log import RunLog
from ldmseg_fast.training.stages import AutoencoderStage
from tests.training.helpers import TINY, Job, deepspeed, free_port, hang, losses, metrics, torchrun, train_command
from tests.training.two_ranks import spoil

Settings = Callable[..., Config]


@pytest.fixture
def damaged(scenes: Path, tmp_path: Path) -> Path:
    """The scenes, one training picture of which is cut short."""
    root = tmp_path / "damaged"
    shutil.copytree(scenes, root)
    picture = sorted((root / "train2017").iterdir())[7]
    picture.write_bytes(picture.read_bytes()[:300])
    return root


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_pictures_have_a_budget(
    workers: int, damaged: Path, settings: Settings, capfd: pytest.CaptureFixture
) -> None:
    common = [f"data.root={damaged}", "train.steps=7", f"data.num_workers={workers}"]
    with pytest.raises(
        DataError, match=r"1 of 24 items cannot be read, data.bad_items=0.001 allows 0; .*000000000008.png"
    ):
        train("autoencoder", settings("strict", *common))
    train("autoencoder", settings("lenient", *common, "data.bad_items=0.05"))
    assert capfd.readouterr().err.count("000000000008.png") == 1
    assert len(losses(Path(settings("lenient").output_dir))) == 7


def test_what_replaces_a_picture_does_not_depend_on_workers(damaged: Path, settings: Settings) -> None:
    runs = []
    for workers in (0, 2):
        common = [f"data.root={damaged}", "train.steps=7", "data.bad_items=0.05", f"data.num_workers={workers}"]
        runs.append(losses(train("autoencoder", settings(f"workers-{workers}", *common))))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped(value: float, settings: Settings) -> None:
    run = Run("autoencoder", settings("run"), Interrupt())
    run.take_step()
    weights = [shard.weight.clone() for shard in run.optimizer.shards]
    moments = [shard.moments["exp_avg"].clone() for shard in run.optimizer.shards]
    spoil(run, rank=0, value=value)
    run.take_step()
    for shard, weight, moment in zip(run.optimizer.shards, weights, moments):
        assert torch.equal(shard.weight, weight) and torch.equal(shard.moments["exp_avg"], moment)
    assert run.optimizer.counters()["adam_steps"] == 1 and run.progress.skipped == 1
    record = json.loads((run.folder / "logs" / "nonfinite-0.jsonl").read_text())
    assert record["step"] == 2 and len(record["image_ids"]) == 4
    run.take_step()
    assert run.guard.in_a_row == 0
    assert all(torch.isfinite(shard.weight).all() for shard in run.optimizer.shards)
    run.close()


def test_too_many_such_steps_end_the_run(settings: Settings) -> None:
    run = Run("autoencoder", settings("run", "train.max_skipped=3"), Interrupt())
    run.take_step()
    with pytest.raises(NonFiniteError, match=r"3 steps in a row, up to step 4 .*nonfinite-0.jsonl.*lower"):
        for _ in range(9):
            spoil(run, rank=0)
            run.take_step()
    assert all(torch.isfinite(shard.weight).all() for shard in run.optimizer.shards)
    run.close()


def test_out_of_memory_names_three_settings(settings: Settings) -> None:
    config = settings("run")
    config = replace(config, loss=replace(config.loss, num_points=10**12))  # more than any command line may ask for
    with pytest.raises(OutOfMemory) as caught:
        train("autoencoder", config)
    lines = str(caught.value).splitlines()
    assert "allocate" in lines[0] and "--resume" in lines[0] and len(lines) == 4
    assert all("=" in line and any(digit.isdigit() for digit in line) for line in lines[1:])


@pytest.mark.parametrize(("split", "workers"), [("train2017", 0), ("train2017", 2), ("val2017", 0)])
def test_a_read_that_hangs_is_named(
    split: str, workers: int, scenes: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "hanging"
    shutil.copytree(scenes, root)
    picture = sorted((root / split).iterdir())[3]
    hang(picture, monkeypatch)
    begun = time.monotonic()
    common = [f"data.root={root}", f"data.num_workers={workers}", "data.timeout=3", "train.validate_every=1"]
    with pytest.raises(DataError, match=f"no batch for 3 s: .*{picture.name}.*data.timeout"):
        train("autoencoder", settings("run", *common))
    assert time.monotonic() - begun < 30


def test_a_picture_for_the_grid_that_hangs_is_named(
    scenes: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read a second time, as it was stored, once its map has been predicted."""
    root = tmp_path / "hanging"
    shutil.copytree(scenes, root)
    picture = sorted((root / "val2017").iterdir())[2]
    predict = AutoencoderStage.predict

    def predicted(stage: AutoencoderStage, *arguments: Any) -> Any:
        hang(picture, monkeypatch)
        return predict(stage, *arguments)

    monkeypatch.setattr(AutoencoderStage, "predict", predicted)
    begun = time.monotonic()
    with pytest.raises(DataError, match=f"no batch for 3 s: validation reads .*{picture.name}.*data.timeout"):
        train("autoencoder", settings("run", f"data.root={root}", "data.timeout=3", "train.validate_every=1"))
    assert time.monotonic() - begun < 30


class Unwritable:
    """A picture for which the disk has no room left."""

    def save(self, path: Path, **_: object) -> None:
        path.write_bytes(b"a part of it")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_grid_that_cannot_be_written_does_not_end_the_run(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(validation, "picture_grid", lambda *_: Unwritable())
    folder = train("autoencoder", settings("run", "train.steps=2", "train.validate_every=1"))
    assert "val/pq" in metrics(folder)[-1]
    assert not list((folder / "pictures").iterdir())
    error = capfd.readouterr().err
    assert error.count("step-00000001.png: No space left on device; the run goes on without it") == 1


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.path = Path("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        log.write(1, {"loss": 1.0})
    log.close()


def logged(folder: Path, count: int) -> Callable[[], bool]:
    path = folder / "logs" / "log.jsonl"
    return lambda: path.is_file() and path.read_text().count("\n") >= count


ENDLESS = ["train.steps=100000", "train.save_every=2", "train.log_every=1", "train.schedule=constant"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_process_saves_when_it_is_told_to_stop(
    number: int, scenes: Path, tmp_path: Path, start: Callable[..., Job]
) -> None:
    folder = tmp_path / "run"
    job = start([sys.executable, *train_command("autoencoder", folder, scenes, *ENDLESS, "train.save_every=100000")])
    job.wait_for(logged(folder, 3))
    job.process.send_signal(number)
    assert job.wait(60) == 128 + number
    assert "and saved; go on with --resume" in job.output
    assert (folder / "checkpoints" / "latest").is_file() and (folder / "mask_vae" / "model.safetensors").is_file()
    assert not job.members()


@pytest.mark.parametrize("steps", [8, 2])
def test_a_validation_is_interrupted_and_done_again(
    steps: int, settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """In mid-run and after the last step."""
    common = [f"train.steps={steps}", "train.validate_every=2", "train.save_every=100"]
    whole = train("autoencoder", settings("whole", *common))
    predict, chunks = AutoencoderStage.predict, []

    def interrupted(stage: AutoencoderStage, *arguments: Any) -> Any:
        chunks.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return predict(stage, *arguments)

    monkeypatch.setattr(AutoencoderStage, "predict", interrupted)
    monkeypatch.setattr(validation, "CHUNK", 2)
    with pytest.raises(Stopped, match="at step 2 and saved"):
        train("autoencoder", settings("cut", *common))
    assert len(chunks) == 1 and "validation interrupted" in capfd.readouterr().err
    monkeypatch.undo()
    cut = train("autoencoder", settings("cut", *common), resume=True)
    assert metrics(cut) == metrics(whole) and losses(cut) == losses(whole)
    train("autoencoder", settings("cut", *common), resume=True)
    assert metrics(cut) == metrics(whole)


@pytest.mark.serial
def test_sigterm_to_the_deepspeed_command(scenes: Path, tmp_path: Path, start: Callable[..., Job]) -> None:
    """It dies at once and tells nobody; the ranks notice, save and end."""
    folder = tmp_path / "run"
    settings = [*ENDLESS, "train.save_every=100000", "data.num_workers=1"]
    job = start(deepspeed(2, *train_command("autoencoder", folder, scenes, *settings)))
    job.wait_for(logged(folder, 3))
    job.process.terminate()
    job.wait_until_empty()
    assert (folder / "checkpoints" / "latest").is_file(), job.output


def by_hand(start: Callable[..., Job], *command: Any) -> list[Job]:
    """Two ranks that no launcher looks after."""
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [start([sys.executable, *command], **place, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]


@pytest.mark.serial
@pytest.mark.parametrize(("rank", "number"), [(1, signal.SIGTERM), (0, signal.SIGINT)])
def test_a_signal_to_one_rank_ends_all_alike(
    rank: int, number: int, scenes: Path, tmp_path: Path, start: Callable[..., Job]
) -> None:
    """Both save, say so once and have the signal's exit code; none looks as if the training were done."""
    folder = tmp_path / "run"
    jobs = by_hand(start, *train_command("autoencoder", folder, scenes, *ENDLESS, "train.save_every=100000"))
    jobs[0].wait_for(logged(folder, 3))
    jobs[rank].process.send_signal(number)
    assert [job.wait(60) for job in jobs] == [128 + number] * 2
    said = jobs[0].output + jobs[1].output
    assert said.count(f"stopped by {signal.Signals(number).name} at step") == 1
    assert "model folder:" not in said and "Traceback" not in said
    assert (folder / "checkpoints" / "latest").is_file() and (folder / "mask_vae" / "model.safetensors").is_file()


@pytest.mark.soak
@pytest.mark.parametrize("launcher", [deepspeed, torchrun])
def test_a_signal_to_one_rank_under_a_launcher(
    launcher: Callable, scenes: Path, tmp_path: Path, start: Callable[..., Job]
) -> None:
    folder = tmp_path / "run"
    settings = [*ENDLESS, "train.save_every=100000"]
    job = start(launcher(2, *train_command("autoencoder", folder, scenes, *settings)))
    job.wait_for(logged(folder, 3))
    os.kill(job.ranks()[1], signal.SIGTERM)
    assert job.wait(60) != 0
    job.wait_until_empty()
    assert "stopped by SIGTERM at step" in job.output and "model folder:" not in job.output
    assert (folder / "checkpoints" / "latest").is_file(), job.output


@pytest.mark.serial
def test_a_killed_rank_ends_the_job(scenes: Path, tmp_path: Path, start: Callable[..., Job]) -> None:
    folder = tmp_path / "run"
    job = start(deepspeed(2, *train_command("autoencoder", folder, scenes, *ENDLESS, "data.num_workers=1")))
    job.wait_for(logged(folder, 5))
    os.kill(job.ranks()[1], signal.SIGKILL)
    assert job.wait(60) != 0
    job.wait_until_empty(10)
    step = max(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))
    settings = ["train.threads=1", f"train.steps={step + 2}", f"data.root={scenes}", f"output_dir={folder}"]
    train("autoencoder", load_config(str(TINY), settings), resume=True)
    assert len(losses(folder)) == step + 2


@pytest.mark.soak
@pytest.mark.parametrize("launcher", [deepspeed, torchrun])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("frozen", [False, True])
def test_lost_ranks(
    launcher: Callable,
    rank: int,
    frozen: bool,
    scenes: Path,
    tmp_path: Path,
    start: Callable[..., Job],
    record_property: Callable[[str, object], None],
) -> None:
    """Killed, or stopped so that only its silence shows."""
    folder = tmp_path / "run"
    settings = [*ENDLESS, "data.num_workers=1", "train.peer_timeout=20"]
    job = start(launcher(2, *train_command("autoencoder", folder, scenes, *settings)))
    job.wait_for(logged(folder, 5))
    os.kill(job.ranks()[rank], signal.SIGSTOP if frozen else signal.SIGKILL)
    begun = time.monotonic()
    if frozen:
        while not (job.process.poll() or "silent for 20 s" in job.output) and time.monotonic() - begun < 60:
            time.sleep(0.2)
        assert "silent for 20 s" in job.output
        record_property("seconds_until_noticed", round(time.monotonic() - begun, 1))
    else:
        assert job.wait(60) != 0
        record_property("seconds_until_ended", round(time.monotonic() - begun, 1))
        job.wait_until_empty(10)  # data workers look for their parent every five seconds


@pytest.mark.soak
def test_sigterm_to_every_process(scenes: Path, tmp_path: Path, start: Callable[..., Job]) -> None:
    """As a batch system does it."""
    folder = tmp_path / "run"
    settings = [*ENDLESS, "train.save_every=100000", "data.num_workers=1"]
    job = start(deepspeed(2, *train_command("autoencoder", folder, scenes, *settings)))
    job.wait_for(logged(folder, 3))
    os.killpg(job.process.pid, signal.SIGTERM)
    job.wait(60)
    job.wait_until_empty()
    assert (folder / "checkpoints" / "latest").is_file(), job.output


def test_only_a_second_sigint_after_a_while_stops_at_once() -> None:
    """A launcher sends SIGINT and SIGTERM one after the other, which must not spoil the saving."""
    with Interrupt(patience=0.2) as interrupt:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert interrupt.requested and interrupt.signal == signal.SIGINT
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
