"""Cityscapes and KITTI-360, whose labels it shares."""

import json

import numpy as np
import pytest

from ldmseg_fast.cli import main
from ldmseg_fast.formats.cityscapes_labels import CITYSCAPES, KITTI_360
from tests.formats.conftest import SIZE

EVALUATED = {label.id for label in CITYSCAPES if label.train_id is not None}


def instance_ids():
    """Road, a crowd of persons, two cars, and what is void: ego vehicle, a caravan, a license plate."""
    ids = np.full(SIZE, 7, np.uint16)
    ids[:6] = 24
    ids[6:10, :10] = 26000
    ids[6:10, 10:20] = 26001
    ids[20:] = 1
    ids[10:12, :4] = 29000
    ids[12:14, :4] = 65535
    return ids


def own_conversion(ids):
    """Ids and segments as cityscapesscripts' createPanopticImgs documents them."""
    result, segments = np.zeros(ids.shape, np.int32), []
    for key in np.unique(ids[ids < 65535]).tolist():
        label = next(each for each in CITYSCAPES if each.id == (key if key < 1000 else key // 1000))
        if label.id in EVALUATED:
            result[ids == key] = key
            segments.append((key, label.id, int(key < 1000 and label.isthing)))
    return result, segments


@pytest.fixture
def cityscapes(tmp_path, picture_at, png_at):
    root = tmp_path / "cityscapes"
    for split, city, count in (("train", "aachen", 2), ("val", "bonn", 1)):
        for number in range(count):
            stem = f"{city}_{number:06}_000019"
            picture_at(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", seed=number)
            png_at(root / "gtFine" / split / city / f"{stem}_gtFine_instanceIds.png", instance_ids())
            png_at(root / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png", np.zeros(SIZE, np.uint8))
    picture_at(root / "leftImg8bit" / "val" / "bonn" / "bonn_000007_000019_leftImg8bit.png")
    return root


def test_instances_as_their_own_conversion_has_them(cityscapes, tmp_path, imported, capsys):
    assert main(["data", "import", "cityscapes", str(cityscapes), str(tmp_path / "out")]) == 0
    assert "1 pictures without annotation" in capsys.readouterr().out
    expected, segments = own_conversion(instance_ids())
    for split, names in (
        ("train", ["aachen/aachen_000000_000019", "aachen/aachen_000001_000019"]),
        ("val", ["bonn/bonn_000000_000019"]),
    ):
        maps = imported(tmp_path / "out", split)
        assert list(maps) == [*(f"{name}_leftImg8bit.png" for name in names), "categories"]
        for name in names:
            found = maps[f"{name}_leftImg8bit.png"]
            assert np.array_equal(found["ids"], expected) and found["image"]["id"] == name.rpartition("/")[2]
            assert [(s["id"], s["category_id"], s["iscrowd"]) for s in found["segments"]] == segments
        assert len(maps["categories"]) == 19 and sum(each["isthing"] for each in maps["categories"]) == 8


@pytest.mark.parametrize("ending", ["", "_trainId"])
def test_panoptic_pngs_of_their_own_conversion(cityscapes, tmp_path, png_at, imported, ending):
    from ldmseg_fast.panoptic.format import write_panoptic_png

    expected, segments = own_conversion(instance_ids())
    number = {label.id: label.train_id if ending else label.id for label in CITYSCAPES}
    content = {"images": [], "annotations": [], "categories": []}
    for label in CITYSCAPES:
        if label.id in EVALUATED:
            content["categories"].append({**label.category(), "id": number[label.id]})
    folder = cityscapes / "gtFine" / f"cityscapes_panoptic_val{ending}"
    folder.mkdir()
    stem = "bonn_000000_000019"
    write_panoptic_png(folder / f"{stem}_gtFine_panoptic.png", expected)
    content["images"].append(
        {"id": stem, "file_name": f"{stem}_gtFine_leftImg8bit.png", "height": SIZE[0], "width": SIZE[1]}
    )
    infos = [{"id": key, "category_id": number[label], "iscrowd": crowd, "area": 1} for key, label, crowd in segments]
    content["annotations"].append(
        {"image_id": stem, "file_name": f"{stem}_gtFine_panoptic.png", "segments_info": infos}
    )
    folder.with_suffix(".json").write_text(json.dumps(content))
    version = f"panoptic{ending.replace('_', '-')}"
    arguments = ["data", "import", "cityscapes", str(cityscapes), str(tmp_path / "out"), "--version", version]
    assert main(arguments) == 0
    maps = imported(tmp_path / "out", "val")
    found = maps[f"bonn/{stem}_leftImg8bit.png"]
    assert np.array_equal(found["ids"], expected) and len(maps) == 2
    assert [s["category_id"] for s in found["segments"]] == [number[label] for _, label, _ in segments]
    (cityscapes / "leftImg8bit" / "val" / "bonn" / f"{stem}_leftImg8bit.png").unlink()
    assert main([*arguments[:4], str(tmp_path / "other"), *arguments[5:]]) == 2


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: (root / "gtFine").rename(root / "gt"), "neither"),
        (lambda root: (root / "leftImg8bit").rename(root / "pictures"), "no folder with pictures of Cityscapes"),
        (
            lambda root: next((root / "leftImg8bit" / "val").rglob("bonn_000000*")).unlink(),
            "1 of 1 annotations have no picture",
        ),
    ],
    ids=["maps", "pictures", "picture"],
)
def test_faults_of_the_folder(cityscapes, tmp_path, capsys, break_it, message):
    break_it(cityscapes)
    if message == "neither":
        (cityscapes / "gtFine").mkdir()
    assert main(["data", "import", "cityscapes", str(cityscapes), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full(SIZE, 77, np.uint16), "label 77 is no category"),
        (np.full(SIZE, 40_000, np.uint16), "label 40000 is no category"),
        (np.full((4, 4), 7, np.uint16), "the map is 4x4"),
    ],
    ids=["label", "instance", "size"],
)
def test_faults_of_maps(cityscapes, tmp_path, png_at, capsys, values, message):
    path = cityscapes / "gtFine" / "val" / "bonn" / "bonn_000000_000019_gtFine_instanceIds.png"
    png_at(path, values)
    arguments = ["data", "import", "cityscapes", str(cityscapes), str(tmp_path / "out"), "--split", "val"]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.fixture
def kitti(tmp_path, picture_at, png_at):
    root, drive = tmp_path / "kitti", "2013_05_28_drive_0000_sync"
    ids = np.full(SIZE, 7000, np.uint16)
    ids[:8] = 11003
    ids[8:12, :10] = 26001
    ids[8:12, 10:20] = 26000
    ids[12:14] = 7004  # stuff is one segment, whatever its number
    ids[20:] = 0
    ids[22:] = 44000
    for number in range(3):
        picture_at(root / "data_2d_raw" / drive / "image_00" / "data_rect" / f"{number:010}.png", seed=number)
        for kind, values in (("instance", ids), ("semantic", (ids // 1000).astype(np.uint8))):
            png_at(root / "data_2d_semantics" / "train" / drive / "image_00" / kind / f"{number:010}.png", values)
    return root, drive, ids


def write_lists(root, drive):
    for split, numbers in (("train", (0, 2)), ("val", (1,))):
        lines = [
            f"data_2d_raw/{drive}/image_00/data_rect/{number:010}.png "
            f"data_2d_semantics/train/{drive}/image_00/semantic/{number:010}.png\n"
            for number in numbers
        ]
        (root / "data_2d_semantics" / "train" / f"2013_05_28_drive_{split}_frames.txt").write_text("".join(lines))


@pytest.mark.parametrize("lists", [False, True])
def test_kitti_360(kitti, tmp_path, imported, lists):
    root, drive, ids = kitti
    if lists:
        write_lists(root, drive)
    assert main(["data", "import", "kitti-360", str(root), str(tmp_path / "out")]) == 0
    splits = {"train": (0, 2), "val": (1,)} if lists else {"train": (0, 1, 2)}
    for split, numbers in splits.items():
        maps = imported(tmp_path / "out", split)
        assert list(maps) == [*(f"{drive}/image_00/data_rect/{n:010}.png" for n in numbers), "categories"]
        found = maps[f"{drive}/image_00/data_rect/{numbers[0]:010}.png"]
        expected = np.where(ids // 1000 == 44, 0, np.where(ids == 7004, 7000, ids)).astype(int)
        assert np.array_equal(found["ids"], expected)
        assert np.array_equal(found["categories"], np.where(expected == 0, -1, expected // 1000))
        assert np.array_equal(found["crowd"], ids == 26000)
        assert len(maps["categories"]) == len([label for label in KITTI_360 if label.group != "void"])


def shallow(root):
    (root / "data_2d_semantics/train/instance").mkdir()
    (root / "data_2d_semantics/train/instance/1.png").write_bytes(b"")


def elsewhere(root, drive):
    path = root / "data_2d_semantics/else/drive/image_00/instance/1.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    line = "x.png data_2d_semantics/else/drive/image_00/semantic/1.png"
    (root / "data_2d_semantics/train/2013_05_28_drive_val_frames.txt").write_text(line)


def test_only_the_list_of_the_split_is_read(kitti, tmp_path):
    root, drive = kitti[:2]
    write_lists(root, drive)
    (root / "data_2d_semantics/train/2013_05_28_drive_train_frames.txt").write_text("gone")
    assert main(["data", "import", "kitti-360", str(root), str(tmp_path / "out"), "--split", "val"]) == 0


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root, drive: next((root / "data_2d_raw").rglob("*1.png")).unlink(), "1 of 3 frames have no picture"),
        (lambda root, drive: (root / "data_2d_raw").rename(root / "raw"), "no folder with pictures of KITTI-360"),
        (
            lambda root, drive: (write_lists(root, drive), next(root.rglob("instance/*1.png")).unlink()),
            "no such file, which",
        ),
        (
            lambda root, drive: (root / "data_2d_semantics" / "train" / "2013_05_28_drive_val_frames.txt").write_text(
                "a b c"
            ),
            "a picture and its semantic map expected",
        ),
        (lambda root, drive: shallow(root), "have no picture"),
        (lambda root, drive: elsewhere(root, drive), "have no picture"),
    ],
    ids=["picture", "pictures", "listed", "list", "shallow", "elsewhere"],
)
def test_faults_of_kitti_360(kitti, tmp_path, capsys, break_it, message):
    break_it(*kitti[:2])
    assert main(["data", "import", "kitti-360", str(kitti[0]), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_label_that_kitti_360_does_not_have(kitti, tmp_path, png_at, capsys):
    png_at(next(kitti[0].rglob("instance/*1.png")), np.full(SIZE, 45_000, np.uint16))
    assert main(["data", "import", "kitti-360", str(kitti[0]), str(tmp_path / "out")]) == 2
    assert "1 of 3 pictures" in (error := capsys.readouterr().err) and "label 45 is no category" in error
