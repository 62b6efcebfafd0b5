"""Runs the long tests and records what they found.

They kill while saving, lose ranks, try every ZeRO stage and two launchers, fuzz the readers of PNG and JSON and the
panoptic head, run the C++ under sanitizers, build every configuration of the kernels, and export in every precision and
opset that `make test` leaves out.

python benchmarks/soak.py [--out FOLDER] [pytest arguments]

One row a test, in seconds, with what it counted (`record_property`). A test that fails is a red row, and the exit code
is 1. With pytest arguments only a part of the tests runs; its rows replace older ones of the same tests alone, so that
the campaign, which takes most of an hour, may be run in parts. The rows "tests" are those of a whole run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

from benchmarks.harness import RESULTS, ROOT, BenchmarkError, Run
from benchmarks.measuring.options import check_options
from ldmseg_fast.distributed.ending import run_command


def run_tests(report: Path, arguments: list[str]) -> int:
    command = [sys.executable, "-m", "pytest", "-m", "soak", f"--junitxml={report}", *arguments]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def record_report(record: Run, report: Path, whole: bool) -> None:
    """Adds a row for each test of a JUnit file that ran, and one for each number that it counted; then their number.

    whole: all long tests were asked for.
    """
    skipped = 0
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.attrib['classname'].removeprefix('tests.')}::{case.attrib['name']}"
        if case.find("skipped") is not None:
            skipped += 1
            continue
        failure = case.find("failure") if case.find("failure") is not None else case.find("error")
        if failure is not None:
            record.add_red(name, "duration", (failure.attrib.get("message") or "failed").splitlines()[0])
            continue
        record.check(name, True)
        record.add_value(name, float(case.attrib["time"]), "s", variant="duration")
        for item in case.iter("property"):
            record.add_value(name, float(item.attrib["value"]), item.attrib["name"], variant="counted")
    if whole:
        record.add_value("tests", len(record.checks), "passed")
        record.add_value("tests", skipped, "skipped", variant="skipped")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args, arguments = parser.parse_known_args()
    check_options(args)
    record = Run("soak")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = run_tests(report, arguments)
        if not report.is_file() or code not in (0, 1):  # 1: tests failed
            raise BenchmarkError(f"pytest ended with exit code {code}: nothing is recorded")
        record_report(record, report, whole=not (arguments or os.environ.get("PYTEST_ADDOPTS")))
    record.save(args.out)
    return code


if __name__ == "__main__":
    sys.exit(run_command(main))
