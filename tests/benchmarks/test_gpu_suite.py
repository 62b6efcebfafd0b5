"""The GPU suite ends in time and survives its parts; its table says what is met and what was not measured."""

import importlib
import importlib.util
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks import gpu_suite
from benchmarks.harness import Run, validate
from benchmarks.reporting import gpu_targets
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.kernels.backend import KERNELS
from ldmseg_fast.stopping import Terminated, terminable


def python(code):
    return (sys.executable, "-c", code)


def make_suite(tmp_path, parts, seconds=60.0):
    """One part a stage, with `seconds` left."""
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    return gpu_suite.Suite([[part] for part in parts], work, time.monotonic() + seconds)


def copying(tmp_path, record, name="latency-1.json", text=None):
    """Code that leaves a result file in the part's folder."""
    source = tmp_path / f"source-{name}.txt"
    source.write_text(text or json.dumps(record))
    return f"import shutil; shutil.copy({str(source)!r}, '{{out}}/{name}')"


def test_parts_may_fail_hang_or_be_missing(tmp_path, record):
    parts = [
        gpu_suite.Part("fails", python("raise SystemExit('no such kernel')"), 30),
        gpu_suite.Part("leaves half a file", python("open('{out}/x.json', 'w').write('half')"), 30),
        gpu_suite.Part("is not there", ("/nowhere/python",), 30),
        gpu_suite.Part("measures", python(copying(tmp_path, record)), 30),
        gpu_suite.Part("hangs", python("import time; print('begun', flush=True); time.sleep(600)"), 2),
        gpu_suite.Part("needs what failed", python("print(1)"), 30, ("fails",)),
    ]
    suite = make_suite(tmp_path, parts)
    suite.run()
    statuses = [suite.done[part.name].status for part in parts]
    assert statuses == ["failed", "passed", "failed", "passed", "late", "left out"]
    run = Run("gpu", quick=True)
    suite.fill(run)
    rows = {row["variant"]: row for row in run.results if row["name"] == "part"}
    assert "no such kernel" in rows["fails"]["output"] and "begun" in rows["hangs"]["output"]
    assert rows["hangs"]["red"].startswith("late after ") and "x.json" in rows["leaves half a file"]["output"]
    assert "without fails" in rows["needs what failed"]["output"]
    assert any(row["name"] == "whole image" for row in run.results)
    assert {row["variant"] for row in run.red} == {"fails", "is not there", "hangs", "needs what failed"}
    run.save(tmp_path)


def test_a_late_part_keeps_the_rows_that_it_measured(tmp_path):
    code = (
        "import time\nfrom pathlib import Path\nfrom benchmarks.harness import Run\n"
        "run = Run('trial', quick=True, folder=Path('{out}'))\nrun.add_value('first', 1.5, 'ms')\n"
        "run.add_red('second', 'ours', 'differs from torch')\ntime.sleep(600)"
    )
    suite = make_suite(tmp_path, [gpu_suite.Part("slow", python(code), 15)])
    suite.run()
    assert suite.done["slow"].status == "late"
    assert [(row["name"], "red" in row) for row in suite.done["slow"].results] == [("first", False), ("second", True)]


def test_parts_of_a_stage_run_beside_each_other(tmp_path):
    """Each waits for a file of the other."""
    code = (
        "import time; from pathlib import Path; Path('{out}/../{own}').touch()\n"
        "while not Path('{out}/../{other}').exists(): time.sleep(0.05)"
    )
    codes = [code.replace("{own}", own).replace("{other}", other) for own, other in ("ab", "ba")]
    parts = [gpu_suite.Part(name, python(code), 20) for name, code in zip(("one", "two"), codes)]
    outcomes = gpu_suite.run_stage(parts, 30, tmp_path)
    assert [outcome.status for outcome in outcomes] == ["passed", "passed"]


def test_an_interrupted_suite_goes_on(tmp_path, record):
    """A part that the suite's own end cut off is measured again; what ended for good is not."""
    count = tmp_path / "count"
    once = f"open({str(count)!r}, 'a').write('x'); " + copying(tmp_path, record)
    flag = tmp_path / "quick now"
    slow = f"import time; from pathlib import Path; time.sleep(0 if Path({str(flag)!r}).exists() else 600)"
    parts = [gpu_suite.Part("measured", python(once), 30), gpu_suite.Part("cut", python(slow), 300)]
    first = make_suite(tmp_path, parts, seconds=gpu_suite.CLOSING_SECONDS + gpu_suite.LEAST_SECONDS + 3)
    first.run()
    assert {name: outcome.status for name, outcome in first.done.items()} == {"measured": "passed", "cut": "cut"}
    with (first.work / gpu_suite.STATE).open("a") as file:
        file.write('{"part": "half a li')  # what a suite that is killed leaves
    flag.touch()
    second = make_suite(tmp_path, parts)
    second.load()
    assert [part.name for stage in second.missing() for part in stage] == ["cut"]
    second.run()
    assert {outcome.status for outcome in second.done.values()} == {"passed"} and not second.missing()
    third = make_suite(tmp_path, parts)
    third.load()
    assert not third.missing()
    assert len(second.done["measured"].results) == len(record["results"]) and count.read_text() == "x"


def test_an_old_suite_is_not_overwritten_and_none_is_invented(tmp_path, capsys):
    (tmp_path / gpu_suite.STATE).write_text("")
    with pytest.raises(ArgumentError, match="--resume to go on"):
        gpu_suite.main(["--device", "cpu", "--quick", "--work", str(tmp_path)])
    with pytest.raises(ArgumentError, match="no folder of an unfinished suite"):
        gpu_suite.main(["--device", "cpu", "--quick", "--work", str(tmp_path / "other"), "--resume"])
    with pytest.raises(ArgumentError, match=r"no such part; there are .*UNet step"):
        gpu_suite.main(["--device", "cpu", "--quick", "--only", "unet"])


def test_ended_from_outside_it_keeps_what_was_measured(tmp_path, monkeypatch):
    child = tmp_path / "child"
    code = f"import os, time; open({str(child)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parts = [gpu_suite.Part("measured", python("print(1)"), 30), gpu_suite.Part("under way", python(code), 50)]
    monkeypatch.setattr(gpu_suite, "make_plan", lambda *_: [[part] for part in parts])

    def end():
        while not (child.is_file() and child.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=end)
    thread.start()
    try:
        with pytest.raises(Terminated), terminable():
            gpu_suite.main(["--device", "cpu", "--quick", "--minutes", "1", "--out", str(tmp_path / "out")])
    finally:
        thread.join()
    (path,) = (tmp_path / "out").glob("gpu-*.json")
    assert [row["variant"] for row in json.loads(path.read_text())["results"]] == ["measured"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(child.read_text()), 0)


def test_what_a_finished_part_leaves_running_is_ended(tmp_path):
    code = "import subprocess, sys\nprint(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid)"
    [outcome] = gpu_suite.run_stage([gpu_suite.Part("leaves a child", python(code), 60)], 60, tmp_path)
    assert outcome.status == "passed"
    child = Path(f"/proc/{int(outcome.output)}/stat")
    deadline = time.monotonic() + 10
    while child.is_file() and child.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.is_file() or child.read_text().split()[2] == "Z"


@pytest.mark.parametrize(("plan", "most"), [("short", 22), ("long", 60)])
def test_the_plan_begins_with_tests_and_weights(tmp_path, plan, most):
    stages = gpu_suite.make_plan(plan, "cuda", False, tmp_path, tmp_path / "tuned.json")
    parts = {part.name: part for stage in stages for part in stage}
    first = [part.name for part in stages[0]]
    assert first == [*(f"tests of {kernel}" for kernel in KERNELS), "random weights", "random weights, coco-fast"]
    assert all(part.needs == (f"tests of {name}",) for name, part in parts.items() if name in KERNELS)
    assert "random weights" in parts["whole image, compiled"].needs and parts["tuning"].command[-3].endswith("json")
    assert {need for part in parts.values() for need in part.needs} <= parts.keys()
    assert all(len(stage) == 1 for stage in stages[1:])
    assert sum(max(part.limit for part in stage) for stage in stages) < 60 * most


@pytest.mark.parametrize("plan", ["short", "long"])
@pytest.mark.parametrize(("device", "quick"), [("cuda", False), ("cpu", True)])
def test_every_command_line_of_the_plan_is_understood(tmp_path, monkeypatch, understands, plan, device, quick):
    """Options may change: each script's own parser reads what the suite gives it."""
    find = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: name == "tensorrt" or find(name))
        patch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
        stages = gpu_suite.make_plan(plan, device, quick, tmp_path, tmp_path / "tuned.json")
    for stage in stages:
        for part in stage:
            command = part.command[part.command.index(sys.executable) :]  # behind ncu and its options
            words = [word.replace("{minutes}", "0.5").replace("{out}", str(tmp_path)) for word in command[1:]]
            if words[0] == "-m" and words[1] != "pytest":
                module = importlib.import_module(words[1])
                arguments = words[2:]
            elif words[0] != "-m":
                module = importlib.import_module("ldmseg_fast." + words[0].removesuffix(".py").replace("/", "."))
                arguments = words[1:]
            else:
                assert all((gpu_suite.ROOT / word).is_file() for word in words if word.endswith(".py"))
                continue
            understands(module, arguments)


def test_without_time_nothing_is_begun(tmp_path):
    suite = make_suite(tmp_path, [gpu_suite.Part("late", python("1/0"), 30)], seconds=6)
    suite.run()
    assert suite.done["late"].status == "cut" and suite.missing()


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
    red = {"name": "whole image", "variant": "torch", "case": {"batch": 1, "steps": 1}, "unit": "", "red": "too late"}
    assert "red: too late" in gpu_targets.format_table([*rows, red])
    assert lines["UNet step in fp8, batch 16"][1] == lines["coco-fast, whole image, batch 16"][1] == "not measured"


def test_the_table_keeps_models_and_precisions_apart():
    about = {"baseline": "diffusers", "unit": "ms", "ratio": 6.0, "bytes": None}
    fast = {"model": "coco-fast-random-weights", "batch": 16, "steps": 1}
    rows = [
        {"name": "whole image", "variant": "torch bfloat16, graph, fp8", "case": fast, "p50": 1.5} | about,
        {"name": "whole image", "variant": "torch bfloat16", "case": fast | {"batch": 1}, "p50": 1.9} | about,
        {"name": "one step", "variant": "torch bfloat16, graph, fp8", "case": {"batch": 1}, "p50": 1.7} | about,
        {"name": "one step", "variant": "torch bfloat16, graph, fp8 attention", "case": {"batch": 1}, "p50": 2.6}
        | about,
    ]
    lines = {line[0]: line[-1] for line in gpu_targets.table_rows(rows)}
    assert lines["coco-fast, whole image, batch 16"] == lines["UNet step in fp8, batch 1"] == "yes"
    assert lines["coco-fast, whole image, batch 1"] == lines["UNet step, batch 1"] == "no"
    assert lines["whole image, 1 step"] == ""


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
