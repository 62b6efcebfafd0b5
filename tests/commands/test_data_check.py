"""`ldmseg data check`: each kind of damage is found, counted and named."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from ldmseg_fast.commands.data_check import Report, check_folder
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.errors import DataError
from ldmseg_fast.panoptic.format import write_panoptic_png

MakeMap = Callable[[int, int], np.ndarray]


@pytest.fixture
def pair(folder, quarters: MakeMap):
    """Two sound pictures of 20x30."""
    for _ in range(2):
        folder.add(np.zeros((20, 30, 3), np.uint8), quarters(20, 30))
    return folder


def found(folder) -> dict[str, int]:
    report = check_folder(folder.root, workers=1)
    assert report.ok == (not report.problems)
    assert all(kind in report.table() for kind in report.counts())
    return report.counts()


def test_sound_folder(pair) -> None:
    report = check_folder(pair.root)
    assert report.ok and report.checked == {"val": 2}
    assert "maps in val" in report.table() and "problems" in report.table()


def test_files(pair, quarters: MakeMap) -> None:
    (pair.root / "val" / "0.jpg").unlink()
    (pair.root / "panoptic_val" / "1.png").unlink()
    assert found(pair) == {"missing picture": 1, "missing map": 1}
    (pair.root / "val" / "0.jpg").write_bytes((pair.root / "val" / "1.jpg").read_bytes()[:200])
    whole = (pair.root / "panoptic_val" / "0.png").read_bytes()
    (pair.root / "panoptic_val" / "1.png").write_bytes(whole[:50])
    assert found(pair) == {"unreadable picture": 1, "unreadable map": 1}


def test_sizes(pair, quarters: MakeMap) -> None:
    write_panoptic_png(pair.root / "panoptic_val" / "0.png", quarters(20, 31))
    pair.content["images"][1]["height"] = 21
    pair.save()
    report = check_folder(pair.root)
    assert report.counts() == {"sizes differ": 2}
    assert "JSON 30x20, picture 30x20, map 31x20" in report.table()


def test_ids(pair, quarters: MakeMap) -> None:
    pair.content["annotations"][0]["segments_info"].pop(0)
    pair.content["annotations"][1]["segments_info"].append({"id": 44, "category_id": 1})
    pair.save()
    report = check_folder(pair.root)
    assert report.counts() == {"id in map, not in JSON": 1, "id in JSON, not in map": 1}
    assert "(5)" in report.table() and "(44)" in report.table()


def test_several_ids_are_counted_and_areas_compared(pair) -> None:
    first, second = pair.content["annotations"]
    first["segments_info"] = first["segments_info"][2:]
    first["segments_info"] += [{"id": segment_id, "category_id": 1, "area": 1} for segment_id in range(20, 30)]
    second["segments_info"][0]["area"] += 1
    second["segments_info"][1]["area"] = 0
    pair.save()
    report = check_folder(pair.root)
    counts = {"id in map, not in JSON": 1, "id in JSON, not in map": 1, "area differs from the map's": 1}
    assert report.counts() == counts
    assert "(2 ids: 5, 900)" in report.table() and "(10 ids: 20, 21, 22, 23, 24, ...)" in report.table()
    assert "2 segments: segment 5: 151 pixels by the JSON, 150 in the map, segment 900: 0 pixels" in report.table()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_picture_is_read_once(pair, orientation: int, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = pair.root / "val" / f"0.{suffix}"
    Image.new("RGB", (30, 20)).save(path, **({"exif": exif} if orientation > 1 else {}))
    pair.content["images"][0]["file_name"] = path.name
    pair.content["images"] = pair.content["images"][:1]
    pair.content["annotations"] = pair.content["annotations"][:1]
    pair.save()
    opened, read = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **options: opened.append(args) or read(*args, **options))
    assert found(pair) == ({"EXIF orientation that is not 1": 1} if orientation > 1 else {})
    assert len(opened) <= 1


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation(pair, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = pair.root / "val" / "0.jpg"
    with Image.open(path) as picture:
        picture.save(path.with_suffix(f".{suffix}"), exif=exif)
    pair.content["images"][0]["file_name"] = f"0.{suffix}"
    pair.save()
    report = check_folder(pair.root)
    assert report.counts() == ({"EXIF orientation that is not 1": 1} if orientation > 1 else {})
    assert orientation < 2 or f"({orientation}, and maps follow the stored pixels" in report.table()


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda c: c["annotations"][1]["segments_info"][0].update(iscrowd="0"), "iscrowd that is not 0 or 1"),
        (lambda content: content["images"][0].update(height="20"), "size that is no number of pixels"),
        (lambda content: content["images"][0].update(file_name=None), "image without file name"),
        (lambda content: content["categories"][0].update(id=2**40), "category id outside 0..2^31-1"),
    ],
)
def test_what_training_refuses_is_reported(pair, change: Callable, kind: str) -> None:
    change(pair.content)
    pair.save()
    assert kind in found(pair)
    with pytest.raises(DataError):
        CocoPanoptic(pair.root, "val", 16)


@pytest.mark.parametrize(("mode", "kind"), [("P", "palette map"), ("RGBA", "RGBA map"), ("L", "grey map")])
def test_formats(pair, mode: str, kind: str) -> None:
    Image.new(mode, (30, 20)).save(pair.root / "panoptic_val" / "0.png")
    assert found(pair) == {kind: 1}


def test_json_entries(pair) -> None:
    first, second = pair.content["annotations"]
    first["segments_info"][0]["id"] = 2**24
    first["segments_info"][1]["category_id"] = 9
    second["segments_info"].append(second["segments_info"][0])
    second["file_name"] = first["file_name"]
    pair.content["images"].append(pair.content["images"][0])
    pair.content["categories"].append({"id": 1})
    pair.content["annotations"].append({"image_id": 77, "file_name": "1.png", "segments_info": []})
    pair.content["annotations"].append({"image_id": 1, "segments_info": []})
    pair.save()
    counts = found(pair)
    for kind in (
        "segment id outside 1..2^24-1",
        "unknown category id",
        "duplicated segment id",
        "duplicated map name",
        "duplicated image id",
        "duplicated category id",
        "duplicated annotation",
        "annotation without image",
        "incomplete annotation",
    ):
        assert counts.pop(kind) == 1, kind
    # What follows from the above: 0.png has the id that 2^24 replaced, and so has the second annotation of it;
    # the annotation of image 77 knows none of the ids in 1.png.
    assert counts == {"id in map, not in JSON": 2, "id in JSON, not in map": 1}


def test_categories(pair) -> None:
    used = {segment["category_id"] for entry in pair.content["annotations"] for segment in entry["segments_info"]}
    kinds = [{"id": n, "name": f"kind {n}", "isthing": 1} for n in sorted(used)]
    others = [
        {"id": 90, "name": "sky", "isthing": 0},
        {"id": 91, "name": "sky", "isthing": 0},
        {"id": 92, "name": "sea"},
    ]
    pair.content["categories"] = [*kinds, *others]
    pair.save()
    report = check_folder(pair.root, workers=1)
    assert report.counts() == {"duplicated category name": 1}
    assert report.categories == {"val": len(used) + 3}
    table = report.table()
    assert "'sky' x2" in table and "categories of val" in table
    assert f"1 of {len(used) + 3} categories have no isthing (sea)" in table
    others[1] |= {"name": "fog", "isthing": 2}
    pair.save()
    assert found(pair) == {"isthing that is not 0 or 1": 1}


def test_folders_and_json(pair, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        check_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert check_folder(tmp_path / "empty").counts() == {"no annotations": 1}
    for name, text in (
        ("val", "{"),
        ("val_a", "[]"),
        ("val_b", '{"images": [1], "annotations": [], "categories": []}'),
    ):
        (pair.root / "annotations" / f"panoptic_{name}.json").write_text(text)
    pair.content["annotations"] = []
    (pair.root / "annotations" / "panoptic_val_c.json").write_text(json.dumps(pair.content))
    (pair.root / "annotations" / "panoptic_train.json").write_text(json.dumps(pair.content))
    assert found(pair) == {"unreadable JSON": 3, "empty split": 1, "missing folder": 1}


def test_table_names_the_first_twenty(folder, quarters: MakeMap) -> None:
    for _ in range(23):
        folder.add(np.zeros((4, 4, 3), np.uint8), quarters(4, 4), "png")
    for path in (folder.root / "val").iterdir():
        path.unlink()
    table = check_folder(folder.root).table()
    assert table.count("  - missing picture: ") == 20 and table.endswith("... and 3 more")


def test_report_does_not_depend_on_workers(folder, quarters: MakeMap) -> None:
    for index in range(210):
        folder.add(np.zeros((4, 4, 3), np.uint8), quarters(4, 4), "png")
        if index % 10 == 0:
            (folder.root / "val" / f"{index}.png").unlink()
    one, two = (check_folder(folder.root, workers=workers) for workers in (1, 2))
    assert one == two and one.counts() == {"missing picture": 21}


def test_real_folder(shared: Path) -> None:
    report: Report = check_folder(shared / "data" / "coco_mini")
    assert report.ok, report.table()
    assert report.checked == {"train2017": 418, "val2017": 18, "val2017_classes": 8}
