"""Runs the long tests and records what they found.

They kill while saving, lose ranks, try every ZeRO stage and two launchers, fuzz the readers of PNG and JSON and the
panoptic head, and run the C++ under sanitizers.

python benchmarks/soak.py [--out FOLDER] [pytest arguments]

One row a test, in seconds, with what it counted (`record_property`); nothing is recorded where one fails. A part of the
tests is no campaign: with pytest arguments a record is written only into the FOLDER that is asked for.
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
from ldmseg_fast.distributed.ending import run_command


def run_tests(report: Path, arguments: list[str]) -> int:
    command = [sys.executable, "-m", "pytest", "-m", "soak", f"--junitxml={report}", *arguments]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def record_report(record: Run, report: Path) -> None:
    """Adds a row for each test of a JUnit file that ran, and one for each number that it counted."""
    skipped = 0
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.attrib['classname'].removeprefix('tests.')}::{case.attrib['name']}"
        if case.find("skipped") is not None:
            skipped += 1
            continue
        record.check(name, case.find("failure") is None and case.find("error") is None)
        record.add_value(name, float(case.attrib["time"]), "s", variant="duration")
        for item in case.iter("property"):
            record.add_value(name, float(item.attrib["value"]), item.attrib["name"], variant="counted")
    record.add_value("tests", len(record.checks), "passed")
    record.add_value("tests", skipped, "skipped", variant="skipped")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    args, arguments = parser.parse_known_args()
    is_part = bool(arguments or os.environ.get("PYTEST_ADDOPTS"))
    record = Run("soak", quick=is_part)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = run_tests(report, arguments)
        try:
            record_report(record, report)
            record.check("pytest ended well", code == 0)
        except BenchmarkError as error:
            print(f"error: {error}", file=sys.stderr)
            return code or 1
    if args.out is None and is_part:
        print("not recorded: a part of the long tests")
    else:
        record.save(args.out or RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
