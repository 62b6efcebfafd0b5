"""The keeper outlives a launcher that dies at once, and waits for what it has left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ldmseg_fast.distributed import liveness

ROOT = Path(__file__).resolve().parents[2]
KEEPER = [sys.executable, "-m", "ldmseg_fast.distributed.keeper"]
# a rank that needs a second to save after its launcher, this script, has died of the signal
LAUNCHER = """
import os, signal, sys, time
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    launcher = os.getppid()
    while os.getppid() == launcher:
        time.sleep(0.05)
    time.sleep(1)
    open(sys.argv[1], "w").write("saved")
    os._exit(0)
open(sys.argv[2], "w").close()
time.sleep(60)
"""


def test_sigterm_waits_for_the_ranks(tmp_path: Path) -> None:
    saved, ready = tmp_path / "saved", tmp_path / "ready"
    command = [*KEEPER, sys.executable, "-c", LAUNCHER, saved, ready]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    end = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert saved.read_text() == "saved"


@pytest.mark.parametrize(("command", "code"), [(["-c", "raise SystemExit(7)"], 7), (["-c", "pass"], 0)])
def test_the_exit_code_is_the_launchers(command: list[str], code: int) -> None:
    found = subprocess.run([*KEEPER, sys.executable, *command], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert found.returncode == code


def test_wrong_commands_are_one_line() -> None:
    for command in ([], ["/nowhere/deepspeed"]):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        found = subprocess.run([*KEEPER, *command], env=environment, capture_output=True, text=True, check=False)
        assert found.returncode == 2 and len(found.stderr.strip().splitlines()) == 1


def test_a_rank_that_was_killed_for_memory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = tmp_path / "vmstat"
    counts.write_text("pgfault 3\noom_kill 4\n")
    assert liveness.oom_kills(counts) == 4 and liveness.oom_kills(tmp_path / "none") == 0
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    host = liveness.socket.gethostname()
    monkeypatch.setattr(liveness, "_places", [(host, os.getpid()), (host, dead.pid), ("elsewhere", dead.pid)])
    monkeypatch.setattr(liveness, "_kills_at_start", 4)
    monkeypatch.setattr(liveness, "oom_kills", lambda: 4)
    assert liveness.lost_ranks() == f"rank 1 (process {dead.pid} on {host}) has gone"
    monkeypatch.setattr(liveness, "oom_kills", lambda: 5)
    assert "rank 1 " in liveness.lost_ranks() and "because memory ran out" in liveness.lost_ranks()
    monkeypatch.setattr(liveness, "_places", [(host, os.getpid())])
    assert liveness.lost_ranks() == ""
