"""Folders of semantic PNGs."""

import json

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.cli import main
from ldmseg_fast.commands.data_check import check_folder
from ldmseg_fast.errors import DataError
from ldmseg_fast.formats.label_maps import read_labels
from ldmseg_fast.formats.options import ReadOptions
from ldmseg_fast.formats.semantic_folder import read
from tests.formats.conftest import SIZE


def labels(seed=0):
    """Blocks of 0..3 with a void corner."""
    blocks = np.random.default_rng(seed).integers(0, 4, (SIZE[0] // 4, SIZE[1] // 4), np.uint8)
    values = np.kron(blocks, np.ones((4, 4), np.uint8))
    values[:2, :2] = 255
    return values


@pytest.fixture
def folder(tmp_path, picture_at, png_at):
    """images/SPLIT and labels/SPLIT with two splits, one of them with a palette, and a list of classes."""
    root = tmp_path / "source"
    for split, count in (("train", 2), ("val", 1)):
        for number in range(count):
            picture_at(root / "images" / split / f"{number}.jpg", seed=number)
            png_at(root / "labels" / split / f"{number}.png", labels(number), palette=split == "val")
    picture_at(root / "images" / "val" / "more.jpg")
    (root / "classes.txt").write_text("sky\nroad\ncar\ntree\n")
    return root


def test_round_trip(folder, tmp_path, imported, capsys):
    out = tmp_path / "out"
    assert main(["data", "import", "semantic", str(folder), str(out)]) == 0
    assert "1 pictures without annotation" in capsys.readouterr().out
    for split, count in (("train", 2), ("val", 1)):
        maps = imported(out, split)
        assert maps["categories"] == [
            {"id": number, "name": name, "isthing": 0} for number, name in enumerate(("sky", "road", "car", "tree"))
        ]
        assert len(maps) == count + 1
        for number in range(count):
            expected = labels(number).astype(int)
            expected[expected == 255] = -1
            assert np.array_equal(maps[f"{number}.png"]["categories"], expected)


def test_connected_pieces_and_things(folder, tmp_path, imported):
    from scipy.ndimage import label

    arguments = ["data", "import", "semantic", str(folder), str(tmp_path / "out"), "--split", "train"]
    assert main([*arguments, "--connected", "CAR,1", "--things", "tree"]) == 0
    maps = imported(tmp_path / "out", "train")
    assert [category["isthing"] for category in maps["categories"]] == [0, 1, 1, 1]
    assert not (tmp_path / "out" / "val").exists()
    for number in range(2):
        found, values = maps[f"{number}.png"], labels(number)
        for value in range(4):
            pieces, count = label(values == value)
            ids = np.unique(found["ids"][values == value])
            assert len(ids) == (count if value in (1, 2) else 1)
            for piece in range(1, count + 1):
                assert len(np.unique(found["ids"][pieces == piece])) == 1


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (["a", "b", "c", "d"], "abcd"),
        ({"0": "a", "1": "b", "2": "c", "3": "d"}, "abcd"),
        ({"categories": [{"id": number, "name": "abcd"[number]} for number in (1, 2, 3)], "void": [0]}, "bcd"),
    ],
    ids=["list", "object", "coco"],
)  # fmt: skip
def test_lists_of_classes(folder, content, names):
    (folder / "categories.json").write_text(json.dumps(content))
    data_set = read(folder, ReadOptions())
    assert "".join(category["name"] for category in data_set.categories) == names
    assert (data_set.splits["train"][0].read().ids == 0).sum() == (4 if names == "abcd" else 4 + (labels() == 0).sum())


@pytest.mark.parametrize(
    ("name", "text", "categories"),
    [
        ("class_names.txt", "a\nb\n\n", {0: "a", 1: "b"}),
        ("labels.txt", "__ignore__\n_background_\na b\n", {0: "_background_", 1: "a b"}),
        ("names.txt", "1: a\n2: b\n0: c", {1: "a", 2: "b", 0: "c"}),
        ("names.txt", "3 a b\n4,c", {3: "a b", 4: "c"}),
    ],
    ids=["labelme's classes", "labelme's labels", "numbers", "columns"],
)
def test_lists_of_lines(folder, name, text, categories):
    (folder / "classes.txt").unlink()
    (folder / name).write_text(text)
    assert {each["id"]: each["name"] for each in read(folder, ReadOptions()).categories} == categories


def test_a_name_that_is_the_folder_of_another(folder, tmp_path, picture_at, png_at, capsys):
    picture_at(folder / "images/train/0.png/more.png")
    (folder / "labels/train/0.png").rename(folder / "labels/train/0.bmp")
    png_at(folder / "labels/train/0.png/more.png", labels())
    assert main(["data", "import", "semantic", str(folder), str(tmp_path / "out")]) == 2
    assert "0.png would be a file and a folder" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_without_a_list_labels_make_the_classes(folder):
    (folder / "classes.txt").unlink()
    assert [category["name"] for category in read(folder, ReadOptions()).categories] == [f"class {n}" for n in range(4)]


def test_layouts_without_splits_and_with_endings(tmp_path, picture_at, png_at):
    picture_at(tmp_path / "a" / "images" / "x" / "1.png")
    png_at(tmp_path / "a" / "masks" / "x" / "1_mask.png", labels())
    (tmp_path / "a" / "masks" / "loose.txt").write_text("")
    assert [entry.name for entry in read(tmp_path / "a", ReadOptions()).splits["train"]] == ["x/1.png"]
    picture_at(tmp_path / "b" / "test" / "image" / "1.png")
    png_at(tmp_path / "b" / "test" / "label" / "1.png", labels())
    assert list(read(tmp_path / "b", ReadOptions()).splits) == ["test"]


def test_depths_of_maps(tmp_path, png_at):
    values = np.arange(24, dtype=np.uint8).reshape(4, 6)
    assert np.array_equal(read_labels(png_at(tmp_path / "8.png", values)), values)
    assert np.array_equal(read_labels(png_at(tmp_path / "p.png", values, palette=True)), values)
    wide = values.astype(np.uint16) * 2000
    assert np.array_equal(read_labels(png_at(tmp_path / "16.png", wide)), wide)
    for bits in (1, 2, 4):
        few = values % 2**bits
        image = Image.fromarray(few)
        image.putpalette([0, 0, 0] * 256)
        image.save(tmp_path / f"p{bits}.png", bits=bits)
        assert np.array_equal(read_labels(tmp_path / f"p{bits}.png"), few)
    Image.fromarray(values % 2 > 0).save(tmp_path / "1.png")
    assert np.array_equal(read_labels(tmp_path / "1.png"), values % 2)
    import struct
    import zlib

    for bits in (2, 4):  # which Pillow reads and does not write
        few = values[:, :4] % 2**bits
        rows = np.packbits(np.unpackbits(few[..., None], axis=-1)[..., 8 - bits :].reshape(4, -1), axis=-1)
        body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
        chunks = ((b"IHDR", struct.pack(">IIBBBBB", 4, 4, bits, 0, 0, 0, 0)), (b"IDAT", body), (b"IEND", b""))
        path = tmp_path / f"{bits}.png"
        path.write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + b"".join(
                struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
                for kind, data in chunks
            )
        )
        assert np.array_equal(read_labels(path), few)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "images" / "train" / "1.jpg").unlink(), "1 of 2 annotations have no picture"),
        (lambda f: [path.unlink() for path in (f / "labels" / "train").iterdir()], "no annotations for its pictures"),
        (lambda f: (f / "labels").rename(f / "other"), "no folders of pictures and maps"),
        (lambda f: (f / "classes.txt").write_bytes("Bäume".encode("utf-16")), "not a text in UTF-8"),
        (lambda f: (f / "classes.txt").write_text("a\n\nb"), "classes.txt, line 2: ''"),
        (lambda f: (f / "classes.txt").write_text("background:0,0,0::\n"), "an export of CVAT is of the kind cvat"),
        (lambda f: (f / "categories.json").write_text("{"), "not a JSON file"),
        (lambda f: (f / "categories.json").write_text('{"a": "b"}'), "'a' is no label"),
        (lambda f: (f / "categories.json").write_text("7"), "a list of names"),
        (lambda f: (f / "categories.json").write_text("[7]"), "is no category"),
        (lambda f: (f / "labels" / "train" / "1_gt.png").write_bytes(b""), "two files of one name"),
    ],
    ids=["picture", "maps", "folder", "encoding", "empty line", "cvat", "json", "key", "number", "name", "twice"],
)  # fmt: skip
def test_faults_of_the_folder_are_one_line(folder, tmp_path, capsys, break_it, message):
    break_it(folder)
    assert main(["data", "import", "semantic", str(folder), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full(SIZE, 9, np.uint8), "label 9 is no category; known are 0..255"),
        (np.zeros((10, 10), np.uint8), "the map is 10x10, its picture 32x24"),
        (np.zeros((*SIZE, 3), np.uint8), "RGB colours, where one label a pixel is expected"),
    ],
    ids=["label", "size", "colours"],
)
def test_faults_of_maps_are_counted_and_nothing_is_written(folder, tmp_path, png_at, capsys, values, message):
    png_at(folder / "labels" / "train" / "1.png", values)
    (folder / "labels" / "val" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    out = tmp_path / "out"
    assert main(["data", "import", "semantic", str(folder), str(out)]) == 2
    error = capsys.readouterr().err
    assert (
        "error: 2 of 3 pictures cannot be imported" in error and message in error and "0.png: not a readable" in error
    )
    assert [path.name for path in out.iterdir()] == [".import-train"]
    arguments = ["data", "import", "semantic", str(folder), str(out), "--skip-bad", "--split", "train"]
    assert main([*arguments, "--copy"]) == 2
    assert "another source or with other options" in capsys.readouterr().err
    assert main(arguments) == 1
    assert "1 pictures that could not be read" in capsys.readouterr().out and check_folder(out).ok


def test_maps_stored_with_loss_are_refused(tmp_path, png_at):
    path = tmp_path / "a.png"
    Image.fromarray(labels()).save(path, format="JPEG")
    with pytest.raises(DataError, match="JPEG, which changes labels"):
        read_labels(path)


def test_options_that_do_not_fit(folder, tmp_path, capsys):
    arguments = ["data", "import", "semantic", str(folder), str(tmp_path / "out")]
    for more, message in (
        (["--connected", "boat"], "--connected boat: no category of this data set; it has sky, road, car, tree"),
        (["--split", "test"], "no split test; splits found: train, val"),
        (["--version", "2"], "it has no versions"),
    ):
        assert main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["data", "import", "semantic", str(folder), str(folder / "out")]) == 2
    assert "which this command reads" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["data", "import", "tarot", str(folder), str(tmp_path / "out")])
