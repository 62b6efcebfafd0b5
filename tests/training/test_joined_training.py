"""A run over several sets: a log of each, `best` by their mean, and bitwise resumes."""

import json

import pytest

from ldmseg_fast.config import load_config
from ldmseg_fast.data.scenes import write_scenes
from ldmseg_fast.training.loop import train
from ldmseg_fast.training.validation import mean_of_sets
from tests.conftest import NARROW


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return [write_scenes(folder / name, images, 64, 0, version=1) for name, images in (("few", 4), ("many", 12))]


def log_of(folder):
    return [json.loads(line) for line in (folder / "logs" / "log.jsonl").read_text().splitlines()]


def test_a_run_over_two_sets(roots, tmp_path):
    def run(name, *settings, resume=False):
        fixed = [f"data.root={','.join(map(str, roots))}", "data.weights=1,2", "data.val_limit=2", "train.log_every=1"]
        fixed += [f"output_dir={tmp_path / name}", "train.schedule=constant", "train.validate_every=2", "train.steps=4"]
        return train("autoencoder", load_config("tiny", [*NARROW, *fixed, *settings]), resume=resume)

    whole = log_of(run("whole"))
    run("parts", "train.steps=2")
    parts = log_of(run("parts", resume=True))
    assert [r["loss"] for r in whole if "loss" in r] == [r["loss"] for r in parts if "loss" in r]
    validated = [r for r in whole if "val/pq" in r]
    assert len(validated) == 2
    for record in validated:
        assert record["val/pq"] == pytest.approx((record["val/few/pq"] + record["val/many/pq"]) / 2)
    pictures = {path.name for path in (tmp_path / "whole" / "pictures").iterdir()}
    assert {"step-00000004-few.png", "step-00000004-many.png"} <= pictures


def test_the_mean_of_sets():
    found = mean_of_sets({"a": {"val/pq": 10.0}, "b": {"val/pq": 30.0}})
    assert found == {"val/pq": 20.0, "val/a/pq": 10.0, "val/b/pq": 30.0}
