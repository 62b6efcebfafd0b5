"""The benchmark harness: what is recorded, what is refused."""

import copy
import json
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def harness():
    from benchmarks import harness

    return harness


def _run(harness, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "harness.py"), *arguments])
    run = harness.Run("trial", quick=True)
    timings = harness.measure({"slow": lambda: time.sleep(2e-3), "fast": lambda: None}, warmup=1, rounds=6)
    run.add("sleep", timings, baseline="slow", case={"ms": 2}, target=2.0, items=2)
    run.add_value("pq", 51.7, "percent")
    return run


def test_a_run_is_saved_whole(harness, monkeypatch, tmp_path, capsys):
    run = _run(harness, monkeypatch, "--data", str(ROOT / "tests"), "--out=/nowhere/private/place", "--quick")
    run.check("equal", True)
    path = run.save(tmp_path)
    record = json.loads(path.read_text())
    harness.validate(record)
    assert record["environment"]["command"] == "python benchmarks/harness.py --data tests --out=.../place --quick"
    assert str(ROOT) not in path.read_text()
    assert {"cuda", "gpu", "commit", "cpu", "packages"} <= record["environment"].keys()
    slow, fast, value = record["results"]
    assert slow["ratio"] == 1.0
    assert fast["ratio"] > 2
    assert 1.0 <= slow["p50"] < 20  # two items a call
    assert slow["p5"] <= slow["p20"] <= slow["p50"] <= slow["p99"]
    assert value["value"] == 51.7
    before = path.read_bytes()
    assert run.save(tmp_path).name == f"{path.stem}-2.json" and path.read_bytes() == before  # nothing is overwritten
    assert "sleep" in capsys.readouterr().out


def test_a_red_check_records_nothing(harness, monkeypatch, tmp_path):
    run = _run(harness, monkeypatch)
    with pytest.raises(harness.BenchmarkError, match="check failed, nothing is recorded: equal"):
        run.check("equal", False)
    with pytest.raises(harness.BenchmarkError, match="red checks"):
        run.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_killed_keeps_its_rows(harness, tmp_path):
    """Each row is a line of the journal from the moment it is measured; saving replaces the journal by the whole."""
    run = harness.Run("trial", quick=True, folder=tmp_path)
    run.check("equal", True)
    run.add_value("pq", 51.7, "percent")
    run.add_red("sleep", "ours", "differs from torch", case={"ms": 2})
    [journal] = tmp_path.iterdir()
    with journal.open("a") as file:
        file.write('{"row": {"na')
    record = harness.read_journal(journal)
    assert record["results"] == run.results and record["checks"] == {"equal": True} and record["suite"] == "trial"
    assert [row["red"] for row in run.red] == ["differs from torch"]
    path = run.save(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert harness.read_results(path)["results"] == run.results
    for text in ("", "no journal\n", '{"schema": 1}\n'):
        journal.write_text(text)
        with pytest.raises(harness.BenchmarkError, match="no journal of a run"):
            harness.read_journal(journal)


def test_two_runs_of_one_second_keep_both(harness, tmp_path):
    runs = [harness.Run("trial", quick=True, folder=tmp_path) for _ in range(2)]
    for run, value in zip(runs, (1.0, 2.0)):
        run.environment["time"] = "2026-11-29T12:00:00Z"
        run.add_value("pq", value, "percent")
    assert len(list(tmp_path.iterdir())) == 2
    paths = [run.save(tmp_path) for run in runs]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert [harness.read_results(path)["results"][0]["value"] for path in paths] == [1.0, 2.0]


def test_a_red_row_ends_what_older_runs_say(harness, tmp_path, record):
    from benchmarks.reporting.rows import load_rows

    (tmp_path / "latency-1.json").write_text(json.dumps(record))
    assert [row["name"] for row in load_rows("latency", tmp_path)] == ["whole image", "PQ"]
    red = {"name": "PQ", "variant": "ours", "case": {}, "unit": "", "red": "differs"}
    (tmp_path / "latency-2.json").write_text(json.dumps(record | {"results": [red]}))
    assert [row["name"] for row in load_rows("latency", tmp_path)] == ["whole image"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("suite"), "`suite`"),
        (lambda r: r["environment"].pop("commit"), "environment.commit"),
        (lambda r: r["environment"].pop("cuda"), "environment.cuda"),
        (lambda r: r["environment"].update(gpu=None), "environment.gpu.name"),
        (lambda r: r.update(results=[]), "`results` is empty"),
        (lambda r: r["results"].insert(0, 3), r"`results\[0\]` must be an object, got 3"),
        (lambda r: r["results"][0].update(p50=float("nan")), r"results\[0\].p50"),
        (lambda r: r["results"][0].pop("variant"), r"results\[0\].variant"),
        (lambda r: r["results"][2].update(value=None), r"results\[2\].value"),
    ],
)
def test_the_schema_is_kept(harness, monkeypatch, tmp_path, change, message):
    run = _run(harness, monkeypatch)
    record = json.loads(run.save(tmp_path).read_text())
    broken = copy.deepcopy(record)
    change(broken)
    with pytest.raises(harness.BenchmarkError, match=message):
        harness.validate(broken)


@pytest.mark.parametrize("content", ["null", "[]", "3", "[" * 200_000, "{", ""])
def test_files_that_hold_no_results(harness, tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(harness.BenchmarkError, match=r"a\.json: no result file \((?!.*attribute)"):
        harness.read_results(tmp_path / "a.json")


def test_saved_results_follow_the_schema(harness):
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        harness.validate(json.loads(path.read_text()))


def test_peak_memory_sees_a_temporary(harness):
    needed = harness.peak_memory(lambda: bytearray(64 * 2**20))
    if needed is None:
        pytest.skip("this system does not tell peak memory")
    assert 60 * 2**20 < needed < 80 * 2**20


@pytest.mark.parametrize(("apart", "passed", "attempts"), [(1.02, True, 1), (1.05, False, 3)])
def test_a_against_a(harness, monkeypatch, capsys, apart, passed, attempts):
    first, second = (harness.Timing(tuple(factor * ms for ms in (9.0, 10.0, 11.0))) for factor in (1.0, apart))
    monkeypatch.setattr(harness, "measure", lambda *_, **__: {"A": first, "A again": second})
    assert harness.self_test() is passed
    out = capsys.readouterr().out
    assert out.count("A/A") == attempts and "p80/p20 1.128" in out


@pytest.mark.soak  # a statement about the machine: it must be idle
def test_a_against_a_is_within_three_percent(harness):
    assert harness.self_test()


def test_a_broken_result_file_is_named(harness, tmp_path):
    for name, text in (("half.json", '{"schema": 1'), ("empty.json", "{}"), ("list.json", "[]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(harness.BenchmarkError, match=name):
            harness.read_results(tmp_path / name)
    with pytest.raises(harness.BenchmarkError, match=r"none\.json"):
        harness.read_results(tmp_path / "none.json")
