"""What the campaign of long tests leaves behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import soak
from benchmarks.harness import BenchmarkError, Run
from benchmarks.soak import record_report

REPORT = """<testsuites><testsuite>
<testcase classname="tests.training.test_resume" name="test_kills" time="12.5"><properties>
  <property name="kills" value="100"/><property name="resumed" value="100"/></properties></testcase>
<testcase classname="tests.training.test_faults" name="test_disk" time="0.1"><skipped message="no right"/></testcase>
{}</testsuite></testsuites>"""


def test_a_row_for_each_test_and_each_count(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT.format(""))
    record = Run("soak")
    record_report(record, tmp_path / "report.xml")
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


@pytest.mark.parametrize(("arguments", "names"), [([], ["soak"]), (["-k", "kills"], []), (["--out", "x"], ["soak"])])
def test_a_part_of_the_tests_replaces_no_campaign(
    arguments: list[str], names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_tests(report: Path, _: list[str]) -> int:
        report.write_text(REPORT.format(""))
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.setattr(soak, "run_tests", run_tests)
    monkeypatch.setattr(soak, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["soak.py", *arguments])
    assert soak.main() == 0
    assert [path.name.partition("-")[0] for path in tmp_path.rglob("soak-*.json")] == names
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k kills")
    monkeypatch.setattr(sys, "argv", ["soak.py"])
    assert soak.main() == 0 and len(list(tmp_path.rglob("soak-*.json"))) == len(names)


def test_a_failure_is_not_recorded(tmp_path: Path) -> None:
    broken = '<testcase classname="tests.a" name="test_b" time="1"><failure message="no"/></testcase>'
    (tmp_path / "report.xml").write_text(REPORT.format(broken))
    with pytest.raises(BenchmarkError, match="a::test_b"):
        record_report(Run("soak"), tmp_path / "report.xml")
