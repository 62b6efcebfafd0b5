"""Weights & Biases, MLflow and trackio, as doubles: which run is theirs, what they are told, and what may go wrong."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast import distributed
from ldmseg_fast.config import Config
from ldmseg_fast.errors import ConfigError
from ldmseg_fast.training.loop import train
from ldmseg_fast.training.run_log import RunLog
from ldmseg_fast.training.trackers import TRACKERS


class Calls:
    """Keeps what was called, and what the doubles are to raise."""

    def __init__(self) -> None:
        self.made: list[tuple[str, Any]] = []
        self.errors: dict[str, Exception] = {}
        self.runs: set[str] = set()

    def record(self, name: str, value: Any = None) -> None:
        self.made.append((name, value))
        if name in self.errors:
            raise self.errors[name]

    def of(self, name: str) -> list[Any]:
        return [value for each, value in self.made if each == name]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Doubles of the three packages, with the calls of wandb 0.31, mlflow 3.17 and trackio 0.43 that are used."""
    calls = Calls()
    modules = {"wandb": wandb_double(calls), "mlflow": mlflow_double(calls), "trackio": trackio_double(calls)}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def wandb_double(calls: Calls) -> Any:
    class Run:
        def define_metric(self, name: str, step_metric: str = "") -> None:
            calls.record("wandb.define_metric", (name, step_metric))

        def log(self, values: dict[str, Any]) -> None:
            calls.record("wandb.log", values)

        def finish(self) -> None:
            calls.record("wandb.finish")

    def init(*, project: str, name: str, id: str, resume: str, dir: str, config: dict[str, Any]) -> Run:
        calls.record("wandb.init", types.SimpleNamespace(project=project, name=name, id=id, resume=resume))
        return Run()

    errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
    return types.SimpleNamespace(init=init, errors=errors, Image=lambda pixels: pixels)


def mlflow_double(calls: Calls) -> Any:
    class MlflowException(Exception):
        error_code = "RESOURCE_DOES_NOT_EXIST"

    class Client:
        def get_experiment_by_name(self, name: str) -> Any:
            calls.record("mlflow.get_experiment_by_name", name)

        def create_experiment(self, name: str) -> str:
            return "7"

        def create_run(self, experiment_id: str, run_name: str) -> Any:
            calls.record("mlflow.create_run", (experiment_id, run_name))
            calls.runs.add(made := f"run-{len(calls.runs)}")
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=made))

        def update_run(self, run_id: str, status: str) -> None:
            calls.record("mlflow.update_run", run_id)
            if run_id not in calls.runs:
                raise MlflowException("no such run")

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
            assert len(params) <= 100
            calls.record(
                "mlflow.params" if params else "mlflow.log_batch", [(e.key, e.value) for e in params or metrics]
            )

        def log_image(self, run_id: str, image: np.ndarray, key: str, step: int, synchronous: bool) -> None:
            calls.record("mlflow.log_image", (image.shape, key, step))

        def set_terminated(self, run_id: str) -> None:
            calls.record("mlflow.set_terminated", run_id)

    entities = types.SimpleNamespace(
        Param=lambda key, value: types.SimpleNamespace(key=key, value=value),
        Metric=lambda key, value, timestamp, step: types.SimpleNamespace(key=key, value=value, step=step),
    )
    exceptions = types.SimpleNamespace(MlflowException=MlflowException)
    return types.SimpleNamespace(MlflowClient=Client, entities=entities, exceptions=exceptions)


def trackio_double(calls: Calls) -> Any:
    class Run:
        def log(self, values: dict[str, Any], step: int) -> None:
            calls.record("trackio.log", (step, values))

        def finish(self) -> None:
            calls.record("trackio.finish")

    def init(*, project: str, name: str, config: dict[str, Any], resume: str, embed: bool) -> Run:
        print("* trackio talks")
        assert resume == "allow" and not embed
        calls.record("trackio.init", types.SimpleNamespace(project=project, name=name, config=config))
        return Run()

    return types.SimpleNamespace(init=init, Image=lambda pixels: pixels)


def session(run_dir: Path, start: int = 0, steps: tuple[int, ...] = (1, 2), **projects: str) -> dict[str, str]:
    """A process's part of a run, and the ids that are kept of it."""
    projects = projects or dict.fromkeys(TRACKERS, "mine")
    log = RunLog(run_dir / "logs", start, settings={"train": {"steps": 4}, "stage": "x"}, **projects)
    for step in steps:
        log.write(step, {"loss": 1 / step})
    log.close()
    return json.loads((run_dir / "logs" / "trackers.json").read_text())


def test_a_resumed_run_goes_on_in_its_own(calls: Calls, tmp_path: Path) -> None:
    first = session(tmp_path / "run")
    again = session(tmp_path / "run", 1, (2, 3))
    assert again == first and first.keys() == TRACKERS.keys()
    assert [each.id for each in calls.of("wandb.init")] == [first["wandb"]] * 2
    assert calls.of("mlflow.update_run") == [first["mlflow"]] and len(calls.of("mlflow.create_run")) == 1
    assert [each.name for each in calls.of("trackio.init")] == [first["trackio"]] * 2


def test_runs_of_one_name_stay_apart(calls: Calls, tmp_path: Path) -> None:
    ids = [session(tmp_path / "a" / "run"), session(tmp_path / "b" / "run"), session(tmp_path / "a" / "run")]
    for kind in TRACKERS:
        assert len({each[kind] for each in ids}) == 3
    assert {each.name for each in calls.of("wandb.init")} == {"run"}


def test_what_they_are_told(calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    session(tmp_path / "run", 0, (1,))
    assert calls.of("wandb.log") == [{"loss": 1.0, "step": 1}]
    assert ("*", "step") in calls.of("wandb.define_metric")  # or steps after a checkpoint would be dropped
    assert calls.of("mlflow.log_batch") == [[("loss", 1.0)]] and calls.of("trackio.log") == [(1, {"loss": 1.0})]
    assert calls.of("mlflow.params") == [[("train.steps", "4"), ("stage", "x")]]
    assert calls.of("trackio.init")[0].config == {"train.steps": 4, "stage": "x"}
    ends = ("wandb.finish", "mlflow.set_terminated", "trackio.finish")
    assert all(len(calls.of(name)) == 1 for name in ends)
    assert capsys.readouterr().out == ""


def test_pictures(calls: Calls, tmp_path: Path) -> None:
    Image.new("RGB", (6, 4)).save(tmp_path / "x.png")
    log = RunLog(tmp_path / "logs", 0, "mine", mlflow="mine", trackio="mine")
    log.picture(3, tmp_path / "x.png")
    log.close()
    assert calls.of("mlflow.log_image") == [((4, 6, 3), "validation", 3)]
    assert calls.of("wandb.log")[0]["validation"].shape == (4, 6, 3) and calls.of("trackio.log")[0][0] == 3


def test_an_mlflow_run_that_is_gone_is_made_anew(calls: Calls, tmp_path: Path) -> None:
    session(tmp_path / "run", mlflow="mine")
    calls.runs = {"another"}
    assert session(tmp_path / "run", 1, mlflow="mine")["mlflow"] == "run-1"


def test_an_mlflow_server_that_is_lost_does_not_end_the_training(calls: Calls, tmp_path: Path) -> None:
    calls.errors["mlflow.log_batch"] = sys.modules["mlflow"].exceptions.MlflowException("no\nserver")
    with pytest.warns(UserWarning, match=r"MLflow is lost \(no server\); logs/log\.jsonl has everything"):
        session(tmp_path / "run", 0, (1, 2, 3), mlflow="mine")
    assert len(calls.of("mlflow.log_batch")) == 1  # it is not asked again
    assert len((tmp_path / "run" / "logs" / "log.jsonl").read_text().splitlines()) == 3


def test_what_cannot_start_is_one_line(calls: Calls, tmp_path: Path) -> None:
    calls.errors["wandb.init"] = sys.modules["wandb"].errors.Error("api_key not\nconfigured")
    with pytest.raises(ConfigError, match=r"train\.wandb=mine: api_key not configured; .*WANDB_MODE=offline"):
        RunLog(tmp_path / "logs", 0, "mine")
    calls.errors["mlflow.create_run"] = sys.modules["mlflow"].exceptions.MlflowException("no")
    with pytest.raises(ConfigError, match=r"train\.mlflow=mine: no; MLFLOW_TRACKING_URI"):
        RunLog(tmp_path / "logs", 0, mlflow="mine")


@pytest.mark.parametrize("kind", TRACKERS)
def test_a_missing_package_is_one_line(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(ConfigError, match=rf"train\.{kind}=mine: `pip install {kind}`, or leave train\.{kind} out"):
        RunLog(tmp_path / "logs", 0, **{kind: "mine"})


def test_other_ranks_say_nothing(calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    log = RunLog(tmp_path / "logs", 0, "mine", mlflow="mine", trackio="mine")
    log.write(1, {"loss": 1.0})
    log.close()
    assert calls.made == [] and not (tmp_path / "logs").exists()


def test_a_training_and_its_end(calls: Calls, settings: Callable[..., Config]) -> None:
    options = ("train.wandb=mine", "train.mlflow=mine", "train.trackio=mine", "train.steps=2", "train.log_every=1")
    folder = train("autoencoder", settings("run", *options, "train.validate_every=9", "data.val_limit=2"))
    assert [values["step"] for values in calls.of("wandb.log") if "loss" in values] == [1, 2]
    ids = json.loads((folder / "logs" / "trackers.json").read_text())
    train("autoencoder", settings("run", *options, "train.steps=3", "data.val_limit=2"), resume=True)
    assert json.loads((folder / "logs" / "trackers.json").read_text()) == ids
    assert calls.of("trackio.log")[-1][0] == 3
