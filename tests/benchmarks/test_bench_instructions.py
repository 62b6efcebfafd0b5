"""Counts of machine instructions become rows and a table; a build that is unfit to ship is a red row."""

import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict
from unittest.mock import Mock

import pytest

from benchmarks import bench_instructions
from benchmarks.bench_instructions import add_rows, compile_kernels
from benchmarks.harness import BenchmarkError, Run, validate
from benchmarks.reporting.rows import load_rows, superseded_files
from benchmarks.reporting.tables import instructions
from ldmseg_fast.kernels import aot
from ldmseg_fast.kernels.aot import Build, collect
from ldmseg_fast.kernels.backend import KERNELS
from ldmseg_fast.kernels.sass import longest_loop


def build(function, **more):
    about = {"kernel": "panoptic_head", "sm": 90, "num_warps": 4, "num_stages": 1, "registers": 9}
    made = Build(function=function, **about | {"constants": {"BLOCK_X": 64, "BLOCK_Q": 128}} | more)
    return asdict(made) | {"per_element": made.per_element}


def test_rows_and_table(tmp_path):
    run = Run("instructions", quick=True)
    builds = [
        build("panoptic_tile_kernel", instructions=2835, waits=3, loop=1320),
        build("panoptic_filter_kernel", instructions=465),
        build("panoptic_tile_kernel", sm=80, spill_bytes=8),
    ]
    add_rows(run, builds)
    validate(run._head() | {"checks": run.checks, "results": run.results})
    tile, other, spilled = run.results
    assert tile["per_element"] == pytest.approx(1320 * 128 / (64 * 128), abs=0.05) and tile["waits"] == 3
    assert "per_element" not in other and spilled["red"] == "spills 8 bytes"
    lines = instructions([row | {"environment": run.environment} for row in run.results[:2]]).splitlines()
    assert lines[2] == "| `panoptic_tile_kernel` | panoptic_head | sm_90 | 9 | 0 | 0 | 0 | 3 | 2835 | 1320 | 20.6 |  |"


def test_switches_have_rows_of_their_own():
    run = Run("instructions", quick=True)
    builds = [build("attention_forward_kernel", instructions=1131, exponentials=52), build("attention_delta_kernel")]
    add_rows(run, builds, "QUARTERS=1")
    [row] = run.results
    assert row["variant"] == "sm_90, QUARTERS=1" and row["exponentials"] == 52
    assert instructions([row | {"environment": run.environment}]).splitlines()[2].endswith("| 52 |")


def test_a_switch_stands_in_the_place_of_a_constant():
    names = {}
    for switches in ((), (("QUARTERS", 1), ("NOTHING", 3))):
        found, _ = collect(90, headline=True, switches=switches)
        names[switches] = {launch.kernel.__name__: launch.constants for _, launch, _ in found}
    before, after = names.values()
    assert before["attention_forward_kernel"]["QUARTERS"] == 0
    assert after["attention_forward_kernel"] == before["attention_forward_kernel"] | {"QUARTERS": 1}
    assert all(after[name] == constants for name, constants in before.items() if name != "attention_forward_kernel")


def test_a_switch_that_there_is_not_is_refused(capsys):
    with pytest.raises(SystemExit):
        aot.main(["--headline", "--only", "attention", "--sm", "90", "--with", "DELAYD=1"])
    assert "--with DELAYD: no configuration has it; there are " in capsys.readouterr().err


def test_the_triton_that_is_named_is_the_one_that_compiles(monkeypatch, tmp_path):
    """The version of this process stands beside the counts, so the other process must find it too."""
    (tmp_path / "triton.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with monkeypatch.context() as patch:
        run = Mock(return_value=Mock(returncode=1))
        patch.setattr(bench_instructions.subprocess, "run", run)
        with pytest.raises(BenchmarkError, match="exit code 1"):
            compile_kernels(Namespace(only=["geglu"], jobs=1, sm=[80]), "")
    command = [sys.executable, "-c", "import triton; print(triton.__file__)"]
    environment = run.call_args.kwargs["env"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert found == str(tmp_path / "triton.py")


def test_versions_of_triton_stand_beside_each_other(tmp_path):
    def write(time, triton, registers):
        run = Run("instructions", folder=tmp_path)
        add_rows(run, [build("panoptic_filter_kernel", instructions=465, registers=registers)])
        run.environment["packages"]["triton"] = triton
        record = run._head() | {"checks": {}, "results": run.results}
        (tmp_path / f"instructions-{time}.json").write_text(json.dumps(record), encoding="utf-8")

    for time, triton, registers in (("1", "3.8.0", 60), ("2", "3.7.1", 61), ("3", "3.7.1", 62)):
        write(time, triton, registers)
    rows = load_rows("instructions", tmp_path)
    assert [row["registers"] for row in rows] == [60, 62]
    assert [path.name for path in superseded_files(tmp_path)] == ["instructions-2.json"]
    text = instructions(rows)
    assert text.count("`panoptic_filter_kernel`") == 1 and "| 62 |" in text and "Compiled by Triton 3.7.1." in text
    assert text.splitlines()[-2:] == [
        "| 3.7.1 | 1 | 62 | 0 | 0 | 0 | 0 | 465 |",
        "| 3.8.0 | 1 | 60 | 0 | 0 | 0 | 0 | 465 |",
    ]


def test_the_longest_loop():
    body = ["--:-:-:Y:1\tFADD R1, R1, R2;"] * 3
    text = ["Function:f", "LBB0:", *body, "LBB1:", *body[:1], "--:-:-:Y:1\t@P0 BRA LBB1;", "01:-:-:Y:2\tBRA LBB0;"]
    end = ["LBB2:", "--:-:-:Y:0\tBRA LBB2;", "--:-:-:Y:0\tNOP;"]  # every program's last jump is to itself
    assert longest_loop("\n".join([*text, *end])) == 6
    assert longest_loop("\n".join([*body, *end])) == 0


def test_a_wait_behind_the_program_is_no_loop():
    """It spins there, and jumps back to where it was needed, which it may have passed by."""
    add, exit_ = "--:-:-:Y:1\tFADD R1, R1, R2;", "--:-:-:Y:1\tEXIT;"
    loop = ["LBB0:", add, "--:-:-:Y:1\t@!P0 BRA LBB2;", "LBB1:", add, "--:-:-:Y:1\t@P1 BRA LBB0;"]
    spin = ["LBB2:", add, "--:-:-:Y:1\t@!P0 BRA LBB2;", "--:-:-:Y:1\tBRA LBB1;"]
    assert longest_loop("\n".join([*loop, *[add] * 20, exit_, *spin])) == 7
    rare = ["--:-:-:Y:1\t@P2 BRA LBB4;", "LBB3:", *[add] * 9, exit_, "LBB4:", add, "--:-:-:Y:1\tBRA LBB3;"]
    assert longest_loop("\n".join(rare)) == 0


def test_jumps_that_have_no_label():
    """The disassembly names places of 16 bytes for them; what no jump reaches is in no loop."""
    add, exit_ = "--:-:-:Y:1\tFADD R1, R1, R2;", "--:-:-:Y:1\tEXIT;"
    loop = [add, *[add] * 3, "--:-:-:Y:1\tBRA.U !UP0, 0x10;", exit_]
    assert longest_loop("\n".join(loop)) == 4
    parted = ["LBB0:", add, "--:-:-:-:5\tBRA.DIV UR11, 0x50;", "LBB1:", add, "--:-:-:-:5\t@P0 BRA LBB0;", exit_, add]
    assert longest_loop("\n".join([*parted, *[add] * 9, "--:-:-:-:5\tBRA LBB1;"])) == 4
    unreached = ["LBB0:", add, add, exit_, "LBB9:", *[add] * 9, "--:-:-:Y:1\tBRA LBB0;"]
    assert longest_loop("\n".join(unreached)) == 0


def test_each_function_is_collected_once():
    found, unreached = collect(90, headline=True)
    names = [(kernel, launch.kernel.__name__) for kernel, launch, _ in found]
    assert len(names) == len(set(names)) and {kernel for kernel, _ in names} == set(KERNELS) and not unreached
