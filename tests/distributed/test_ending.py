"""How commands end: what the user can mend in one line, a fault of ours with its traceback."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch.distributed import HashStore

from ldmseg_fast import cli, errors, stopping
from ldmseg_fast.distributed import ending
from ldmseg_fast.distributed.ending import reason_of, run_command
from ldmseg_fast.export import to_onnx, to_triton, to_trt

ROOT = Path(__file__).resolve().parents[2]
NO_ROOM = "error: out of memory ({}); take a smaller size or fewer at once, or end other programs"
# the least arguments that each command takes
ARGUMENTS = {
    "predict": ["tiny", "x.png", "--out", "out"],
    "inpaint": ["tiny", "--image", "x.png", "--map", "y.png", "--unknown-id", "0", "--out", "out"],
    "evaluate": ["tiny", "--data", "data"],
    "pq": ["a.json", "b.json"],
    "convert": ["x.pt", "--out", "out"],
    "data check": ["data"],
    "data scenes": ["out", "--images", "10"],
    "data merge": ["out", "a:b"],
    "data import": ["labelme", "source", "out"],
    "data export": ["labelme", "data", "out"],
    "data cache": ["data", "--image-vae", "x"],
    "runs": ["folder"],
    "report": ["folder"],
    "ship": ["run", "out"],
    "push": ["tiny", "owner/name"],
    "app": [],
    "doctor": [],
    "completion": ["bash"],
    "demo": ["--out", "out"],
}
SCRIPTS = {
    to_onnx: ["tiny", "--out", "out"],
    to_trt: ["tiny", "--out", "out", "--flavour", "rtx"],
    to_triton: ["engines", "--out", "out"],
}


def broadcast(*_: object, **__: object) -> None:
    np.zeros(3) + np.zeros(4)


def missing_key(*_: object, **__: object) -> None:
    {}["a key of ours"]


FAULTS = [(broadcast, ValueError), (missing_key, KeyError)]


def test_every_command_is_tried():
    assert ARGUMENTS.keys() == cli.COMMANDS.keys()


@pytest.mark.parametrize(("fault", "kind"), FAULTS)
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_fault_in_a_command_keeps_its_traceback(command, fault, kind, monkeypatch, capsys):
    monkeypatch.setattr(importlib.import_module(cli.COMMANDS[command][0]), "run", fault)
    with pytest.raises(kind):
        cli.main([*command.split(), *ARGUMENTS[command]])
    assert "error:" not in capsys.readouterr().err


@pytest.mark.parametrize(("fault", "kind"), FAULTS)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__.rpartition(".")[2])
def test_a_fault_in_an_export_keeps_its_traceback(script, fault, kind, monkeypatch):
    monkeypatch.setattr(script, "run", fault)
    with pytest.raises(kind):
        script.main(SCRIPTS[script])


@pytest.mark.parametrize(("fault", "kind"), FAULTS)
def test_a_fault_in_training_keeps_its_traceback(fault, kind, monkeypatch):
    from ldmseg_fast import train

    monkeypatch.setattr(train, "run", fault)
    with pytest.raises(kind):
        train.main(["autoencoder"])


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_what_the_user_can_mend_is_one_line(command, monkeypatch, capsys):
    def refuse(_: object) -> None:
        raise errors.DataError("x.png: no picture; choose another")

    monkeypatch.setattr(importlib.import_module(cli.COMMANDS[command][0]), "run", refuse)
    assert cli.main([*command.split(), *ARGUMENTS[command]]) == 2
    assert capsys.readouterr().err == "error: x.png: no picture; choose another\n"


def test_onnx_runtime_s_errors_of_too_little_memory():
    """Their types are Exception's alone."""
    kind = type("RuntimeException", (Exception,), {"__module__": "onnxruntime.capi.onnxruntime_pybind11_state"})
    head = "[ONNXRuntimeError] : 6 : Non-zero status code returned while running Expand node. Name:'' Status Message: "
    for said in ("std::bad_alloc", "bfc_arena.cc:360 Failed to allocate memory for requested buffer of size 9"):
        assert reason_of(kind(head + said)) == (NO_ROOM.format(said), 2)
    assert reason_of(kind(head + "Invalid shape")) is None and reason_of(ValueError("std::bad_alloc")) is None


def test_every_error_of_ours_is_a_user_error():
    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert {value.__name__ for value in found if not issubclass(value, errors.UserError)} == {"Stopped"}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.ConfigError("train.steps=-1"), ("error: train.steps=-1", 2)),
        (FileNotFoundError(2, "No such file", "x"), ("error: x: No such file", 2)),
        (FileNotFoundError(2, os.strerror(2), "x"), ("error: x: No such file or directory; check the path", 2)),
        (
            FileExistsError(17, os.strerror(17), b"x"),
            ("error: x: File exists; it is no folder: choose another path", 2),
        ),
        (IsADirectoryError("x is a folder: name a file in it"), ("error: x is a folder: name a file in it", 2)),
        (OSError(28, os.strerror(28)), ("error: [Errno 28] No space left on device", 2)),
        (KeyboardInterrupt(), ("interrupted", 130)),
        (errors.Stopped(7, 15), ("stopped by SIGTERM at step 7 and saved; go on with --resume", 143)),
        (RuntimeError("CUDA out of memory. 9 GiB\nmore"), (NO_ROOM.format("CUDA out of memory. 9 GiB"), 2)),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            (NO_ROOM.format("DefaultCPUAllocator: can't allocate memory"), 2),
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            (NO_ROOM.format("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 2),
        ),
        (MemoryError(), (NO_ROOM.format("too little of it"), 2)),
        (errors.DataError("a\nb\x1b[2J.png: no picture"), ("error: a\\nb\\x1b[2J.png: no picture", 2)),
        (errors.DataError("2 are bad:\n  a\n  b"), ("error: 2 are bad:\n  a\n  b", 2)),
        (FileNotFoundError(2, "No such file", "a\nb"), ("error: a\\nb: No such file", 2)),
        (ValueError("operands could not be broadcast"), None),
        (KeyError("x"), None),
        (RuntimeError("x"), None),
    ],
)
def test_reasons(error, expected):
    assert reason_of(error) == expected


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["data", "check", ""], "behind 'check'"),
        (["data", "scenes", "x", "--images", "2", "--sheet", ""], "--sheet"),
        (["pq", "gt.json", "pred.json", "--csv="], "--csv"),
        (["predict", "tiny", "", "--out", "x"], "behind 'tiny'"),
        (["predict", "tiny", "a.png", "--out", ""], "--out"),
    ],
    ids=" ".join,
)
def test_an_empty_argument_is_not_the_folder_that_the_shell_is_in(argv, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    assert capsys.readouterr().err.startswith(f"error: {named}: an empty argument; ")
    assert not list(tmp_path.iterdir())


def test_run_command(capsys):
    def refuse() -> int:
        raise errors.ArgumentError("--steps 0: at least 1")

    assert run_command(lambda: None) == 0
    assert run_command(lambda: 3) == 3
    assert run_command(refuse) == 2
    assert capsys.readouterr().err == "error: --steps 0: at least 1\n"


def test_a_benchmark_ends_in_one_line(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).write_text("no record")
    command = [sys.executable, str(ROOT / "benchmarks" / "compare.py"), str(tmp_path / "x"), str(tmp_path / "y")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr and str(tmp_path / "x") in done.stderr


class _Left(Exception):
    """Takes the place of the process's end."""


def test_a_launcher_that_stops_a_rank_that_says_why_changes_nothing(monkeypatch, capsys):
    def leave(code):
        raise _Left(code, signal.getsignal(signal.SIGTERM))

    before = signal.signal(signal.SIGTERM, stopping.terminate)
    try:
        monkeypatch.setattr(os, "_exit", leave)
        monkeypatch.setattr(ending.time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
        watch = ending._RankWatch()
        watch._store = HashStore()
        with pytest.raises(_Left) as left:
            watch.fail(errors.DataError("x: no picture"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left.value.args == (2, signal.SIG_IGN) and capsys.readouterr().err == "error: x: no picture\n"


def test_a_rank_that_is_stopped_before_the_work_says_so_in_one_line(monkeypatch, capsys):
    def stopped(args):
        raise stopping.Terminated

    monkeypatch.setattr("ldmseg_fast.commands.doctor.run", stopped)
    assert cli.main(["doctor"]) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM\n"
