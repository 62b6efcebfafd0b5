"""The maps that evaluation is timed on, the tools it is timed beside, and a run of its suite at toy size."""

import json

import numpy as np
import pytest

from benchmarks.harness import validate
from benchmarks.measuring.panoptic_maps import HEIGHT, WIDTH, PanopticMaps
from benchmarks.measuring.timing import time_differences
from benchmarks.peers.pq_tools import file_scorers, inflate_alone, torchmetrics_update
from ldmseg_fast.errors import UserError


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    return PanopticMaps(tmp_path_factory.mktemp("maps"), 2, None)


def test_maps_and_their_files(maps):
    gt, gt_segments, pred, pred_segments = maps.loaded(1)
    assert gt.shape == pred.shape == (HEIGHT, WIDTH)
    for ids, segments in ((gt, gt_segments), (pred, pred_segments)):
        assert {segment["id"]: segment["area"] for segment in segments} == dict(
            zip(*(values.tolist() for values in np.unique(ids[ids != 0], return_counts=True)))
        )
    paths = maps.json_of(3)  # more than there are maps
    names = [[entry["file_name"] for entry in json.loads(path.read_text())["annotations"]] for path in paths]
    assert names == [["000000.png", "000001.png", "000000.png"]] * 2


def test_all_tools_find_the_same_quality(maps):
    scores = {name: score(*maps.json_of(2)) for name, score in file_scorers(maps, boundary=False).items()}
    assert {"ours", "panopticapi's algorithm"} <= scores.keys() and 0 < scores["ours"] < 1
    assert all(score == pytest.approx(scores["ours"], abs=1e-9) for score in scores.values())
    floor = inflate_alone(maps, 2, rounds=2)
    assert floor is None or floor > 0
    update = torchmetrics_update(*maps.loaded(0))
    if update is not None:
        update()


def test_differences_drop_what_every_call_costs(monkeypatch):
    durations = {"few": 1.1, "many": 1.9, "disturbed": 2.0, "short": 0.5}
    monkeypatch.setattr("benchmarks.measuring.timing.seconds_of", lambda name: durations[name])
    calls = {"ours": ("few", "many"), "slow": ("few", "many")}
    found = time_differences(calls, images=4, rounds=5, slow=("slow",))
    assert found["ours"].samples == pytest.approx([200.0] * 5) and len(found["slow"].samples) == 3
    with pytest.raises(UserError, match="disturbed: more images never took longer"):
        time_differences(calls | {"disturbed": ("disturbed", "short")}, images=4, rounds=2)


def test_the_suite_at_toy_size(script, tmp_path):
    done = script("bench_evaluation", "--quick", "--images", 4, "--parts", "memory", "files", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(next(tmp_path.glob("evaluation-*.json")).read_text())
    validate(record)
    assert {row["name"] for row in record["results"]} >= {"in memory, per image", "from files, per image"}
    assert record["checks"]["ours equals panopticapi's algorithm"]
