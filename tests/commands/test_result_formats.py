"""`ldmseg predict --format KIND` and `inpaint --format KIND`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.cli import main
from ldmseg_fast.formats import coco_instances, labelme
from ldmseg_fast.formats.kinds import KINDS
from ldmseg_fast.formats.options import ReadOptions
from ldmseg_fast.panoptic.format import read_panoptic_png, write_panoptic_png

WRITTEN = [kind for kind, each in KINDS.items() if each.writes and kind != "cityscapes-results"]


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (20, 30)), ("sub/b.jpg", (64, 64))):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.open(tmp_path / "in" / "a.png").save(tmp_path / "in" / "turned.png", exif=tags)
    return tmp_path / "in"


def predict(model_dir, *arguments) -> int:
    return main(["predict", str(model_dir), *map(str, arguments), "--steps", "1"])


def test_every_kind_at_once(model_dir, folder, tmp_path, capsys):
    out = tmp_path / "out"
    asked = [word for kind in WRITTEN for word in ("--format", kind)]
    (folder / "bad.png").write_bytes(b"no picture")
    assert predict(model_dir, folder, "--out", out, "--recursive", *asked) == 1
    said = capsys.readouterr().out
    for kind in WRITTEN:
        assert f"{kind}: 3 pictures with" in said and (out / kind).is_dir()
    entries = coco_instances.read(out / "coco-instances", ReadOptions()).splits["predicted"]
    assert sorted(entry.name for entry in entries) == ["a.png", "sub/b.jpg", "turned.png"]
    for entry in entries:
        found = entry.read().ids
        ids = read_panoptic_png((out / entry.name).with_suffix(".png"))
        if entry.name == "turned.png":
            assert ids.shape == (30, 20) and found.shape == (20, 30)
            ids = np.rot90(ids)
        np.testing.assert_array_equal(found > 0, ids > 0)


def test_labelme_shows_turned_pictures_as_they_were_predicted(model_dir, folder, tmp_path):
    out = tmp_path / "out"
    assert predict(model_dir, folder / "turned.png", "--out", out, "--format", "labelme") == 0
    content = json.loads((out / "labelme" / "predicted" / "turned.json").read_text())
    assert (content["imageHeight"], content["imageWidth"]) == (30, 20)
    (entry,) = labelme.read(out / "labelme", ReadOptions()).splits["predicted"]
    np.testing.assert_array_equal(np.rot90(entry.read().ids > 0, -1), read_panoptic_png(out / "turned.png") > 0)


def test_what_is_wrong_is_told_before_anything_is_written(model_dir, folder, tmp_path, capsys):
    out = tmp_path / "out"
    for kinds, message in (
        (["nonsense"], "nonsense: no such format; written are coco-instances"),
        (["ade20k"], "this format is read"),
        (["geojson", "geojson"], "--format geojson: named twice"),
        (["cityscapes-results"], "needs Cityscapes' categories"),
    ):
        asked = [word for kind in kinds for word in ("--format", kind)]
        assert predict(model_dir, folder, "--out", out, *asked) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1 and not out.exists()
    (folder / "sub").rename(folder / "geojson")
    assert predict(model_dir, folder, "--out", out, "--recursive", "--format", "geojson") == 2
    assert "b.jpg has its results in" in capsys.readouterr().err and not out.exists()
    (out / "labelme").mkdir(parents=True)
    (out / "labelme" / "mine.json").write_text("corrected by hand")
    assert predict(model_dir, folder, "--out", out, "--format", "labelme") == 2
    assert "labelme: is there already" in capsys.readouterr().err
    assert [path.name for path in out.rglob("*")] == ["labelme", "mine.json"]


def test_inpaint(model_dir, folder, tmp_path, capsys):
    ids = np.zeros((20, 30), np.int32)
    ids[:10] = 7
    write_panoptic_png(tmp_path / "map.png", ids)
    arguments = ["--image", folder / "a.png", "--map", tmp_path / "map.png", "--unknown-id", 0, "--steps", 1]
    arguments += ["--out", tmp_path / "out", "--format", "label-studio", "--format", "geojson"]
    assert main(["inpaint", str(model_dir), *map(str, arguments)]) == 0
    assert "geojson: 1 pictures" in capsys.readouterr().out
    (task,) = json.loads((tmp_path / "out" / "label-studio" / "predicted.json").read_text())
    assert task["predictions"] and (tmp_path / "out" / "geojson" / "predicted" / "a.geojson").is_file()
    assert main(["inpaint", str(model_dir), *map(str, arguments)]) == 2
    assert "is there already" in capsys.readouterr().err
