"""The HTML page of a run."""

import json
import sys

import pytest

from ldmseg_fast.reports.page import Page
from ldmseg_fast.reports.run_page import quality_rows, write_run_report


def test_page_escapes_and_embeds(tmp_path):
    page = Page("A < B")
    page.table(["x", "y"], [["<b>", "1"]], strong=0)
    page.picture(b"png", "a & b")
    page.details("more", "a\n<c>")
    page.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "A &lt; B" in text and "&lt;b&gt;" in text and "base64,cG5n" in text and "<b>" not in text


def test_quality_rows():
    row = {"pq": 12.345, "sq": 50.0, "rq": 24.69}
    rows = quality_rows({"class_agnostic": row, "baselines": {"halves": row}})
    assert rows == [["model", "12.3", "50.0", "24.7"], ["halves", "12.3", "50.0", "24.7"]]


def test_report_of_a_run(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "val/pq": 12.5}]
    (tmp_path / "logs" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_run_report(tmp_path, tmp_path / "out" / "page.html")
    assert page.read_text().count("data:image/png;base64,") == 1
    with pytest.raises(FileNotFoundError, match=r"no logs/log\.jsonl"):
        write_run_report(tmp_path / "nothing", page)
    with (tmp_path / "logs" / "log.jsonl").open("a") as log:
        log.write('{"step": 3, "lo')  # a run that is writing
    assert write_run_report(tmp_path, page) == page
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"need matplotlib: pip install 'ldmseg_fast\[train\]'"):
        write_run_report(tmp_path, page)
