"""Units of work that ranks share by files: each is done once, also after kills; who may not take part is told so."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from ldmseg_fast.distributed.liveness import LOST_RANK
from ldmseg_fast.distributed.ranks import Ranks
from ldmseg_fast.distributed.shared_run import RUN, SharedRun
from ldmseg_fast.errors import ArgumentError, InUseError

ROOT = Path(__file__).resolve().parents[2]
UNITS = [f"unit {number}" for number in range(12)]
SCRIPT = """
import os, sys, time
from ldmseg_fast import cli
from ldmseg_fast.distributed.ranks import ranks_of
from ldmseg_fast.distributed.shared_run import SharedRun
folder, seconds, units = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
def work():
    with SharedRun(folder, ranks_of(os.environ), "a test", "choose another folder") as run:
        if run.is_main:
            run.open({"steps": 1}, [f"unit {number}" for number in range(units)])
        else:
            run.follow({"steps": int(os.environ.get("STEPS", 1)), "weights": ["of this machine"]})
        mine = []
        for number, unit in run.claims():
            time.sleep(seconds * (1 if run.is_main else 4))
            mine.append(number)
            run.done(number, {"rank": run.ranks.rank}, 1)
            print(number, flush=True)
        records = run.finish()
        if run.is_main:
            print("records", len(records), flush=True)
    return 0
import argparse
job = argparse.Namespace(command="", run=lambda _: work())
cli.build_parser = lambda: argparse.Namespace(parse_args=lambda argv: job)
sys.exit(cli.main([]))
"""


def start(folder: Path, *arguments: object, rank: int = 0, world: int = 2, **more: str) -> subprocess.Popen:
    environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world), "PYTHONPATH": str(ROOT)} | more
    command = [sys.executable, "-c", SCRIPT, str(folder), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ends(process: subprocess.Popen) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=120)
    return process.returncode, out, error


def alone(
    folder: Path, settings: Mapping[str, object] = {"steps": 1}, stop: int = 99, units: list[str] = UNITS
) -> list:
    """One process that is interrupted at a unit; which it did."""
    done = []
    with SharedRun(folder, Ranks(launch="x"), "a test", "choose another folder") as run:
        run.open(settings, units)
        for number, _ in run.claims():
            if number == stop:
                raise KeyboardInterrupt
            run.done(number, {"n": number}, 1)
            done.append(number)
        assert [record["n"] for record in run.finish()] == list(range(len(units)))
    return done


def test_one_process_goes_on_where_it_was_interrupted(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        alone(out, stop=5)
    assert alone(out) == [5, 6, 7, 8, 9, 10, 11]
    assert list(out.iterdir()) == []  # nothing else was written there
    assert alone(out) == list(range(12))


def test_other_settings_are_refused_by_name(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        alone(tmp_path / "out", stop=5)
    with pytest.raises(ArgumentError, match=r"other settings .*steps 1, now 2.*delete .*ldmseg-run"):
        alone(tmp_path / "out", {"steps": 2})
    with pytest.raises(ArgumentError, match="weights"):
        alone(tmp_path / "out", {"steps": 1, "weights": {"a": [1, 2]}})
    assert alone(tmp_path / "out") == [5, 6, 7, 8, 9, 10, 11]
    with pytest.raises(KeyboardInterrupt):
        alone(tmp_path / "new", stop=0)  # nothing was complete: nothing to mix
    assert len(alone(tmp_path / "new", {"steps": 2})) == 12


def test_changed_units_are_done_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        alone(tmp_path, stop=5)
    journal = next((tmp_path / RUN).glob("done-*"))
    journal.write_bytes(journal.read_bytes() + b'{"key": "torn')
    assert alone(tmp_path, units=["changed", *UNITS[1:], "new"]) == [0, *range(5, 13)]


def test_results_that_have_gone_are_made_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        alone(tmp_path, stop=5)
    with SharedRun(tmp_path, Ranks(launch="x"), "a test", "-") as run:
        run.open({"steps": 1}, UNITS, lambda unit, record: record["n"] != 3)
        assert [number for number, _ in run.claims()] == [3, *range(5, 12)]
        for number in (3, *range(5, 12)):
            run.done(number, {"n": number}, 1)
        run.finish()


def test_two_starts_in_one_folder(tmp_path):
    with SharedRun(tmp_path, Ranks(launch="x"), "a test", "choose another folder"):
        with (
            pytest.raises(InUseError, match=r"a test \(process \d+ .*choose another folder"),
            SharedRun(tmp_path, Ranks(launch="y"), "a test", "choose another folder"),
        ):
            pass
        assert (tmp_path / RUN).is_dir()


@pytest.mark.serial
def test_a_fast_rank_takes_over_from_a_slow_one(tmp_path):
    ranks = [start(tmp_path, 0.05, 24, rank=rank) for rank in (0, 1)]
    found = [ends(rank) for rank in ranks]
    assert [code for code, _, _ in found] == [0, 0], found
    done = [[int(line) for line in out.splitlines() if line.isdecimal()] for _, out, _ in found]
    assert sorted(done[0] + done[1]) == list(range(24)) and "records 24" in found[0][1]
    assert [error for _, _, error in found] == ["", ""]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.serial
def test_a_rank_of_other_settings_is_refused(tmp_path):
    """Such as another commit of a model that each rank has asked the Hub for."""
    found = [ends(start) for start in [start(tmp_path, 0.2, 40, rank=rank, STEPS="2") for rank in (0, 1)]]
    assert [code for code, _, _ in found] == [LOST_RANK, 2] and found[0][2] == "", found
    assert found[1][2].startswith("error: rank 1: steps is 2, of rank 0 1; start all ranks with one command")
    assert found[1][2].count("\n") == 1


@pytest.mark.serial
def test_a_killed_rank_is_named_once_and_a_rerun_does_the_rest(tmp_path):
    ranks = [start(tmp_path, 0.2, 40, rank=rank, world=3) for rank in range(3)]
    for rank in ranks:
        rank.stdout.readline()
    ranks[1].send_signal(signal.SIGKILL)
    begun = time.monotonic()
    found = [ends(rank) for rank in ranks]
    assert time.monotonic() - begun < 8
    assert [code for code, _, _ in found] == [LOST_RANK, -9, LOST_RANK]
    said = "".join(error for _, _, error in found)
    assert said.count("\n") == 1 and said.startswith(f"error: rank 1 (process {ranks[1].pid} on "), said
    assert "has died; run the command again" in said
    complete = len([line for path in (tmp_path / RUN).glob("done-*") for line in path.read_text().splitlines()])
    code, out, _ = ends(start(tmp_path, 0, 40, world=1))
    assert code == 0 and "records 40" in out and out.count("\n") == 41 - complete


@pytest.mark.serial
def test_a_rank_of_another_start_is_refused(tmp_path):
    own = [start(tmp_path, 0.3, 900, rank=rank, MASTER_PORT="1001") for rank in (0, 1)]
    for rank in own:
        rank.stdout.readline()
    others = [(rank, port) for rank, port in ((0, "1002"), (1, "1002"), (1, "1001"))]
    started = [start(tmp_path, 0, 900, rank=rank, MASTER_PORT=port) for rank, port in others]
    for (_, port), (code, _, error) in zip(others, map(ends, started)):
        assert code == 2 and error.count("\n") == 1, error
        assert "runs already" in error if port == "1001" else "writes there; wait until it has ended" in error
    for rank in own:
        rank.terminate()
        ends(rank)


@pytest.mark.serial
def test_sigterm_is_said_once(tmp_path):
    ranks = [start(tmp_path, 0.3, 30, rank=rank) for rank in (0, 1)]
    for rank in ranks:
        rank.stdout.readline()
    for rank in ranks:
        rank.terminate()
    found = [ends(rank) for rank in ranks]
    assert {code for code, _, _ in found} <= {143, LOST_RANK} and 143 in [code for code, _, _ in found]
    assert (
        "".join(error for _, _, error in found) == "stopped by SIGTERM; run the command again: what is complete stays\n"
    )
    assert json.loads((tmp_path / RUN / "settings.json").read_text()) == {"steps": 1}


@pytest.mark.serial
def test_a_rank_that_is_stopped_while_it_waits_for_the_first_leaves_the_word_to_it(tmp_path):
    rank = start(tmp_path, 0, 1, rank=1)
    time.sleep(1.0)
    while rank.poll() is None and b"SIGTERM" not in _caught(rank.pid):
        time.sleep(0.1)
    rank.terminate()
    assert ends(rank) == (143, "", "")


def _caught(process: int) -> bytes:
    """b"SIGTERM" where the process has a handler of it."""
    status = Path(f"/proc/{process}/status").read_text()
    mask = int(status.partition("SigCgt:")[2].split()[0], 16)
    return b"SIGTERM" if mask >> (signal.SIGTERM - 1) & 1 else b""
