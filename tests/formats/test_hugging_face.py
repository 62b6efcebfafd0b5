"""Hugging Face data sets, from local folders."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.cli import main
from ldmseg_fast.panoptic.format import ids_to_rgb
from tests.formats.conftest import SIZE

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """Keeps `datasets` away from the network and from the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def ids_of(seed):
    ids = np.full(SIZE, 70_000 + seed, np.int32)
    ids[:6] = 9
    ids[20:] = 0
    return ids


def infos_of(seed):
    shared = {"iscrowd": 0, "area": 1, "bbox": [0, 0, 1, 1]}
    return [{"id": 9, "category_id": 1, **shared}, {"id": 70_000 + seed, "category_id": 0, **shared}]


def picture(seed, mode="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8)).save(buffer, mode)
    return buffer.getvalue()


def rows(seeds, maps=None, infos=None, path="{}.jpg", **columns):
    """A data set as ade20k-panoptic-demo has it: image, label, segments_info."""
    maps = maps or [Image.fromarray(ids_to_rgb(ids_of(seed))) for seed in seeds]
    images = [{"bytes": picture(seed, "JPEG"), "path": path and path.format(seed)} for seed in seeds]
    content = {"image": images, "label": maps, "segments_info": infos or [infos_of(seed) for seed in seeds], **columns}
    made = datasets.Dataset.from_dict(content)
    return made.cast_column("image", datasets.Image()).cast_column("label", datasets.Image())


def run(source, out, *more):
    return main(["data", "import", "hugging-face", str(source), str(out), *more])


def check(maps, seeds, names):
    assert list(maps) == [*names, "categories"]
    for seed, name in zip(seeds, names):
        assert np.array_equal(maps[name]["ids"], ids_of(seed))
        assert np.array_equal(
            maps[name]["categories"], np.where(ids_of(seed) == 0, -1, np.where(ids_of(seed) == 9, 1, 0))
        )


def test_a_dictionary_of_splits_on_disk(tmp_path, imported):
    splits = {"train": rows((0, 1)), "validation": rows((2,))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert run(tmp_path / "saved", tmp_path / "out") == 0
    maps = imported(tmp_path / "out", "train")
    check(maps, (0, 1), ["0.png", "1.png"])
    assert maps["categories"] == [{"id": n, "name": f"class {n}", "isthing": 1} for n in (0, 1)]
    assert (tmp_path / "out" / "train" / "1.jpg").read_bytes() == picture(1, "JPEG")
    check(imported(tmp_path / "out", "validation"), (2,), ["2.png"])


def test_parquet_names_and_image_ids(tmp_path, imported):
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    rows((3, 4), image_id=["x", "y"]).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    (folder / "id2label.json").write_text(json.dumps({"0": "wall", "1": "person"}))
    assert run(folder, tmp_path / "out", "--things", "person") == 0
    maps = imported(tmp_path / "out", "train")
    check(maps, (3, 4), ["3.png", "4.png"])
    assert [maps[name]["image"]["id"] for name in ("3.png", "4.png")] == ["x", "y"]
    assert maps["categories"] == [{"id": 0, "name": "wall", "isthing": 0}, {"id": 1, "name": "person", "isthing": 1}]
    assert run(folder / "data" / "train-00000-of-00001.parquet", tmp_path / "one") == 0
    check(imported(tmp_path / "one", "train"), (3, 4), ["3.png", "4.png"])


def test_grey_maps_class_labels_stuff_and_pictures_without_names(tmp_path, imported):
    infos = [[{"id": 1, "category_id": 1, "isthing": False}, {"id": 2, "category_id": 0, "isthing": True}]] * 2
    values = np.ones(SIZE, np.uint8)
    values[:3] = 2
    made = rows((0, 1), [Image.fromarray(values)] * 2, infos, path="")
    segment = {
        "id": datasets.Value("int64"),
        "category_id": datasets.ClassLabel(names=["car", "sky"]),
        "isthing": datasets.Value("bool"),
    }
    made = made.cast_column("segments_info", datasets.List(segment)).rename_column("label", "annotation")
    made.save_to_disk(tmp_path / "saved")
    assert run(tmp_path / "saved", tmp_path / "out") == 0
    maps = imported(tmp_path / "out", "train")
    assert list(maps) == ["00000000.png", "00000001.png", "categories"]
    assert maps["00000001.png"]["image"]["file_name"] == "00000001.jpg"
    assert np.array_equal(maps["00000000.png"]["ids"], values)
    assert maps["categories"] == [{"id": 0, "name": "car", "isthing": 1}, {"id": 1, "name": "sky", "isthing": 0}]


def test_segments_as_text_and_as_lists_of_values(tmp_path, imported):
    rows((0,), infos=[json.dumps(infos_of(0))]).save_to_disk(tmp_path / "text")
    values = infos_of(0)
    lists = {key: [info[key] for info in values] for key in ("id", "category_id", "iscrowd")}
    rows((0,), infos=[lists]).save_to_disk(tmp_path / "lists")
    for name in ("text", "lists"):
        assert run(tmp_path / name, tmp_path / f"out_{name}") == 0
        check(imported(tmp_path / f"out_{name}", "train"), (0,), ["0.png"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"id": [9, 70_000], "category_id": [1]}, "lists of one length"),
        ({"id": 9, "category_id": 1}, "lists of one length"),
        ("[" * 100_000, "is no JSON"),
        ('[{"id": 9, "category_id": 1, "category_id": 2}]', "category_id is there twice"),
    ],
    ids=["lengths", "object", "deep", "repeated"],
)
def test_segments_that_are_no_list(tmp_path, capsys, value, message):
    rows((0,), infos=[value]).save_to_disk(tmp_path / "saved")
    assert run(tmp_path / "saved", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "train[0]: segments_info" in error and message in error and not (tmp_path / "out").exists()


def test_ids_that_cannot_tell_pictures_apart_are_not_taken(tmp_path, imported):
    rows((0, 1), image_id=[7, 7]).save_to_disk(tmp_path / "saved")
    assert run(tmp_path / "saved", tmp_path / "out") == 0
    maps = imported(tmp_path / "out", "train")
    assert [maps[name]["image"]["id"] for name in ("0.png", "1.png")] == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made.remove_columns("segments_info"), "columns image (of images) and segments_info expected"),
        (lambda made: made.rename_column("label", "thing"), "no column of maps"),
        (lambda made: made.rename_column("image", "picture"), "it has picture, label, segments_info"),
    ],
    ids=["segments", "maps", "pictures"],
)
def test_columns_that_are_missing(tmp_path, capsys, change, message):
    change(rows((0,))).save_to_disk(tmp_path / "saved")
    assert run(tmp_path / "saved", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"infos": [infos_of(0)[:1]]}, "id 70000 is not in segments_info"),
        ({"infos": [[{"id": 0, "category_id": 1}]]}, "segment id 0: whole numbers"),
        ({"infos": [[{"id": 9, "category_id": -1}, {"id": 70_000, "category_id": 1}]]}, "unknown category_id -1"),
        ({"infos": [infos_of(0) + infos_of(0)]}, "each once"),
        ({"maps": [Image.fromarray(np.zeros((5, 5, 3), np.uint8))]}, "the map is 5x5"),
        ({"maps": [{"bytes": b"no picture", "path": None}]}, "not a readable picture"),
        ({"maps": [None]}, "no label"),
    ],
    ids=["id", "zero", "category", "twice", "size", "damaged", "none"],
)
def test_faults_of_rows(tmp_path, capsys, more, message):
    rows((0,), **more).save_to_disk(tmp_path / "saved")
    assert run(tmp_path / "saved", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "error: 1 of 1 pictures" in error and message in error and not (tmp_path / "out").exists()


def test_what_datasets_cannot_load(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    for source, message in (
        (tmp_path / "empty", "datasets cannot load it"),
        (tmp_path / "bad.parquet", "datasets cannot load it"),
        ("nobody/nothing-at-all", "nobody/nothing-at-all: datasets cannot load it"),
        (tmp_path / "nowhere", "no such folder, and no name of a data set on the Hub"),
    ):
        assert run(source, tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_library_that_is_not_installed(tmp_path, capsys, monkeypatch):
    rows((0,)).save_to_disk(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert run(tmp_path / "saved", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "a Hugging Face data set needs datasets" in error and "pip install 'ldmseg_fast[data]'" in error
