"""One process at a time writes into a folder, and a process that has gone is none."""

import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from ldmseg_fast import cli
from ldmseg_fast.errors import InUseError
from ldmseg_fast.locks import LOCK, only_writer


def other_process(folder: Path, end: int | None = None) -> int:
    """Forks a process that holds the lock, and returns once it does; `end` is the signal that it ends by."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with only_writer(folder, "a training", "stop it"):
            os.write(write, b"x")
            if end is None:
                signal.pause()
            os.kill(os.getpid(), end)
    os.read(read, 1)
    return child


def test_the_second_is_refused_at_once_and_told_who_is_there(tmp_path: Path) -> None:
    child = other_process(tmp_path / "run")
    try:
        with pytest.raises(InUseError) as caught, only_writer(tmp_path / "run", "an evaluation", "choose another"):
            pass
        said = str(caught.value)
        assert f"a training (process {child} on {socket.gethostname()}" in said and said.endswith("choose another")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with only_writer(tmp_path / "run", "a training", "x"):  # the dead one's file is there, its lock is not
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_that_was_made_for_nothing_goes(tmp_path: Path) -> None:
    with only_writer(tmp_path / "a" / "b", "a demo", "x"):
        pass
    assert not (tmp_path / "a" / "b").exists()
    with only_writer(tmp_path / "c", "a demo", "x", make=False):
        assert not (tmp_path / "c").exists()


def test_a_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    """A killed training's loaders live on for seconds."""
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        with only_writer(tmp_path, "a training", "x"):
            child = os.fork()
            if child == 0:
                signal.pause()
            os.write(write, child.to_bytes(4, "little"))
            os.kill(os.getpid(), signal.SIGKILL)
    child = int.from_bytes(os.read(read, 4), "little")
    os.waitpid(parent, 0)
    try:
        with only_writer(tmp_path, "a training", "x"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system has no locks."""

    def unknown(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)


@pytest.mark.parametrize(
    ("content", "age", "refused"),
    [
        (json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), 3600, True),
        (json.dumps({"pid": 2**22 + 1, "host": socket.gethostname()}), 0, False),  # above what Linux gives
        (json.dumps({"pid": 2**80, "host": socket.gethostname()}), 0, False),
        (json.dumps({"pid": [], "host": socket.gethostname()}), 0, False),
        (json.dumps({"pid": 1, "host": "another-machine"}), 3600, True),
        ("", 0, True),  # its process is about to write
        ("", 3600, False),
        ('{"pid": 1', 3600, False),
    ],
    ids=["alive", "gone", "no pid", "no number", "of another machine", "new and empty", "old and empty", "half"],
)
def test_a_file_system_without_locks(content: str, age: float, refused: bool, tmp_path: Path, no_locks: None) -> None:
    (tmp_path / LOCK).write_text(content)
    os.utime(tmp_path / LOCK, (time.time() - age,) * 2)
    if refused:
        with (
            pytest.raises(InUseError, match=f"or delete .*{LOCK} if nothing runs there"),
            only_writer(tmp_path, "x", "y"),
        ):
            pass
    else:
        with only_writer(tmp_path, "x", "y"):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        assert list(tmp_path.iterdir()) == []


def test_two_at_once_without_locks(tmp_path: Path, no_locks: None) -> None:
    """Threads in the place of processes, each of which finds the file of one that has gone, or none."""
    for stale in (True, False) * 10:
        if stale:
            (tmp_path / LOCK).write_text(json.dumps({"pid": 2**22 + 1, "host": socket.gethostname()}))
        start, end, took = threading.Barrier(4), threading.Barrier(4), []

        def take(start: threading.Barrier = start, end: threading.Barrier = end, took: list = took) -> None:
            start.wait()
            try:
                with only_writer(tmp_path, "x", "y"):
                    took.append(1)
                    end.wait()
            except InUseError:
                end.wait()

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(took) == 1


def test_a_removal_that_was_killed_stops_nobody(tmp_path: Path, no_locks: None) -> None:
    guard = tmp_path / f"{LOCK}.removal"
    guard.touch()
    os.utime(guard, (0, 0))
    (tmp_path / LOCK).write_text(json.dumps({"pid": 2**22 + 1, "host": socket.gethostname()}))
    with only_writer(tmp_path, "x", "y"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_no_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with only_writer(tmp_path, "x", "y"):
        pass


@pytest.mark.parametrize("command", ["evaluate", "merge", "demo"])
def test_a_command_waits_for_nobody(
    command: str, model_dir: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    arguments = {
        "evaluate": ["evaluate", model_dir, "--data", scenes, "--steps", "1", "--limit", "1", "--out", out],
        "merge": ["data", "merge", out, f"{scenes}:val2017"],
        "demo": ["demo", "--out", out, "--minutes", "0.01"],
    }
    with only_writer(out, "another one", "x"):
        if command == "demo":
            (out / "progress.json").write_text("{}")
        before = sorted(path.name for path in out.rglob("*"))
        assert cli.main(list(map(str, arguments[command]))) == 2
        assert f"another one (process {os.getpid()} on" in capsys.readouterr().err
        assert sorted(path.name for path in out.rglob("*")) == before
