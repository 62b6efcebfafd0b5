"""BSDS500, which several people annotated."""

import numpy as np
import pytest
from scipy.io import savemat

from ldmseg_fast.cli import main
from tests.formats.conftest import SIZE


def annotators(seed, count):
    """Maps whose segments are numbered from 1, as the struct's field Segmentation has them."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(1, 6, (count, SIZE[0] // 4, SIZE[1] // 4), np.uint16)
    return [np.kron(block, np.ones((4, 4), np.uint16)) for block in blocks]


def save(path, maps):
    cells = np.empty((1, len(maps)), object)
    for number, values in enumerate(maps):
        cells[0, number] = {"Segmentation": values, "Boundaries": np.zeros(SIZE, np.uint8)}
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"groundTruth": cells}, do_compression=True)


@pytest.fixture
def bsds(tmp_path, picture_at):
    root = tmp_path / "BSR"
    data = root / "BSDS500" / "data"
    for split, count in (("train", 5), ("val", 1)):
        picture_at(data / "images" / split / "100.jpg")
        (data / "images" / split / "Thumbs.db").write_bytes(b"")
        save(data / "groundTruth" / split / "100.mat", annotators(count, count))
    return root


def test_each_annotator_is_an_image(bsds, tmp_path, imported):
    assert main(["data", "import", "bsds500", str(bsds), str(tmp_path / "out")]) == 0
    for split, count in (("train", 5), ("val", 1)):
        maps = imported(tmp_path / "out", split)
        assert maps["categories"] == [{"id": 1, "name": "object", "isthing": 1}] and len(maps) == count + 1
        for number, values in enumerate(annotators(count, count)):
            found = maps[f"100_{number}.png" if count > 1 else "100.png"]
            assert np.array_equal(found["ids"], values)
            assert (found["image"]["id"], found["image"]["file_name"]) == (f"100_a{number}", "100.jpg")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda data: (data / "images" / "val" / "100.jpg").unlink(), "1 of 1 annotations have no picture"),
        (lambda data: (data / "groundTruth").rename(data / "gt"), "no folder with BSDS500's maps"),
        (lambda data: (data / "groundTruth" / "val" / "100.mat").write_bytes(b"no .mat"), "no readable .mat file"),
        (lambda data: savemat(data / "groundTruth" / "val" / "100.mat", {"x": 1}), "no variable groundTruth; it has x"),
        (lambda data: savemat(data / "groundTruth" / "val" / "100.mat", {"groundTruth": 1}), "is no cell array"),
    ],
    ids=["picture", "folder", "damaged", "variable", "cell"],
)
def test_faults_of_the_folder(bsds, tmp_path, capsys, break_it, message):
    break_it(bsds / "BSDS500" / "data")
    assert main(["data", "import", "bsds500", str(bsds), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones((4, 4), np.uint16), "the map is 4x4, its picture 32x24"),
        (np.full(SIZE, 2**24), "id 16777216 is not in 1..16777215"),
        (np.full(SIZE, -1), "has values that are no labels"),
    ],
    ids=["size", "id", "negative"],
)
def test_faults_of_maps(bsds, tmp_path, capsys, values, message):
    save(bsds / "BSDS500" / "data" / "groundTruth" / "val" / "100.mat", [values])
    assert main(["data", "import", "bsds500", str(bsds), str(tmp_path / "out"), "--split", "val"]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_annotator_without_segmentation(bsds, tmp_path, capsys):
    cells = np.empty((1, 1), object)
    cells[0, 0] = {"Boundaries": np.zeros(SIZE, np.uint8)}
    savemat(bsds / "BSDS500" / "data" / "groundTruth" / "val" / "100.mat", {"groundTruth": cells})
    assert main(["data", "import", "bsds500", str(bsds), str(tmp_path / "out"), "--split", "val"]) == 2
    assert "annotator 0 has no field Segmentation" in capsys.readouterr().err
