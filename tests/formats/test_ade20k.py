"""ADE20K, full and as the challenge has it."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from ldmseg_fast.cli import main
from tests.formats.conftest import SIZE, same_partition


def seg(classes, instances):
    """*_seg.png as CSAILVision/ADE20K documents it: class = R / 10 * 256 + G, and B tells instances apart."""
    return np.stack([classes // 256 * 10, classes % 256, instances], -1).astype(np.uint8)


def full_map():
    classes, instances = np.full(SIZE, 2420), np.full(SIZE, 50)
    classes[:10, :10], instances[:10, :10] = 401, 20
    classes[:10, 10:20], instances[:10, 10:20] = 401, 120
    classes[20:], instances[20:] = 0, 0
    return classes, instances


@pytest.fixture
def full(tmp_path, picture_at, png_at):
    root = tmp_path / "ADE20K_2021_17_01"
    for split, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        folder = root / "images" / "ADE" / split / "urban" / "street"
        picture_at(folder / f"{name}.jpg")
        png_at(folder / f"{name}_seg.png", seg(*full_map()))
        png_at(folder / f"{name}_parts_1.png", seg(*full_map()))
        png_at(folder / name / f"instance_000_{name}.png", np.zeros(SIZE, np.uint8))
        objects = [
            {"id": 0, "name": "sky", "name_ndx": 2420, "raw_name": "Himmel über"},
            {"id": 1, "name": "car, auto, automobile", "name_ndx": 401},
            {"id": 2, "name": "car, auto, automobile", "name_ndx": 401},
        ]
        text = json.dumps({"annotation": {"filename": f"{name}.jpg", "object": objects}}, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text, encoding="latin-1" if split == "training" else "utf-8")
    return root


def test_full(full, tmp_path, imported):
    arguments = ["data", "import", "ade20k", str(full), str(tmp_path / "out"), "--things", "car, auto, automobile"]
    assert main(arguments) == 0
    classes, instances = full_map()
    for split, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        maps = imported(tmp_path / "out", split)
        assert maps["categories"] == [
            {"id": 401, "name": "car, auto, automobile", "isthing": 1}, {"id": 2420, "name": "sky", "isthing": 0}
        ]  # fmt: skip
        found = maps[f"urban/street/{name}.png"]
        assert np.array_equal(found["categories"], np.where(classes == 0, -1, classes))
        assert same_partition(found["ids"], classes * 256 + instances) and len(found["segments"]) == 3


def test_the_first_release_has_an_index(full, tmp_path, imported):
    for path in full.rglob("*.json"):
        path.unlink()
    names = np.array([f"name {number}" for number in range(1, 3001)], object)
    savemat(full / "index_ade20k.mat", {"index": {"objectnames": names}})
    assert main(["data", "import", "ade20k", str(full), str(tmp_path / "out")]) == 0
    maps = imported(tmp_path / "out", "training")
    assert len(maps["categories"]) == 3000 and maps["categories"][400] == {"id": 401, "name": "name 401", "isthing": 1}
    savemat(full / "index_ade20k.mat", {"index": {"other": names}})
    assert main(["data", "import", "ade20k", str(full), str(tmp_path / "other")]) == 2


def edit(full, change):
    path = next(full.rglob("ADE_val*.json"))
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content["annotation"])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: next(f.rglob("ADE_val*.json")).unlink(), "no such file"),
        (lambda f: next(f.rglob("ADE_val*.jpg")).unlink(), "1 of 1 annotations have no picture"),
        (lambda f: edit(f, lambda a: a["object"][0].pop("name_ndx")), "an object without name_ndx and name"),
        (lambda f: edit(f, lambda a: a.pop("object")), "an object without name_ndx and name"),
        (lambda f: edit(f, lambda a: a["object"][0].update(name="Sky")), "class 2420 is 'Sky', elsewhere 'sky'"),
        (lambda f: next(f.rglob("ADE_val*.json")).write_text("[]"), "annotation is missing"),
        (lambda f: [path.unlink() for path in f.rglob("*_seg.png")], "is this the full ADE20K?"),
    ],
    ids=["json", "picture", "name_ndx", "objects", "name", "list", "maps"],
)
def test_faults_of_the_full_data_set(full, tmp_path, capsys, break_it, message):
    break_it(full)
    assert main(["data", "import", "ade20k", str(full), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (seg(np.full(SIZE, 17), np.ones(SIZE)), "label 17 is no category"),
        (np.zeros(SIZE, np.uint8), "mode L, where three channels"),
        (seg(np.full((9, 9), 401), np.ones((9, 9))), "the map is 9x9"),
    ],
    ids=["class", "grey", "size"],
)
def test_faults_of_full_maps(full, tmp_path, png_at, capsys, values, message):
    png_at(next(full.rglob("ADE_val*_seg.png")), values)
    arguments = ["data", "import", "ade20k", str(full), str(tmp_path / "out"), "--split", "validation"]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def semantic():
    values = np.full(SIZE, 3, np.uint8)  # sky
    values[:12, :16] = 13  # person
    values[12:16] = 150  # flag
    values[20:] = 0
    return values


def instances():
    """annotations_instance as placeschallenge documents it: R is the class among the 100, G the instance."""
    values = np.zeros((*SIZE, 3), np.uint8)
    values[:6, :16] = (5, 1, 0)
    values[6:10, :16] = (5, 2, 0)
    values[22:, :4] = (100, 1, 0)
    return values


@pytest.fixture
def challenge(tmp_path, picture_at, png_at):
    root = tmp_path / "ADEChallengeData2016"
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    lines += [f"{number}\t0.1\t10\t1\t{number % 2}\tname {number}, other" for number in range(1, 151)]
    root.mkdir()
    (root / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
    for split, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        picture_at(root / "images" / split / f"{name}.jpg")
        png_at(root / "annotations" / split / f"{name}.png", semantic())
    return root


@pytest.fixture
def with_instances(challenge, png_at):
    for split, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        png_at(challenge / "annotations_instance" / split / f"{name}.png", instances())
    mapping = "Instance100 SceneParse150 FullADE20K\n5 13 1831\n100 150 20\n"
    (challenge / "categoryMapping.txt").write_text(mapping)
    return challenge


def test_challenge(challenge, tmp_path, imported):
    assert main(["data", "import", "ade20k-150", str(challenge), str(tmp_path / "out")]) == 0
    maps = imported(tmp_path / "out", "validation")
    assert len(maps["categories"]) == 150
    assert maps["categories"][12] == {"id": 13, "name": "name 13, other", "isthing": 0}
    values = semantic().astype(int)
    assert np.array_equal(maps["ADE_val_00000001.png"]["categories"], np.where(values == 0, -1, values))


def test_challenge_with_instances(with_instances, tmp_path, imported):
    assert main(["data", "import", "ade20k-150", str(with_instances), str(tmp_path / "out")]) == 0
    found = (maps := imported(tmp_path / "out", "training"))["ADE_train_00000001.png"]
    assert [each["id"] for each in maps["categories"] if each["isthing"]] == [13, 150]
    expected = semantic().astype(int)
    expected[22:, :4] = 150
    assert np.array_equal(found["categories"], np.where(expected == 0, -1, expected))
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    persons = (expected == 13) & (columns < 16)
    assert np.array_equal(found["crowd"], (persons & (rows >= 10)) | ((expected == 150) & (rows < 20)))
    things = [s for s in found["segments"] if not s["iscrowd"] and s["category_id"] in (13, 150)]
    assert [(s["category_id"], s["area"]) for s in things] == [(13, 96), (13, 64), (150, 8)]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "objectInfo150.txt").unlink(), "no such file"),
        (lambda f: (f / "objectInfo150.txt").write_text("Idx\n1 wall\n"), "Idx first and Name last expected"),
        (lambda f: (f / "objectInfo150.txt").write_text("Idx\tName\n1\ta\n1\tb\n"), "Idx 1 is there twice"),
        (lambda f: (f / "categoryMapping.txt").unlink(), "no categoryMapping.txt"),
        (lambda f: (f / "categoryMapping.txt").write_text("a b\n5 151\n"), "two classes expected"),
        (lambda f: (f / "images" / "validation" / "ADE_val_00000001.jpg").unlink(), "have no picture"),
        (lambda f: (f / "annotations").rename(f / "other"), "no folder with the challenge's semantic maps"),
    ],
    ids=["names", "line", "twice", "mapping", "class", "picture", "folder"],
)
def test_faults_of_the_challenge(with_instances, tmp_path, capsys, break_it, message):
    break_it(with_instances)
    assert main(["data", "import", "ade20k-150", str(with_instances), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("folder", "values", "message"),
    [
        ("annotations", np.full(SIZE, 151, np.uint8), "label 151 is no category; known are 1..150"),
        ("annotations_instance", np.full((*SIZE, 3), 7, np.uint8), "label 7 is no category"),
        ("annotations_instance", np.zeros((5, 6, 3), np.uint8), "is 6x5"),
        ("annotations_instance", np.zeros(SIZE, np.uint8), "three channels of 8 bits"),
    ],
    ids=["label", "class", "size", "grey"],
)
def test_faults_of_the_maps_of_the_challenge(with_instances, tmp_path, png_at, capsys, folder, values, message):
    png_at(with_instances / folder / "validation" / "ADE_val_00000001.png", values)
    arguments = ["data", "import", "ade20k-150", str(with_instances), str(tmp_path / "out"), "--split", "validation"]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_missing_map_of_instances_is_named(with_instances, tmp_path, capsys):
    (with_instances / "annotations_instance" / "validation" / "ADE_val_00000001.png").unlink()
    assert main(["data", "import", "ade20k-150", str(with_instances), str(tmp_path / "out")]) == 2
    assert "annotations_instance/validation/ADE_val_00000001.png: No such file" in capsys.readouterr().err


def test_colours_with_alpha_are_read(full, tmp_path):
    path = next(full.rglob("ADE_val*_seg.png"))
    Image.open(path).convert("RGBA").save(path)
    assert main(["data", "import", "ade20k", str(full), str(tmp_path / "out")]) == 0
