"""The folder of a run: what may lie there, who may write there, and a model that is never behind its checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldmseg_fast.config import Config
from ldmseg_fast.distributed.liveness import Interrupt
from ldmseg_fast.errors import ArgumentError, CheckpointError, InUseError
from ldmseg_fast.locks import only_writer
from ldmseg_fast.training.loop import Run, train
from tests.training.helpers import losses, metrics

Settings = Callable[..., Config]


@pytest.mark.parametrize("content", ["missing", "empty", "foreign", "pickle"])
def test_nothing_to_resume(content: str, settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if content != "missing":
        folder.mkdir()
    if content == "foreign":
        (folder / "notes.txt").write_text("not a run")
    if content == "pickle":
        (folder / "global_step5").mkdir()
        (folder / "global_step5" / "mp_rank_00_model_states.pt").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    words = {"missing": "does not exist", "empty": "is empty", "foreign": "no complete checkpoint", "pickle": "--trust"}
    with pytest.raises(CheckpointError, match=words[content]):
        train("autoencoder", settings("run"), resume=True)


def test_a_run_in_the_way(settings: Settings) -> None:
    train("autoencoder", settings("run", "train.steps=1"))
    with pytest.raises(CheckpointError, match="--resume or take another output_dir"):
        train("autoencoder", settings("run", "train.steps=1"))
    assert train("autoencoder", settings("run", "train.steps=1"), resume=True).name == "run"  # nothing left to do
    train("autoencoder", settings("run", "train.steps=3"), resume=True)
    assert len(losses(Path(settings("run").output_dir))) == 3


@pytest.mark.parametrize("moment", ["before", "amid", "before the best"])
@pytest.mark.parametrize("stage", ["autoencoder", "diffusion", "one_step"])
def test_a_model_folder_that_is_behind_its_checkpoint(
    moment: str, stage: str, settings: Settings, autoencoder: Path, diffusion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill after the last checkpoint and before, or amid, the model of the averaged weights, or the best one."""
    start = {
        "autoencoder": [],
        "diffusion": [f"model.mask_vae={autoencoder}"],
        "one_step": [f"model.init_from={diffusion}"],
    }
    common = [*start[stage], "train.steps=4", "train.save_every=2", "train.validate_every=2", "train.ema=0.5"]
    common += ["data.val_limit=2", "few_step.matching=none"]
    whole = train(stage, settings("whole", *common))
    export = Run.export

    class Killed(BaseException):
        pass

    def killed(run: Run, folder: Path) -> None:
        is_last = run.progress.step == 4 or folder.name == "best"
        if not is_last or (folder.name == "best") != (moment == "before the best"):
            return export(run, folder)
        if moment == "amid":
            monkeypatch.setattr(type(run.stage), "save", half)
            export(run, folder)
        raise Killed

    def half(stage: Any, folder: Path) -> None:
        (folder / "mask_vae" / "model.safetensors").write_bytes(b"half")
        raise Killed

    monkeypatch.setattr(Run, "export", killed)
    with pytest.raises(Killed):
        train(stage, settings("cut", *common))
    monkeypatch.undo()
    recorded = json.loads((Path(settings("cut").output_dir) / "checkpoints" / "exported.json").read_text())
    assert recorded.get(".") == {"before": 2, "amid": None, "before the best": 2}[moment]  # half a model has no step
    cut = train(stage, settings("cut", *common), resume=True)
    for path in whole.rglob("*.safetensors"):
        if "checkpoints" not in path.parts:
            assert path.read_bytes() == (cut / path.relative_to(whole)).read_bytes(), path
    assert metrics(cut) == metrics(whole) and losses(cut) == losses(whole)
    states = [json.loads((run / "checkpoints" / "step-00000004" / "state.json").read_text()) for run in (whole, cut)]
    assert states[0]["progress"]["best"] == states[1]["progress"]["best"]
    exported = [json.loads((run / "checkpoints" / "exported.json").read_text()) for run in (whole, cut)]
    assert exported[0] == exported[1] and exported[0]["."] == 4


def test_a_component_that_has_gone_is_written_again(settings: Settings, capfd: pytest.CaptureFixture) -> None:
    folder = train("autoencoder", settings("run", "train.steps=1"))
    before = (folder / "mask_vae" / "model.safetensors").read_bytes()
    capfd.readouterr()
    train("autoencoder", settings("run", "train.steps=1"), resume=True)
    assert "written anew" not in capfd.readouterr().err
    shutil.rmtree(folder / "mask_vae")
    train("autoencoder", settings("run", "train.steps=1"), resume=True)
    assert "is not the model of step 1: written anew" in capfd.readouterr().err
    assert (folder / "mask_vae" / "model.safetensors").read_bytes() == before


def test_two_runs_do_not_share_a_folder(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings("run", "train.steps=1")
    with only_writer(config.output_dir, "a training", "x"):
        child = os.fork()
        if child == 0:
            try:
                train("autoencoder", config)
            except InUseError as error:
                os._exit(0 if f"process {os.getppid()} on" in str(error) else 1)
            os._exit(2)
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("name", ["README.md", "logs/log.jsonl", "unet", "model_index.json"])
def test_a_folder_with_something_else_in_it(name: str, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).write_text("{}")
    with pytest.raises(CheckpointError, match="take another output_dir"):
        train("autoencoder", settings("run", "train.steps=1"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [Path(name).parts[0]]
    assert (tmp_path / "run" / name).read_text() == "{}"


def test_a_run_that_was_killed_early_begins_anew(settings: Settings, tmp_path: Path) -> None:
    run = Run("autoencoder", settings("run"), Interrupt())
    run.close()
    (tmp_path / "run" / "checkpoints" / ".new-00000002").mkdir(parents=True)
    assert not list(train("autoencoder", settings("run", "train.steps=1")).glob("checkpoints/.*"))


@pytest.mark.parametrize("key", ["data.root", "model.mask_vae", "model.init_from"])
def test_a_run_does_not_write_into_what_it_reads(
    key: str, settings: Settings, autoencoder: Path, scenes: Path, tmp_path: Path
) -> None:
    folder = scenes if key == "data.root" else autoencoder
    (tmp_path / "link").symlink_to(folder)
    for out in (folder, tmp_path / "link"):
        given = [f"output_dir={out}", *([] if key == "data.root" else [f"{key}={autoencoder}"])]
        with pytest.raises(ArgumentError, match="output_dir"):
            train("diffusion", settings("run", *given))
