"""The GPU suite ends in time and survives its parts; its table says what is met and what was not measured."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks import gpu_suite
from benchmarks.harness import Run, validate
from benchmarks.reporting import gpu_targets


def python(code):
    return (sys.executable, "-c", code)


def test_parts_may_fail_hang_or_be_missing(tmp_path, record, capsys):
    (tmp_path / "source.txt").write_text(json.dumps(record))
    copy = f"import shutil; shutil.copy({str(tmp_path / 'source.txt')!r}, {str(tmp_path / 'latency-1.json')!r})"
    parts = [
        gpu_suite.Part("fails", python("raise SystemExit('no such kernel')"), 0.5),
        gpu_suite.Part("leaves half a file", python(f"open({str(tmp_path / 'x.json')!r}, 'w').write('{{')"), 0.5),
        gpu_suite.Part("is not there", ("/nowhere/python",), 0.5),
        gpu_suite.Part("measures", python(copy), 0.5),
        gpu_suite.Part("hangs", python("import time; print('begun', flush=True); time.sleep(600)"), 0.1),
    ]
    run = Run("gpu", quick=True)
    started = time.monotonic()
    gpu_suite.run_suite(run, parts, tmp_path, started + 60)
    assert time.monotonic() - started < 60
    outcome = {row["variant"]: row for row in run.results if row["name"] == "part"}
    statuses = [outcome[part.name]["status"] for part in parts]
    assert statuses == ["failed", "passed", "failed", "passed", "late"]
    assert "no such kernel" in outcome["fails"]["output"] and "begun" in outcome["hangs"]["output"]
    assert any(row["name"] == "whole image" for row in run.results)
    assert "x.json" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.json"))
    run.save(tmp_path)


def test_ended_from_outside_it_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    child = tmp_path / "child"
    code = f"import os, time; open({str(child)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parts = [gpu_suite.Part("measured", python("print(1)"), 0.5), gpu_suite.Part("under way", python(code), 0.9)]
    monkeypatch.setattr(gpu_suite, "make_parts", lambda *_: parts)

    def end():
        while not (child.is_file() and child.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=end)
    thread.start()
    try:
        with pytest.raises(SystemExit, match="ended from outside"):
            gpu_suite.main(["--device", "cpu", "--quick", "--minutes", "1", "--out", str(tmp_path / "out")])
    finally:
        signal.signal(signal.SIGTERM, handler)
        thread.join()
    (path,) = (tmp_path / "out").glob("gpu-*.json")
    assert [row["variant"] for row in json.loads(path.read_text())["results"]] == ["measured"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(child.read_text()), 0)


def test_what_a_finished_part_leaves_running_is_ended(tmp_path):
    code = "import subprocess, sys\nprint(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid)"
    outcome = gpu_suite.run_part(gpu_suite.Part("leaves a child", python(code), 1.0), 60)
    assert outcome.status == "passed"
    child = Path(f"/proc/{int(outcome.output)}/stat")
    deadline = time.monotonic() + 10
    while child.is_file() and child.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.is_file() or child.read_text().split()[2] == "Z"


def test_without_weights_the_kernels_are_measured_all_the_same(tmp_path):
    parts = gpu_suite.make_parts("cuda", False, tmp_path / "model", tmp_path)
    names = [part.name for part in parts]
    assert names.index("kernels") < names.index("random weights") < names.index("UNet step")
    assert not any(str(tmp_path / "model") in part.command for part in parts[: names.index("random weights")])


def test_without_time_nothing_is_begun(tmp_path):
    run = Run("gpu", quick=True)
    gpu_suite.run_suite(run, [gpu_suite.Part("late", python("1/0"), 0.5)], tmp_path, time.monotonic() + 6)
    assert run.results[0]["status"] == "no time left"


def test_the_table_knows_the_targets():
    ours = {"baseline": "diffusers", "unit": "ms", "ratio": 6.0, "bytes": None, "floor_share": 0.5}
    rows = [
        {"name": "whole image", "variant": "torch bfloat16, graph", "case": {"batch": 1, "steps": 4}, "p50": 12.0}
        | ours,
        {"name": "whole image", "variant": "diffusers", "case": {"batch": 1, "steps": 4}, "p50": 5.0} | ours,
        {"name": "one step", "variant": "torch bfloat16", "case": {"batch": 16}, "p50": 1.9} | ours,
        {"name": "copy bandwidth", "variant": "torch", "case": {}, "value": 4000.0, "unit": "GB/s"},
        {"name": "mask_bits encode 512x512", "variant": "triton", "case": {"batch": 16}, "p50": 0.016}
        | ours
        | {"baseline": "torch", "ratio": 20.0, "bytes": 0.9 * 4000.0e9 * 0.016e-3},
    ]
    lines = {line[0]: line[1:] for line in gpu_targets.table_rows(rows)}
    assert lines["whole image, 4 steps"] == ["<= 14 ms, >= 5x", "12 ms (torch bfloat16, graph)", "6.00x", "50%", "yes"]
    assert lines["UNet step, batch 16"][-1] == "no"
    assert lines["bit planes, encode"][1:] == ["0.001 ms (triton), 90% of copy", "20.00x", "50%", "yes"]
    assert lines["training, per image"][1] == "not measured"
    assert "whole image, 4 steps" in gpu_targets.format_table(rows)


def test_a_machine_without_a_gpu_is_told(script):
    done = script("gpu_suite", "--minutes", 1)
    if "no CUDA device" not in done.stderr:
        pytest.skip("there is a GPU")
    assert done.returncode == 1


@pytest.mark.serial
def test_dry_run(script, tmp_path):
    minutes = 1.5
    started = time.monotonic()
    parts = ["UNet step", "profile"]
    done = script("gpu_suite", "--quick", "--device", "cpu", "--minutes", minutes, "--only", *parts, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 60 * minutes + 10
    (path,) = tmp_path.glob("gpu-*.json")
    record = json.loads(path.read_text())
    validate(record)
    assert record["quick"] and "UNet step, batch 1" in done.stdout
    assert {row["variant"] for row in record["results"] if row["name"] == "part"} == {*parts, "random weights"}
    assert str(tmp_path) not in path.read_text()
