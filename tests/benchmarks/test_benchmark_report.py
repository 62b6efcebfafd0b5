"""REPORT.md and the page with plots, from result files."""

import copy
import html
import json
import re
from html.parser import HTMLParser

import pytest

from benchmarks import report
from benchmarks.reporting import tables as report_tables


@pytest.fixture
def results(tmp_path, record):
    """A folder with two runs of one suite; the newer one measured one of the two rows again, in fewer variants."""
    older = copy.deepcopy(record)
    row = older["results"][0]
    row |= {"case": {"batch": 1, "steps": 10, "size": "64x64"}, "ratio": 1.0, "quality": {"pixels_alike": 1.0}}
    older["results"] = [row, row | {"variant": "gone"}, row | {"name": "one step"}]
    newer = copy.deepcopy(older)
    newer["results"] = [row | {"p50": 7.0}]
    for number, content in enumerate((older, newer)):
        (tmp_path / f"latency-{number}.json").write_text(json.dumps(content))
    return tmp_path


def test_of_each_name_the_newest_file_counts(results):
    rows = {(row["name"], row["variant"]): row for row in report_tables.load_rows("latency", results)}
    assert set(rows) == {("whole image", "ours"), ("one step", "ours")}
    assert rows["whole image", "ours"]["p50"] == 7.0
    assert rows["whole image", "ours"]["file"] == "latency-1.json"


def test_quick_runs_are_no_results(results, record):
    (results / "latency-2.json").write_text(json.dumps(record | {"quick": True}))
    assert len(report_tables.load_rows("latency", results)) == 2


def test_the_report_names_its_sources_and_gaps(results):
    text = report.report(results)
    assert "| whole image | batch 1, steps 10, size 64x64 | ours | 7 ms | 1.10 | 1.00x |  | 100.0% |" in text
    assert "`latency-1.json` (commit 00000000, load 0.0 before): `python x.py`" in text
    assert "No GPU has been measured yet" in text
    assert "Not measured yet: `python benchmarks/bench_throughput.py`." in text


def test_only_what_stands_between_markers_is_renewed(results):
    text = "before\n<!-- results:latency -->\nold\n<!-- end -->\nafter\n<!-- results:data -->\nold\n<!-- end -->\n"
    new = report.render(text, results)
    assert new.startswith("before\n<!-- results:latency -->\n\n| what |") and "7 ms" in new
    assert new.endswith("\n<!-- end -->\nafter\n<!-- results:data -->\n<!-- end -->\n")
    assert report.render(new, results) == new


def test_the_page_holds_every_plot_and_table(results, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.reporting.page import write_page
    from benchmarks.reporting.plots import INK, PLOTS

    write_page(tmp_path / "out" / "page.html", results)
    text = (tmp_path / "out" / "page.html").read_text()
    assert all(html.escape(title) in text for title, *_ in PLOTS)
    assert text.count("<svg") == 2  # latency against steps; the roof, which needs no measurement
    assert "<td>7 ms</td>" in text and "<summary>latency</summary>" in text and "python x.py" in text
    # one file that asks nothing of the network, in the colours of the reader's choice, as wide as the screen
    assert not re.search(r"https?:|@import|url\((?!#)|<link|<img|<script", text)
    assert "color-scheme: light dark" in text and "currentColor" in text and INK not in text
    assert 'content="width=device-width"' in text and "overflow-x: auto" in text
    write_page(tmp_path / "again.html", results)
    assert (tmp_path / "again.html").read_text() == text


def test_the_page_is_well_formed(results, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.reporting.page import write_page

    write_page(tmp_path / "page.html", results)
    open_tags = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "br", "hr", "img"):
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Parser().feed((tmp_path / "page.html").read_text())
    assert not open_tags


def test_the_command_writes_the_page_where_it_is_told(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    assert report.main(["--html", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").is_file() and (tmp_path / "benchmarks" / "REPORT.md").is_file()
    assert report.main(["--check"]) == 0


def test_quality_rows_of_every_kind():
    where = {"data": "scenes64", "split": "val2017", "images": 8, "mode": "generation"}
    values = {"value": 50.04, "sq": 70.0, "rq": 71.5}
    own = values | {"ms_per_image": 9.0}
    rows = [
        own | {"variant": "model", "case": where | {"steps": 4}, "cpu_minutes": 3.0},
        own
        | {"variant": "model", "case": where | {"steps": 4, "solver": "heun"}, "deviation": 0.31}
        | {"cpu_minutes": 3.0, "cpu_minutes_in_all": 15.5},
        own | {"variant": "auto-encoder", "case": where | {"ids": "random", "size": 64}},
        values | {"variant": "halves", "case": where},
        values | {"variant": "halves", "case": where | {"steps": 4}},
    ]
    lines = report_tables.quality(rows).splitlines()[2:]
    assert lines == [
        "| model | scenes64 val2017, 8 | 4 steps | 50.0 | 70.0 | 71.5 | 3 |",
        "| model | scenes64 val2017, 8 | 4 steps, heun | 50.0 ± 0.3 | 70.0 | 71.5 | 15.5 |",
        "| auto-encoder | scenes64 val2017, 8 | random ids, 64 px | 50.0 | 70.0 | 71.5 |  |",
        "| halves | scenes64 val2017, 8 |  | 50.0 | 70.0 | 71.5 |  |",
    ]
