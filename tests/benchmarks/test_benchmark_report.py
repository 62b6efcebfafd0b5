"""REPORT.md and the page with plots, from result files."""

import copy
import html
import json
import re
from html.parser import HTMLParser

import pytest

from benchmarks import report
from benchmarks.harness import BenchmarkError
from benchmarks.reporting import tables as report_tables
from benchmarks.reporting.headline import HEADLINE, Headline, headline
from benchmarks.reporting.rows import load_rows, superseded_files
from ldmseg_fast.distributed.ending import run_command


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


@pytest.fixture
def write(tmp_path, record):
    """`write("data-1", row, ...)`: a result file of these rows."""

    def write_rows(name, *rows, **changed):
        value = {"variant": "ours", "case": {}, "unit": "ms", "value": 1.0}
        content = record | {"results": [value | row for row in rows]} | changed
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return write_rows


def values(suite, folder):
    return [row["value"] for row in load_rows(suite, folder)]


def test_a_newer_file_replaces_all_rows_of_a_subject(results):
    rows = {(row["name"], row["variant"]): row for row in load_rows("latency", results)}
    assert set(rows) == {("whole image", "ours"), ("one step", "ours")}
    assert rows["whole image", "ours"]["p50"] == 7.0
    assert rows["whole image", "ours"]["file"] == "latency-1.json"


def test_a_name_that_is_measured_no_more_goes_with_its_subject(write):
    """The names before a comma or a bracket, and names that differ by a number, are of one function."""
    names = ["growth, of it the JSON", "in memory", "10 steps", "attention forward [4, 64]"]
    write("evaluation-1", *({"name": name, "value": 1.0} for name in names))
    folder = write("evaluation-2", {"name": "growth, per image", "value": 2.0}, {"name": "4 steps", "value": 2.0})
    assert {row["name"] for row in load_rows("evaluation", folder)} == {
        "in memory", "attention forward [4, 64]", "growth, per image", "4 steps",
    }  # fmt: skip
    write("evaluation-3", {"name": "attention forward [16, 256]", "value": 3.0})
    assert values("evaluation", folder) == [1.0, 2.0, 2.0, 3.0]


@pytest.mark.parametrize(("key", "one", "other"), [("model", "tiny", "photographs"), ("vnni", True, False)])
def test_models_and_kinds_of_processor_are_subjects_of_their_own(write, key, one, other):
    write("quantised-1", {"name": "one step", "value": 1.0, "case": {key: one}})
    folder = write("quantised-2", {"name": "one step", "value": 2.0, "case": {key: other}})
    assert values("quantised", folder) == [1.0, 2.0]
    write("quantised-3", {"name": "one step", "value": 3.0, "case": {key: one}})
    assert values("quantised", folder) == [2.0, 3.0]


def test_rows_of_one_file_stand_together(write):
    """Ours may stand beside two baselines in one run."""
    folder = write("evaluation-1", {"name": "from files", "value": 1.0}, {"name": "from files", "value": 2.0})
    assert values("evaluation", folder) == [1.0, 2.0]


def pq(value, model="model", steps=1, solver="ddim", data="scenes", **more):
    case = {"data": data, "split": "val2017", "images": 8, "mode": "class-agnostic", "steps": steps, "solver": solver}
    return {"name": "PQ", "variant": model, "unit": "%", "case": case, "value": value, **more}


def test_a_model_is_replaced_on_its_data_whatever_the_steps(write):
    write("quality-1", pq(1.0), pq(1.5, steps=4), pq(1.6, solver="heun"), pq(1.7, data="photographs"), pq(1.8, "other"))
    folder = write("quality-2", pq(2.0))
    assert values("quality", folder) == [1.6, 1.7, 1.8, 2.0]


def test_other_weights_replace_a_model_everywhere(write):
    write("quality-1", pq(1.0, "unknown weights"), pq(1.1, weights="a"), pq(1.2, data="photographs", weights="a"))
    folder = write("quality-2", pq(2.0, solver="heun", weights="a"))
    assert values("quality", folder) == [1.0, 1.1, 1.2, 2.0]
    write("quality-3", pq(3.0, steps=9, weights="b"), pq(3.1, "unknown weights", data="photographs", weights="c"))
    assert values("quality", folder) == [3.0, 3.1]
    assert [path.name for path in superseded_files(folder)] == ["quality-1.json", "quality-2.json"]


@pytest.mark.parametrize(
    "way", [{"annotators": 3}, {"trainings": 3}, {"mask_threshold": 0.3}, {"overlap_threshold": 0.4}]
)
def test_means_and_other_thresholds_replace_a_plain_row(write, way):
    write("quality-1", pq(1.0))
    row = pq(2.0)
    folder = write("quality-2", row | {"case": row["case"] | way})
    assert values("quality", folder) == [2.0]


def test_a_part_of_the_long_tests_replaces_its_tests_and_a_whole_campaign_all(write):
    write("soak-1", {"name": "a test that was renamed", "value": 1.0}, {"name": "another", "value": 1.5})
    assert values("soak", write("soak-2", {"name": "another", "value": 2.0})) == [1.0, 2.0]
    folder = write("soak-3", {"name": "another", "value": 3.0}, {"name": "tests", "value": 1.0})
    assert values("soak", folder) == [3.0, 1.0]


def test_quick_runs_are_no_results(results, record):
    (results / "latency-2.json").write_text(json.dumps(record | {"quick": True}))
    assert len(load_rows("latency", results)) == 2
    assert [path.name for path in superseded_files(results)] == ["latency-2.json"]


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


def test_a_marker_of_no_suite_is_named(results):
    with pytest.raises(BenchmarkError, match=r"results:latecny.*headline or latency"):
        report.render("<!-- results:latecny -->\nold\n<!-- end -->\n", results)


LINE = Headline("a picture", "latency", "whole image", {"batch": 1}, "ours", "plain", "a plain loop", {"steps": 4})


def test_the_headline_puts_ours_beside_the_baseline(write):
    rows = [
        {"name": "whole image", "case": {"batch": 1, "steps": 4, "more": "x"}, "value": 3.0},
        {"name": "whole image", "case": {"batch": 1, "steps": 9}, "value": 1.0},
        {"name": "whole image", "case": {"batch": 1}, "variant": "plain", "value": 12.34},
        {"name": "whole image", "case": {"batch": 2}, "variant": "plain", "value": 99.0},
    ]
    folder = write("latency-1", *rows)
    last = "a cpu, 2 cores, PyTorch 2.13.0, 2026-01-01 |"
    assert headline(folder, [LINE]).splitlines()[-1] == f"| a picture | 3 ms | 12.3 ms (a plain loop) | 4.1x | {last}"
    faster = [row | {"unit": "images/s"} for row in rows]
    text = headline(write("latency-2", *faster), [LINE])
    assert "| 3 images/s | 12.3 images/s (a plain loop) | 0.2x |" in text  # more is better


@pytest.mark.parametrize("gone", ["ours", "plain"])
def test_a_missing_headline_row_is_named(write, gone):
    rows = [{"name": "whole image", "case": {"batch": 1, "steps": 4}, "variant": name} for name in ("ours", "plain")]
    folder = write("latency-1", *(row for row in rows if row["variant"] != gone))
    with pytest.raises(BenchmarkError, match=rf"'a picture'.*'latency' has no row 'whole image' of '{gone}'"):
        headline(folder, [LINE])


def test_the_command_names_a_missing_headline_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr("benchmarks.report.headline", lambda folder: headline(tmp_path / "empty"))
    (tmp_path / "README.md").write_text("<!-- results:headline -->\n<!-- end -->\n")
    assert run_command(lambda: report.main([])) == 2
    assert HEADLINE[0].what in capsys.readouterr().err
    assert not (tmp_path / "benchmarks").exists()  # nothing is written


def test_the_rendered_files_are_current():
    """Documents with markers and REPORT.md hold what the result files say, and no result file is stale."""
    assert report.main(["--check"]) == 0


def test_every_file_with_markers_is_rendered(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    names = (*report.WITH_MARKERS, "benchmarks/REPORT.md")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("<!-- results:headline -->\nold\n<!-- end -->\n")
    assert report.main(["--check"]) == 1
    err = capsys.readouterr().err
    assert all(f"{name}: not current" in err for name in names)
    assert report.main(["--html", str(tmp_path / "page.html")]) == 0
    assert HEADLINE[-1].what in (tmp_path / "docs" / "results.md").read_text()
    assert report.main(["--check"]) == 0


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
        own | {"variant": "model", "case": where | {"steps": 4, "views": "flip scales 1 medoid"}, "boundary_pq": 31.0},
    ]
    lines = report_tables.quality(rows).splitlines()[2:]
    assert lines == [
        "| model | scenes64 val2017, 8 | 4 steps | 50.0 | 70.0 | 71.5 |  | 3 |",
        "| model | scenes64 val2017, 8 | 4 steps, heun | 50.0 ± 0.3 | 70.0 | 71.5 |  | 15.5 |",
        "| auto-encoder | scenes64 val2017, 8 | random ids, 64 px | 50.0 | 70.0 | 71.5 |  |  |",
        "| model | scenes64 val2017, 8 | 4 steps, flip scales 1 medoid | 50.0 | 70.0 | 71.5 | 31.0 |  |",
        "| halves | scenes64 val2017, 8 |  | 50.0 | 70.0 | 71.5 |  |  |",
    ]
    aware = where | {"mode": "class-aware"}
    rows = [
        values | {"variant": "model", "case": aware | {"steps": 4}, "miou": 40.0, "category_accuracy": 91.24},
        values | {"variant": "halves + nearest neighbour", "case": aware, "miou": 20.0},
    ]
    assert report_tables.quality(rows).splitlines()[-2:] == [
        "| model | scenes64 val2017, 8 | 4 steps | 50.0 | 70.0 | 71.5 |  | 40.0 | 91.2 |",
        "| halves + nearest neighbour | scenes64 val2017, 8 |  | 50.0 | 70.0 | 71.5 |  | 20.0 |  |",
    ]
