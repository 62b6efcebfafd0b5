"""Regressions are what lies beyond the measured spread, on one machine."""

import copy
import json

import pytest

from benchmarks import compare


def scaled(record, factor):
    changed = copy.deepcopy(record)
    for row in changed["results"]:
        for key in ("p5", "p20", "p50", "p80", "p95", "p99"):
            if key in row:
                row[key] *= factor
    return changed


@pytest.fixture
def pair(tmp_path):
    def write(before, after):
        paths = [tmp_path / "before.json", tmp_path / "after.json"]
        for path, content in zip(paths, (before, after)):
            path.write_text(json.dumps(content))
        return [str(path) for path in paths]

    return write


@pytest.mark.parametrize(
    ("factor", "code", "verdict"),
    [(1.0, 0, "within"), (1.08, 0, "within"), (1.2, 1, "slower"), (0.8, 0, "faster")],
)
def test_only_beyond_the_spread(record, pair, capsys, factor, code, verdict):
    assert compare.main([*pair(record, scaled(record, factor)), "--all"]) == code
    out = capsys.readouterr().out
    assert verdict in out and "PQ" in out and f"{int(verdict == 'slower')} of 1 times slower" in out


def test_a_steady_row_needs_three_percent(record, pair):
    record["results"][0] |= {"p20": 9.99, "p80": 10.01}
    assert compare.main(pair(record, scaled(record, 1.02))) == 0
    assert compare.main(pair(record, scaled(record, 1.04))) == 1


def test_another_machine_is_refused(record, pair, capsys):
    other = copy.deepcopy(record)
    other["environment"]["cpu"]["name"] = "another cpu"
    assert compare.main(pair(record, other)) == 2
    assert "--force" in capsys.readouterr().err
    assert compare.main([*pair(record, other), "--force"]) == 0


def test_another_suite_or_no_file_is_refused(record, pair, tmp_path, capsys):
    assert compare.main(pair(record, record | {"suite": "data"})) == 2
    (tmp_path / "broken.json").write_text("{}")
    assert compare.main([str(tmp_path / "broken.json")] * 2) == 2
    assert "broken.json" in capsys.readouterr().err


def test_rows_that_one_side_lacks_are_named(record, pair, capsys):
    fewer = copy.deepcopy(record)
    fewer["results"].pop()
    assert compare.main(pair(record, fewer)) == 0
    assert "only before: PQ | ours | in %" in capsys.readouterr().out


def test_ratios_see_through_a_load_on_the_whole_machine(record, pair, capsys):
    ours = record["results"][0] | {"baseline": "diffusers", "ratio": 2.0}
    theirs = ours | {"variant": "diffusers", "ratio": 1.0}
    record["results"] = [ours, theirs | {key: 2 * ours[key] for key in ("p5", "p20", "p50", "p80", "p95", "p99")}]
    loaded = scaled(record, 3.0)
    assert compare.main(pair(record, loaded)) == 1
    assert compare.main([*pair(record, loaded), "--ratios"]) == 0
    assert "0 of 1 times slower" in capsys.readouterr().out
    worse = scaled(loaded, 1.0)
    worse["results"][0] |= {key: 1.3 * loaded["results"][0][key] for key in ("p20", "p50", "p80")} | {
        "ratio": 2.0 / 1.3
    }
    assert compare.main([*pair(record, worse), "--ratios"]) == 1


def test_another_unit_is_another_row(record, pair, capsys):
    other = copy.deepcopy(record)
    other["results"][1]["unit"] = "share"
    assert compare.main(pair(record, other)) == 0
    assert "only after: PQ | ours | in share" in capsys.readouterr().out
