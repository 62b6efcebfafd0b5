"""`ldmseg data export`: whole or not at all, and one line for what is wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.cli import main
from ldmseg_fast.formats import geojson
from ldmseg_fast.formats.kinds import KINDS
from ldmseg_fast.locks import only_writer
from ldmseg_fast.panoptic.format import read_panoptic_png

WRITTEN = [kind for kind, each in KINDS.items() if each.writes]


def export(*arguments: object) -> int:
    return main(["data", "export", *map(str, arguments)])


def files(root) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))


@pytest.mark.parametrize("kind", [kind for kind in WRITTEN if kind != "cityscapes-results"])
@pytest.mark.parametrize("copy", [False, True])
def test_every_kind(scenes, tmp_path, capsys, kind, copy):
    before = files(scenes)
    assert export(kind, scenes, tmp_path / "out", "--split", "val2017", *["--copy"] * copy) == 0
    said = capsys.readouterr().out
    assert said.startswith("8 pictures with ") and str(tmp_path / "out") in said and ".tmp" not in said
    links = [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]
    assert not links if copy else all(path.is_file() for path in links)
    assert not [name for name in files(tmp_path) if ".ldmseg" in name]
    assert files(scenes) == before


def test_coco_panoptic_again(scenes, tmp_path):
    """Of a folder that was exported in our own format every byte of the maps' meaning is there."""
    assert export("coco-panoptic", scenes, tmp_path / "out") == 0
    for split in ("train2017", "val2017"):
        one, other = (
            json.loads((root / "annotations" / f"panoptic_{split}.json").read_text())
            for root in (scenes, tmp_path / "out")
        )
        for key in ("images", "annotations"):
            assert len(one[key]) == len(other[key])
        for first, second in zip(one["annotations"], other["annotations"]):
            maps = [
                read_panoptic_png(root / f"panoptic_{split}" / each["file_name"])
                for root, each in ((scenes, first), (tmp_path / "out", second))
            ]
            np.testing.assert_array_equal(*maps)


def refused(capsys, *arguments: object) -> str:
    assert export(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1, said.err
    return said.err


def test_bad_arguments(scenes, tmp_path, capsys):
    out = tmp_path / "out"
    assert "no such format; written are coco-instances" in refused(capsys, "nonsense", scenes, out)
    assert "ade20k: this format is read (`ldmseg data import`)" in refused(capsys, "ade20k", scenes, out)
    assert "no such folder" in refused(capsys, "geojson", tmp_path / "nowhere", out)
    said = refused(capsys, "geojson", scenes, out, "--split", "val2017", "test2017")
    assert "splits found in" in said and "train2017, val2017" in said
    assert "geojson has no choice of shapes" in refused(capsys, "geojson", scenes, out, "--shape", "rle")
    assert "--pictures is for the JSON of results" in refused(capsys, "geojson", scenes, out, "--pictures", scenes)
    assert "no annotations/panoptic_SPLIT.json" in refused(capsys, "geojson", tmp_path, tmp_path.parent / "elsewhere")
    for inside in (scenes, scenes / "out", scenes / "val2017" / "out"):
        assert "which this command reads" in refused(capsys, "geojson", scenes, inside)
    assert not out.exists()


def test_what_is_there_stays(scenes, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "is there already" in refused(capsys, "geojson", scenes, out)
    assert files(tmp_path) == ["out", "out/mine.txt"]
    (out / "mine.txt").unlink()
    assert export("geojson", scenes, out, "--split", "val2017") == 0  # an empty folder is nobody's work
    capsys.readouterr()
    assert "is there already" in refused(capsys, "geojson", scenes, out)
    (tmp_path / "file").write_text("mine")
    assert "is there already" in refused(capsys, "geojson", scenes, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_another_export_into_the_same_folder(scenes, tmp_path, capsys):
    with only_writer(tmp_path / "out", "an export", ""):
        assert "writes there" in refused(capsys, "geojson", scenes, tmp_path / "out")


@pytest.fixture
def copied(scenes, tmp_path):
    return shutil.copytree(scenes, tmp_path / "scenes")


def test_unreadable_maps(copied, tmp_path, capsys):
    bad = sorted((copied / "panoptic_val2017").iterdir())[3]
    bad.write_bytes(bad.read_bytes()[:60])
    said = refused(capsys, "geojson", copied, tmp_path / "out", "--split", "val2017")
    assert str(bad) in said and files(tmp_path).count("out") == 0
    assert export("geojson", copied, tmp_path / "out", "--split", "val2017", "--skip-bad") == 1
    said = capsys.readouterr().out
    assert said.startswith("7 pictures with") and "1 pictures that could not be read" in said and bad.name in said
    for path in (copied / "panoptic_val2017").iterdir():
        path.write_bytes(b"")
    assert "none of the 8 pictures can be read" in refused(
        capsys, "geojson", copied, tmp_path / "none", "--split", "val2017", "--skip-bad"
    )
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["../out.png", "/out.png", "deep/../../out.png"])
def test_names_that_lead_out(copied, tmp_path, capsys, name):
    (copied / "val2017" / "deep").mkdir()
    path = copied / "annotations" / "panoptic_val2017.json"
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = str(tmp_path / "out.png") if name == "/out.png" else name
    target = (copied / "val2017" / content["images"][0]["file_name"]).resolve()
    Image.new("RGB", (64, 64)).save(target)
    path.write_text(json.dumps(content))
    said = refused(capsys, "fiftyone", copied, tmp_path / "out", "--split", "val2017")
    assert "leads out" in said and not (tmp_path / "out").exists()


def test_an_error_on_the_way_leaves_nothing(scenes, tmp_path, capsys, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(geojson, "replacing", full)
    said = refused(capsys, "geojson", scenes, tmp_path / "out")
    assert "No space left" in said and str(tmp_path / "out" / "train2017") in said and ".tmp" not in said
    assert files(tmp_path) == []


def test_a_file_system_without_links(scenes, tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert "the file system of OUT holds no links; use --copy" in refused(capsys, "labelme", scenes, tmp_path / "out")
    assert files(tmp_path) == []
    assert export("labelme", scenes, tmp_path / "out", "--copy", "--split", "val2017") == 0


def test_results_of_an_evaluation(scenes, tmp_path, capsys):
    """A result file is a JSON with a folder of maps, as `ldmseg evaluate` writes it."""
    results = tmp_path / "results"
    results.mkdir()
    shutil.copytree(scenes / "panoptic_val2017", results / "panoptic")
    shutil.copy(scenes / "annotations" / "panoptic_val2017.json", results / "panoptic.json")
    out = tmp_path / "out"
    assert "--pictures DIR must say" in refused(capsys, "labelme", results / "panoptic.json", out)
    pictures = ["--pictures", scenes / "val2017"]
    assert "which has no splits" in refused(
        capsys, "labelme", results / "panoptic.json", out, *pictures, "--split", "val2017"
    )
    inside = results / "panoptic" / "out"
    assert "which this command reads" in refused(capsys, "labelme", results / "panoptic.json", inside, *pictures)
    assert export("labelme", results / "panoptic.json", out, *pictures) == 0
    assert len(list((out / "predicted").glob("*.json"))) == 8
