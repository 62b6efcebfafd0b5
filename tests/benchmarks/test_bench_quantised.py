"""The benchmark of quantised graphs: its rows, on generated scenes and on sets that are given."""

import json

import pytest

from benchmarks import bench_quantised
from benchmarks.bench_quantised import CPU_INT8, PLAIN


@pytest.fixture(autouse=True)
def one_export(monkeypatch):
    """Beside plain float32 graphs those for a CPU only."""
    for name, kept in (("EXPORTS", ("fp32", CPU_INT8)), ("SIZES", (CPU_INT8,)), ("LOSSES", (CPU_INT8,))):
        values = getattr(bench_quantised, name)
        monkeypatch.setattr(bench_quantised, name, {each: values[each] for each in kept})


@pytest.mark.parametrize("given", [False, True], ids=["scenes", "given"])
def test_a_run(model_dir, scenes, tmp_path, given):
    pytest.importorskip("onnxruntime")
    arguments = [str(model_dir), "--images", "2", "--seeds", "1", "--rounds", "2", "--out", str(tmp_path)]
    arguments += ["--data", f"{scenes}:train2017:val2017"] if given else []
    assert bench_quantised.main(arguments) == 0
    (path,) = tmp_path.glob("quantised-*.json")
    rows = json.loads(path.read_text())["results"]
    named = {"model": str(model_dir.name), "data": f"{scenes.name} val2017"} if given else {}
    for row in rows:
        assert named.items() >= {key: row["case"][key] for key in ("model", "data") if key in row["case"]}.items()
    pq = {row["variant"]: row for row in rows if row["name"] == "PQ"}
    assert pq.keys() == {PLAIN, CPU_INT8} and pq[PLAIN]["case"] == {**named, "images": 2, "seeds": 1, "steps": 10}
    (lost,) = (row for row in rows if row["name"] == "PQ lost")
    assert lost["value"] == pq[PLAIN]["value"] - pq[CPU_INT8]["value"] and lost["target"] == 0.3
