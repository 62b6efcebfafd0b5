"""A run over several sets: a log of each, `best` by their mean, and bitwise resumes."""

import json

import pytest

from ldmseg_fast.config import DataConfig, load_config
from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.data.joined_sets import set_places
from ldmseg_fast.data.scenes import write_scenes
from ldmseg_fast.errors import ConfigError
from ldmseg_fast.training.inputs import not_held_out
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


def test_sets_without_categories(roots, tmp_path):
    """Their pixels are void to the category loss, no table has their names, and no mean their class-aware PQ."""

    def settings(*more):
        fixed = [f"data.root={','.join(map(str, roots))}", f"output_dir={tmp_path / 'run'}", "train.validate_every=1"]
        fixed += ["data.val_limit=2", "train.log_every=1", "train.steps=1", "data.class_agnostic=few"]
        return load_config("tiny", [*NARROW, *fixed, "mask_vae.num_categories=14", *more])

    record = next(r for r in log_of(train("autoencoder", settings())) if "val/pq" in r)
    assert record["val/class_pq"] == record["val/many/class_pq"] and "val/few/class_pq" not in record
    few = CocoPanoptic(roots[0], "train2017", 64)
    few.class_agnostic = True
    few.use_categories(CategoryTable.of_data_sets([(few.categories, "few")]))
    assert int(few[0]["segment_ids"].max()) > 0 and int(few[0]["category_ids"].max()) == 0
    for names, message in (
        ("fwe", "no set of data.root is named fwe; there are few, many"),
        ("few,many", "data.class_agnostic names every set"),
    ):
        with pytest.raises(ConfigError, match=message):
            train("autoencoder", settings(f"data.class_agnostic={names}", f"output_dir={tmp_path / names}"))
    validated = f"data.root={roots[0]},{roots[1]}:train2017:"
    with pytest.raises(ConfigError, match="no set with categories is validated on"):
        train("autoencoder", settings(validated, "train.best=class_pq", f"output_dir={tmp_path / 'best'}"))


def test_numbers_of_seen_pictures_are_said_to_be_that(tmp_path):
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).mkdir()
    root = ",".join(str(tmp_path / entry) for entry in ("a:test2017:val", "b:train:test", "c:train:train", "d:latest:"))
    found = not_held_out(load_config("tiny", [f"data.root={root}"]))
    assert [warning.partition(":")[0] for warning in found] == ["a", "b", "c"]
    assert "trains on the split test2017" in found[0] and "chooses `best`" in found[1] and "validates on" in found[2]


@pytest.mark.parametrize("entries", [40, 1])
def test_a_long_list_is_no_file_name(entries):
    names = [f"scenes{number:0{300 // entries}d}" for number in range(entries)]
    assert [place.name for place in set_places(DataConfig(root=",".join(names)))] == names


def test_the_mean_of_sets():
    found = mean_of_sets({"a": {"val/pq": 10.0}, "b": {"val/pq": 30.0}})
    assert found == {"val/pq": 20.0, "val/a/pq": 10.0, "val/b/pq": 30.0}
