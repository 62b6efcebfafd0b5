"""`ldmseg data import`: what all kinds share."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.cli import main
from ldmseg_fast.commands.data_check import check_folder
from ldmseg_fast.commands.data_import import import_data
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.formats.kinds import KINDS
from ldmseg_fast.formats.options import ReadOptions, WriteOptions


@pytest.fixture
def source(tmp_path):
    """A folder of six pictures with semantic maps."""
    root = tmp_path / "source"
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True)
    for number in range(6):
        rng = np.random.default_rng(number)
        Image.fromarray(rng.integers(0, 256, (16, 20, 3), np.uint8)).save(root / "images" / f"{number}.jpg")
        Image.fromarray(rng.integers(0, 3, (16, 20), np.uint8)).save(root / "labels" / f"{number}.png")
    return root


def test_help_lists_every_kind(capsys):
    with pytest.raises(SystemExit):
        main(["data", "import", "--help"])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and kind.title in text for name, kind in KINDS.items() if kind.reads)
    assert "geojson" not in text


def test_from_python(source, tmp_path):
    summary = import_data("semantic", source, tmp_path / "out", ReadOptions(), WriteOptions(copy=True))
    assert summary.pictures == 6 and summary.text().startswith("6 pictures with 18 segments")
    assert not (tmp_path / "out" / "train" / "0.jpg").is_symlink() and check_folder(tmp_path / "out").ok
    with pytest.raises(ArgumentError, match="geojson: no kind of data set that is read"):
        import_data("geojson", source, tmp_path / "out", ReadOptions(), WriteOptions())


def test_outputs_that_cannot_be(source, tmp_path, capsys):
    (tmp_path / "file").write_text("content")
    for out, message in ((tmp_path / "file", "file"), (source, "would replace"), (source / "images" / "x", "lies in")):
        assert main(["data", "import", "semantic", str(source), str(out)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "content"
    assert main(["data", "import", "semantic", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_lies_in_the_output_stays(source, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "panoptic_train").mkdir(parents=True)
    (out / "panoptic_train" / "mine.txt").write_text("mine")
    assert main(["data", "import", "semantic", str(source), str(out)]) == 2
    assert "panoptic_train is there already" in capsys.readouterr().err
    assert [path.name for path in out.rglob("*")] == ["panoptic_train", "mine.txt"]


@pytest.mark.serial
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["interrupt", "kill"])
def test_an_interrupted_import_goes_on(source, tmp_path, number):
    held = tmp_path / "held"  # while it is there, the last map cannot be read
    held.touch()
    slow = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "from ldmseg_fast.formats import semantic_folder\n"
        "from ldmseg_fast.cli import main\n"
        "read = semantic_folder.read_semantic\n"
        "def slowly(path, known):\n"
        "    while path.stem == '5' and os.path.exists(os.environ['HELD']):\n"
        "        time.sleep(0.01)\n"
        "    return read(path, known)\n"
        "semantic_folder.read_semantic = slowly\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["data", "import", "semantic", str(source), str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HELD": str(held)},
    )
    journal, limit = tmp_path / "out" / ".import-train" / "journal.jsonl", time.monotonic() + 60
    while not (journal.is_file() and b'"map"' in journal.read_bytes()) and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(number)
    held.unlink()
    assert process.wait() == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".ldmseg")) == [
        ".import-train"
    ]
    assert main(arguments) == 0 and check_folder(tmp_path / "out").ok
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["annotations", "panoptic_train", "train"]
