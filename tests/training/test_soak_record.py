"""What the campaign of long tests leaves behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import soak
from benchmarks.harness import BenchmarkError, Run
from benchmarks.reporting.rows import load_rows
from benchmarks.soak import record_report

REPORT = """<testsuites><testsuite>
<testcase classname="tests.training.test_resume" name="test_kills" time="12.5"><properties>
  <property name="kills" value="100"/><property name="resumed" value="100"/></properties></testcase>
<testcase classname="tests.training.test_faults" name="test_disk" time="0.1"><skipped message="no right"/></testcase>
{}</testsuite></testsuites>"""


def test_a_row_for_each_test_and_each_count(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT.format(""))
    record = Run("soak")
    record_report(record, tmp_path / "report.xml", whole=True)
    found = {(row["name"], row["unit"]): row["value"] for row in record.results}
    name = "training.test_resume::test_kills"
    assert found == {
        (name, "s"): 12.5,
        (name, "kills"): 100.0,
        (name, "resumed"): 100.0,
        ("tests", "passed"): 1.0,
        ("tests", "skipped"): 1.0,
    }
    assert record.save(tmp_path).is_file()


@pytest.mark.parametrize(("arguments", "whole"), [([], True), (["-k", "kills"], False)])
def test_a_part_replaces_its_own_tests_alone(
    arguments: list[str], whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_tests(report: Path, _: list[str]) -> int:
        report.write_text(REPORT.format(""))
        return 0

    older = Run("soak")
    older.environment["time"] = "2026-01-01T00:00:00Z"
    older.add_value("training.test_resume::test_kills", 7, "kills", variant="counted")
    older.add_value("csrc.test_fuzz::test_pngs", 9, "files", variant="counted")
    older.save(tmp_path)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.setattr(soak, "run_tests", run_tests)
    monkeypatch.setattr(sys, "argv", ["soak.py", "--out", str(tmp_path), *arguments])
    assert soak.main() == 0
    counted = {(row["name"], row["unit"]): row["value"] for row in load_rows("soak", tmp_path)}
    assert counted["training.test_resume::test_kills", "kills"] == 100
    assert (("csrc.test_fuzz::test_pngs", "files") in counted) == (not whole)
    assert (("tests", "passed") in counted) == whole


def test_a_failure_is_a_red_row_and_the_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = '<testcase classname="tests.a" name="test_b" time="1"><failure message="no&#10;more"/></testcase>'

    def run_tests(report: Path, _: list[str]) -> int:
        report.write_text(REPORT.format(broken))
        return 1

    monkeypatch.setattr(soak, "run_tests", run_tests)
    monkeypatch.setattr(sys, "argv", ["soak.py", "--out", str(tmp_path)])
    assert soak.main() == 1
    [path] = tmp_path.glob("soak-*.json")
    rows = json.loads(path.read_text())["results"]
    assert [(row["name"], row["red"]) for row in rows if "red" in row] == [("a::test_b", "no")]
    assert any(row["name"] == "training.test_resume::test_kills" for row in rows)


def test_a_campaign_that_does_not_end_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "run_tests", lambda *_: 2)
    monkeypatch.setattr(sys, "argv", ["soak.py", "--out", str(tmp_path)])
    with pytest.raises(BenchmarkError, match="exit code 2: nothing is recorded"):
        soak.main()
    assert not list(tmp_path.iterdir())
