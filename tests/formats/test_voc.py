"""PASCAL VOC and PASCAL Context."""

import numpy as np
import pytest
from scipy.io import savemat

from ldmseg_fast.cli import main
from ldmseg_fast.formats import voc
from tests.formats.conftest import SIZE, same_partition


def maps_of(seed=0):
    """Classes and objects of a picture: two dogs and a person on background, with borders."""
    classes, objects = np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint8)
    for number, (category, left) in enumerate(((12, 1), (12, 11), (15, 21)), 1):
        classes[2:20, left : left + 8], objects[2:20, left : left + 8] = 255, 255
        classes[3:19, left + 1 : left + 7], objects[3:19, left + 1 : left + 7] = category, number
    return np.roll(classes, seed, 0), np.roll(objects, seed, 0)


@pytest.fixture
def devkit(tmp_path, picture_at, png_at):
    root = tmp_path / "download" / "VOCdevkit" / "VOC2012"
    for number in range(3):
        name = f"2007_00000{number}"
        picture_at(root / "JPEGImages" / f"{name}.jpg", seed=number)
        classes, objects = maps_of(number)
        png_at(root / "SegmentationClass" / f"{name}.png", classes, palette=True)
        png_at(root / "SegmentationObject" / f"{name}.png", objects, palette=True)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000000\n2007_000002\n")
    (lists / "val.txt").write_text("2007_000001\n")
    (lists / "trainval.txt").write_text("2007_000000\n2007_000001\n2007_000002\n")
    return root


def test_voc_round_trip(devkit, tmp_path, imported):
    out = tmp_path / "out"
    assert main(["data", "import", "voc", str(devkit.parents[1]), str(out)]) == 0
    assert not (out / "trainval").exists()
    for split, numbers in (("train", (0, 2)), ("val", (1,))):
        maps = imported(out, split)
        assert [each["name"] for each in maps["categories"]] == list(voc.CLASSES)
        assert [each["isthing"] for each in maps["categories"]] == [0] + [1] * 20
        for number in numbers:
            classes, objects = maps_of(number)
            found = maps[f"2007_00000{number}.png"]
            assert np.array_equal(found["categories"], np.where(classes == 255, -1, classes.astype(int)))
            assert same_partition(found["ids"], np.where(classes == 255, 0, 1 + objects)) and not found["crowd"].any()
    assert main(["data", "import", "voc", str(devkit), str(tmp_path / "all"), "--split", "trainval"]) == 0
    assert len(imported(tmp_path / "all", "trainval")) == 4


def test_a_picture_that_a_list_names_twice_is_one(devkit, tmp_path, imported):
    (devkit / "ImageSets/Segmentation/val.txt").write_text("2007_000001\n2007_000001\n")
    assert main(["data", "import", "voc", str(devkit), str(tmp_path / "out"), "--split", "val"]) == 0
    assert set(imported(tmp_path / "out", "val")) == {"2007_000001.png", "categories"}


def test_classes_alone_are_stuff(devkit, tmp_path, imported):
    for path in (devkit / "SegmentationObject").iterdir():
        path.unlink()
    (devkit / "SegmentationObject").rmdir()
    assert main(["data", "import", "voc", str(devkit), str(tmp_path / "out"), "--connected", "dog"]) == 0
    maps = imported(tmp_path / "out", "val")
    assert [each["name"] for each in maps["categories"] if each["isthing"]] == ["dog"]
    assert len(maps["2007_000001.png"]["segments"]) == 4  # background, two dogs, a person


def test_objects_of_several_classes_and_classes_without_object(devkit, tmp_path, png_at, imported, capsys):
    classes, objects = maps_of()
    classes[5, 3] = 8
    objects[3:19, 22:28] = 0
    png_at(devkit / "SegmentationClass" / "2007_000000.png", classes, palette=True)
    png_at(devkit / "SegmentationObject" / "2007_000000.png", objects, palette=True)
    assert main(["data", "import", "voc", str(devkit), str(tmp_path / "out"), "--split", "train"]) == 0
    assert (
        "1 pixels whose class is not that of most of their object, first in 2007_000000.jpg" in capsys.readouterr().out
    )
    found = imported(tmp_path / "out", "train")["2007_000000.png"]
    assert found["categories"][5, 3] == 12 and np.array_equal(found["crowd"], classes == 15)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: (root / "JPEGImages" / "2007_000001.jpg").unlink(), "1 of 1 names of"),
        (lambda root: (root / "SegmentationObject" / "2007_000001.png").unlink(), "are not in"),
        (lambda root: (root / "SegmentationClass").rename(root / "Class"), "no folder with PASCAL VOC's maps"),
        (lambda root: (root / "ImageSets" / "Segmentation" / "val.txt").write_bytes(b"\xff\xfea\0"), "UTF-16"),
        (lambda root: (root / "ImageSets" / "Segmentation" / "val.txt").write_text(""), "no pictures"),
    ],
    ids=["picture", "object", "folder", "encoding", "empty"],
)
def test_faults_of_voc(devkit, tmp_path, capsys, break_it, message):
    break_it(devkit)
    assert main(["data", "import", "voc", str(devkit), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("Class", np.full(SIZE, 21, np.uint8), "label 21 is no category; known are 0..20"),
        ("Class", np.zeros(SIZE, np.uint8), "object 1 has no class"),
        ("Object", np.zeros((5, 5), np.uint8), "is 5x5"),
    ],
    ids=["label", "object", "size"],
)
def test_faults_of_the_maps_of_voc(devkit, tmp_path, png_at, capsys, kind, values, message):
    png_at(devkit / f"Segmentation{kind}" / "2007_000001.png", values)
    assert main(["data", "import", "voc", str(devkit), str(tmp_path / "out"), "--split", "val"]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.fixture
def context(devkit, tmp_path):
    """459 labels, of which 2 aeroplane ... stand under other numbers than VOC's; objects lie beside picture 0 and 1."""
    root = tmp_path / "context"
    (root / "trainval").mkdir(parents=True)
    devkit.rename(root / "VOC2010")
    names = {7: "dog", 300: "person", 459: "wood", 12: "sky", 5: "table"}
    (root / "labels.txt").write_text("".join(f"{label}: {name}\n" for label, name in sorted(names.items())))
    (root / "59_labels.txt").write_text("1: dog\n2: person\n3: sky\n4: dining table\n")
    for number in range(3):
        savemat(
            root / "trainval" / f"2007_00000{number}.mat", {"LabelMap": context_labels(number)}, do_compression=True
        )
    (root / "VOC2010" / "SegmentationObject" / "2007_000002.png").unlink()
    return root


def context_labels(number):
    classes, _ = maps_of(number)
    labels = np.full(SIZE, 12, np.uint16)
    labels[classes == 12], labels[classes == 15], labels[classes == 255] = 7, 300, 0
    labels[:, -1] = 459
    return labels


@pytest.mark.parametrize("version", ["59", "459"])
def test_pascal_context(context, tmp_path, imported, capsys, version):
    out = tmp_path / "out"
    assert main(["data", "import", "pascal-context", str(context), str(out), "--version", version]) == 0
    assert ("beyond the 59" in capsys.readouterr().out) == (version == "59")
    maps = imported(out, "trainval")
    names = [each["name"] for each in maps["categories"]]
    assert names == [name for name in ("table", "dog", "sky", "person", "wood") if version == "459" or name != "wood"]
    assert [each["name"] for each in maps["categories"] if each["isthing"]] == ["table", "dog", "person"]
    for number in range(3):
        labels = context_labels(number).astype(int)
        expected = np.where((labels == 0) | ((labels == 459) & (version == "59")), -1, labels)
        found = maps[f"2007_00000{number}.png"]
        assert np.array_equal(found["categories"], expected)
        assert np.array_equal(found["crowd"], (number == 2) & np.isin(labels, (7, 300)))
        dogs = [segment for segment in found["segments"] if segment["category_id"] == 7]
        assert len(dogs) == (1 if number == 2 else 2)


def test_pascal_context_without_objects_and_with_lists(context, tmp_path, imported):
    for path in (context / "VOC2010" / "SegmentationObject").iterdir():
        path.unlink()
    (context / "VOC2010" / "SegmentationObject").rmdir()
    (context / "val.txt").write_text("2007_000001\n2007_000001\n2009_000000\n")
    assert main(["data", "import", "pascal-context", str(context), str(tmp_path / "out")]) == 0
    maps = imported(tmp_path / "out", "val")
    assert len(maps) == 2 and not any(each["isthing"] for each in maps["categories"])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "labels.txt").unlink(), "no such file"),
        (lambda f: (f / "labels.txt").write_text("dog\n"), "NUMBER: NAME expected"),
        (lambda f: (f / "labels.txt").write_text("7: dog\n7: cat\n"), "7 is 'dog' already"),
        (lambda f: (f / "labels.txt").write_text("7: dog\n"), "label 12 is no category"),
        (lambda f: (f / "59_labels.txt").write_text("7: hound\n"), "hound is not in"),
        (lambda f: (f / "trainval" / "2007_000001.mat").write_bytes(b"MATLAB 5.0 nothing"), "no readable .mat"),
        (lambda f: (f / "trainval" / "2007_000001.mat").write_bytes(b"MATLAB 7.3 MAT-file"), "save it with -v7"),
        (lambda f: savemat(f / "trainval" / "2007_000001.mat", {"map": np.ones(SIZE)}), "no variable LabelMap"),
        (lambda f: savemat(f / "trainval" / "2007_000001.mat", {"LabelMap": np.full(SIZE, 1.5)}), "are no labels"),
        (lambda f: savemat(f / "trainval" / "2007_000001.mat", {"LabelMap": "text"}), "no matrix of labels"),
        (lambda f: savemat(f / "trainval" / "2007_000001.mat", {"LabelMap": np.full((3, 3), 7)}), "3x3"),
        (lambda f: (f / "VOC2010" / "JPEGImages" / "2007_000001.jpg").unlink(), "1 of 3 names"),
    ],
    ids=[
        "labels",
        "line",
        "twice",
        "label",
        "59",
        "damaged",
        "hdf5",
        "variable",
        "fraction",
        "text",
        "size",
        "picture",
    ],
)
def test_faults_of_pascal_context(context, tmp_path, capsys, break_it, message):
    break_it(context)
    version = "59" if "hound" in message else "459"
    arguments = ["data", "import", "pascal-context", str(context), str(tmp_path / "out"), "--version", version]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and not (tmp_path / "out" / "trainval").exists()
