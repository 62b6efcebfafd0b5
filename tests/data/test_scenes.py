"""Generated scenes: what every one of them keeps to, and the folder they are written into."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ldmseg_fast.cli import main
from ldmseg_fast.commands.data_check import check_folder
from ldmseg_fast.data import scenes as scenes_module
from ldmseg_fast.data.class_painter import STUFF, THINGS
from ldmseg_fast.data.scenes import CATEGORIES, generate_scene, minimum_area, write_scenes

ISTHING = {version: {c["id"]: c["isthing"] for c in categories} for version, categories in CATEGORIES.items()}


def digest(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("size", "count"), [(32, 40), (64, 60), (100, 10), (256, 4)])
def test_every_scene_keeps_the_rules(size: int, count: int, version: int) -> None:
    isthing = ISTHING[version]
    for index in range(count):
        rgb, ids, segments_info = generate_scene(size, 11, index, version=version)
        assert rgb.shape == (size, size, 3) and rgb.dtype == np.uint8
        assert ids.shape == (size, size) and ids.dtype == np.int32
        found = dict(zip(*(values.tolist() for values in np.unique(ids, return_counts=True))))
        assert found == {segment["id"]: segment["area"] for segment in segments_info}
        assert 0 not in found and max(found) < 2**24
        assert min(found.values()) >= minimum_area(size)
        for segment in segments_info:
            rows, columns = np.nonzero(ids == segment["id"])
            left, top, width, height = segment["bbox"]
            assert (left, top, width, height) == (
                columns.min(),
                rows.min(),
                np.ptp(columns) + 1,
                np.ptp(rows) + 1,
            )
        things = sum(isthing[segment["category_id"]] for segment in segments_info)
        assert 2 <= things <= 15
        stuff = [segment["category_id"] for segment in segments_info if not isthing[segment["category_id"]]]
        assert 2 <= len(stuff) <= 5 and len(set(stuff)) == len(stuff)


def test_minimum_areas_are_the_promised_ones() -> None:
    assert minimum_area(64) == 16 and minimum_area(256) == 64


@pytest.mark.parametrize(("version", "least", "mean"), [(1, 1.8, 4), (2, 1.8, 3.5)])
def test_picture_and_map_agree(version: int, least: float, mean: float) -> None:
    """Colours change where ids change: clearly more than elsewhere in every scene, far more on average."""
    ratios = []
    for index in range(40):
        rgb, ids, _ = generate_scene(64, 5, index, version=version)
        step = np.abs(np.diff(rgb.astype(int), axis=1)).sum(-1)
        border = np.diff(ids, axis=1) != 0
        ratios.append(step[border].mean() / step[~border].mean())
    assert min(ratios) > least and np.mean(ratios) > mean


def test_scenes_depend_on_size_seed_index_and_split_only() -> None:
    first = generate_scene(64, 3, 4)
    again = generate_scene(64, 3, 4)
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1]) and first[2] == again[2]
    for other in (generate_scene(64, 4, 4), generate_scene(64, 3, 5), generate_scene(64, 3, 4, "val2017")):
        assert not np.array_equal(first[0], other[0])


PIXELS = {1: ("2c98f706d4ca7b19", "0067c6b3b1dec063"), 2: ("cd9ff66a5c38724f", "395fe44a9578b9e5")}
FOLDERS = {1: "62c3772aed22cbda", 2: "832015bc923fdc00"}


@pytest.mark.parametrize("version", [1, 2])
def test_pixels_belong_to_the_recorded_version(version: int) -> None:
    """A change of a pixel needs a new version, or folders of old scenes pass for new ones."""
    rgb, ids, _ = generate_scene(64, 0, 0, version=version)
    found = tuple(hashlib.sha256(array.tobytes()).hexdigest()[:16] for array in (ids, rgb))
    assert found == PIXELS[version]


@pytest.mark.parametrize("version", [1, 2])
def test_annotations_and_record_belong_to_the_version(version: int, tmp_path: Path) -> None:
    """Version 1's JSON and record are those of before there was another. PNGs hang on zlib's version."""
    out = write_scenes(tmp_path / "scenes", 3, 32, seed=4, workers=1, val_images=2, version=version)
    files = sorted(path for path in out.rglob("*.json"))
    assert hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16] == FOLDERS[version]


def test_command_makes_version_2_unless_told_otherwise(tmp_path: Path) -> None:
    for options, version in (([], 2), (["--version", "1"], 1)):
        out = tmp_path / f"version{version}"
        assert main(["data", "scenes", str(out), "--images", "2", "--size", "32", *options]) == 0
        assert json.loads((out / "scenes.json").read_text())["version"] == version
        content = json.loads((out / "annotations" / "panoptic_val2017.json").read_text())
        assert content["categories"] == CATEGORIES[version]


def test_version_2_has_classes_enough_and_all_of_them_come_up() -> None:
    assert len(THINGS) >= 12 and len(STUFF) >= 6
    seen = {segment["category_id"] for index in range(60) for segment in generate_scene(32, 3, index)[2]}
    assert seen == set(ISTHING[2])


def test_a_class_does_not_show_in_its_colour() -> None:
    """The mean colour tells classes apart hardly better than chance, so that shape and surface have to."""
    samples = []
    for index in range(200):
        rgb, ids, segments_info = generate_scene(32, 8, index)
        samples += [
            (s["category_id"], rgb[ids == s["id"]].mean(0)) for s in segments_info if ISTHING[2][s["category_id"]]
        ]
    kinds, colours = np.array([kind for kind, _ in samples]), np.array([colour for _, colour in samples])
    half = len(kinds) // 2
    nearest = np.linalg.norm(colours[half:, None] - colours[None, :half], axis=2).argmin(1)
    assert (kinds[:half][nearest] == kinds[half:]).mean() < 0.2


def test_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    one = write_scenes(tmp_path / "one", 208, 32, seed=2, workers=1)
    three = write_scenes(tmp_path / "three", 208, 32, seed=2, workers=3)
    assert digest(one) == digest(three)
    assert len(list((one / "train2017").iterdir())) == 208
    assert len(list((one / "val2017").iterdir())) == 20


def test_layout(scenes: Path) -> None:
    assert sorted(path.name for path in scenes.iterdir()) == [
        "annotations",
        "panoptic_train2017",
        "panoptic_val2017",
        "scenes.json",
        "train2017",
        "val2017",
    ]
    report = check_folder(scenes)
    assert report.ok, report.table()
    assert report.checked == {"train2017": 24, "val2017": 8}
    ids = {
        image["id"]
        for split in ("train2017", "val2017")
        for image in json.loads((scenes / "annotations" / f"panoptic_{split}.json").read_text())["images"]
    }
    assert len(ids) == 32, "image ids must differ between the splits"


def test_second_call_keeps_what_is_there(tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    out.mkdir()  # an empty folder may be filled
    write_scenes(out, 2, 32, seed=1)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert write_scenes(out, 2, 32, seed=1) == out
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for images, size, seed in ((3, 32, 1), (2, 33, 1), (2, 32, 2)):
        with pytest.raises(FileExistsError, match="choose another folder"):
            write_scenes(out, images, size, seed=seed)
    with pytest.raises(FileExistsError, match="choose another folder"):
        write_scenes(out, 2, 32, seed=1, version=1)


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another folder"):
        write_scenes(tmp_path, 2, 32)
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        write_scenes(tmp_path / "notes.txt", 2, 32)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes_module, "write_panoptic_png", stop)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "scenes", 2, 32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": 0}, "^images=0: at least 1"),
        ({"images": 1, "val_images": 0}, "^val_images=0: at least 1"),
        ({"images": 1, "size": 16}, "size=16"),
        ({"images": 1, "size": 4096}, "size=4096"),
        ({"images": 1, "seed": -1}, "seed=-1"),
        ({"images": 1, "version": 3}, "version=3"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_scenes(tmp_path / "scenes", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_generating_and_checking_need_no_torch() -> None:
    """Worker processes import these modules; torch would cost each of them seconds."""
    code = "import sys, ldmseg_fast.data.scenes, ldmseg_fast.commands.data_check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="test2017"):
        generate_scene(64, 0, 0, "test2017")
