"""The table of runs, and the logs that it and the viewers read."""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from ldmseg_fast.commands.runs import add_arguments, find_runs, format_table, run
from ldmseg_fast.config import Config
from ldmseg_fast.errors import ConfigError, Stopped
from ldmseg_fast.training.loop import Run, train
from ldmseg_fast.training.run_log import RunLog


def test_runs(
    settings: Callable[..., Config],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = ["train.validate_every=2", "data.val_limit=2"]
    train("autoencoder", settings("group/first", *short, "train.steps=4"))
    with monkeypatch.context() as patch:
        take_step = Run.take_step
        patch.setattr(Run, "take_step", lambda self: (signal.raise_signal(signal.SIGTERM), take_step(self))[1])
        with pytest.raises(Stopped, match="SIGTERM at step 1"):
            train("autoencoder", settings("second", *short, "train.steps=3"))
    log = tmp_path / "group" / "first" / "logs" / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 5, "lo')  # a run that was killed
    first, second = find_runs(tmp_path)
    assert (first.name, first.stage, first.step, first.steps, first.state) == (
        "group/first",
        "autoencoder",
        4,
        4,
        "finished",
    )
    assert (second.name, second.step, second.checkpoint, second.best_pq, second.state) == (
        "second",
        1,
        1,
        None,
        "resumable",
    )
    assert first.best_pq is not None and first.best_step in (2, 4) and first.images_per_s > 0
    table = format_table([first, second]).splitlines()
    assert len(table) == 3 and "best PQ" in table[0] and table[1].startswith("group/first") and "resumable" in table[2]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args([str(tmp_path), "--json"])) == 0
    assert [run["name"] for run in json.loads(capsys.readouterr().out)] == ["group/first", "second"]
    (tmp_path / "empty").mkdir()
    assert run(parser.parse_args([str(tmp_path / "empty")])) == 1
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_runs(tmp_path / "nowhere")


def test_tensorboard_has_curves_and_pictures(settings: Callable[..., Config]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train("autoencoder", settings("run", "train.validate_every=2", "train.steps=4", "data.val_limit=2"))
    events = EventAccumulator(str(folder / "logs" / "tensorboard"))
    events.Reload()
    assert {"loss", "lr", "images_per_s", "val/pq"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert len(events.Images("validation")) == 2


def test_a_resume_drops_later_lines(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 0.1 + step})
    log.close()
    log = RunLog(tmp_path, 2)
    log.write(3, {"loss": 1 / 3})
    log.close()
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert records[-1]["loss"] == pytest.approx(1 / 3, abs=1e-9)


def test_wandb_is_asked_for_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pip install wandb"):
        RunLog(tmp_path, 0, "project")
