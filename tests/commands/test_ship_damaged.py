"""A model that is damaged, or that leads out of its folder, is not shipped."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldmseg_fast.cli import main
from ldmseg_fast.distributed.ending import run_command

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(model_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_dir, tmp_path / "run")


def refused(run: Path, capsys: pytest.CaptureFixture) -> str:
    out = run.parent / "shipped"
    assert main(["ship", str(run), str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {run}") and said.count("\n") == 1
    assert [path.name for path in run.parent.iterdir()] == ["run"]
    return said


@pytest.mark.parametrize("name", ["scheduler/config.json", "unet/config.json", "mask_vae/config.json"])
def test_settings_that_are_damaged(run, capsys, name):
    (run / name).write_text("")
    assert f"{name}: damaged, no JSON" in refused(run, capsys)
    (run / name).unlink()
    assert f"{name}: no such file" in refused(run, capsys)
    (run / name).mkdir()
    assert f"{name}: no plain file" in refused(run, capsys)


def test_weights_that_are_missing_or_of_another_model(run, capsys):
    path = run / "unet" / "model.safetensors"
    state = load_file(path)
    save_file(state | {"conv_in.bias": torch.ones(3)}, path)
    assert "1 of another shape: conv_in.bias" in refused(run, capsys)
    save_file(state | {"conv_in.bias": state["conv_in.bias"] * float("nan")}, path)
    assert "not finite (NaN or infinity): conv_in.bias; the file is damaged" in refused(run, capsys)
    path.unlink()
    assert "unet/model.safetensors: no such file" in refused(run, capsys)


LITTLE_SPACE = """
import os, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from ldmseg_fast.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk(run):
    out = run.parent / "shipped"
    command = [sys.executable, "-c", LITTLE_SPACE, "ship", str(run), str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == f"error: {out}: File too large; raise `ulimit -f`, or choose another disk\n"
    assert done.returncode == 2 and [path.name for path in run.parent.iterdir()] == ["run"]


def test_a_folder_that_is_gone(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run_command(Path.cwd) == 2
    assert "the folder that this command was started in has been removed" in capsys.readouterr().err


def test_files_of_others_do_not_come_along(run, tmp_path, capsys):
    """What is shipped is sent to others: a link in a run that somebody gave away must not fetch a private file."""
    link = run / "scheduler" / "notes.txt"
    private = tmp_path / "run-secret"
    private.write_text("private")
    link.symlink_to(private)
    assert main(["ship", str(run), str(tmp_path / "shipped")]) == 2
    assert "scheduler/notes.txt: a link out of the folder" in capsys.readouterr().err
    assert not (tmp_path / "shipped").exists()
    link.unlink()
    link.symlink_to("/nowhere")
    assert main(["ship", str(run), str(tmp_path / "shipped")]) == 0
    assert not (tmp_path / "shipped" / "scheduler" / "notes.txt").exists()
