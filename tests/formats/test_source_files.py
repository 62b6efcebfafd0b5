"""Files of a source are found once, in order."""

import os

import pytest

from ldmseg_fast.errors import DataError
from ldmseg_fast.formats.source_files import by_stem, check_folder, files_below, paired
from ldmseg_fast.formats.trees import Tree


def test_files_of_an_ending_in_order_without_hidden_ones(tmp_path):
    for name in ("b/2.PNG", "a/1.png", "a/._1.png", ".cache/3.png", "a/4.jpg", "a.png/5.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [path.relative_to(tmp_path).as_posix() for path in files_below(tmp_path, (".png",))]
    assert found == ["a/1.png", "a.png/5.png", "b/2.PNG"]


def test_a_folder_that_may_not_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "open").mkdir()
    (tmp_path / "shut").mkdir()

    def listing(path, own=os.scandir):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return own(path)

    monkeypatch.setattr(os, "scandir", listing)
    for read in (Tree, lambda folder: files_below(folder, (".png",))):
        with pytest.raises(DataError, match="shut: Permission denied: its files cannot be listed"):
            read(tmp_path)


def test_links_to_folders_are_followed_and_circles_end(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.png").write_bytes(b"")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "circle").symlink_to(tmp_path / "root")
    assert files_below(tmp_path / "root", (".png",)) == [tmp_path / "root" / "linked" / "1.png"]


def test_pairs_and_what_has_none(tmp_path):
    pictures = {name: tmp_path / f"{name}.jpg" for name in "bac"}
    maps = {name: tmp_path / f"{name}.png" for name in "ab"}
    pairs, without = paired(pictures, maps, tmp_path)
    assert [name for name, _, _ in pairs] == ["a", "b"] and without == 1
    with pytest.raises(DataError, match="1 of 2 annotations have no picture"):
        paired({"a": pictures["a"]}, maps, tmp_path)
    with pytest.raises(DataError, match="two files of one name"):
        by_stem([tmp_path / "a.jpg", tmp_path / "a.png"], tmp_path)


def test_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(DataError, match="no folder; unpack it first"):
        check_folder(tmp_path / "a.zip")
    with pytest.raises(DataError, match="no such folder"):
        check_folder(tmp_path / "b")
