"""Folders and zips are read alike, and a zip that should not be trusted is refused."""

from __future__ import annotations

import stat
import zipfile
from pathlib import Path

import pytest

from ldmseg_fast.errors import DataError
from ldmseg_fast.formats.trees import Tree, plain_name


def zipped(path: Path, files: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", how) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return path


def unpacked(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


FILES = {
    "a.json": b"[1]",
    "sub/b.txt": "größe".encode(),
    ".DS_Store": b"x",
    "__MACOSX/._a.json": b"x",
    "sub/.git/config": b"x",
}


@pytest.mark.parametrize("make", [unpacked, zipped])
def test_both_are_alike(tmp_path, make):
    tree = Tree(make(tmp_path / "x.zip", FILES))
    assert tree.names == ["a.json", "sub/b.txt"] and "a.json" in tree and ".DS_Store" not in tree
    assert tree.json("a.json") == [1] and tree.text("sub/b.txt") == "größe" and tree.read("sub/b.txt")[0:2] == b"gr"
    assert tree.below("sub") == ["sub/b.txt"] and tree.below(suffixes=[".json"]) == ["a.json"]
    picture = tree.picture("sub/b.txt")
    assert (picture.read_bytes() if isinstance(picture, Path) else picture()) == "größe".encode()
    assert all(path.exists() for path in tree.sources("a.json"))
    with pytest.raises(DataError, match=r"x\.zip.*gone\.json"):
        tree.read("gone.json")


def test_one_file_stands_for_its_folder(tmp_path):
    tree = Tree(unpacked(tmp_path, FILES) / "a.json")
    assert tree.only == "a.json" and "sub/b.txt" in tree


def test_links_to_folders_are_followed_once(tmp_path):
    unpacked(tmp_path / "far", {"a.jpg": b"x"})
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "val").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "near")
    assert Tree(tmp_path / "near").names == ["val/a.jpg"]


def test_windows_separators_in_a_zip(tmp_path):
    path = zipped(tmp_path / "x.zip", {"subXb.txt": b"hello"})
    path.write_bytes(path.read_bytes().replace(b"subXb", b"sub\\b"))
    tree = Tree(path)
    assert tree.names == ["sub/b.txt"] and tree.read("sub/b.txt") == b"hello"


@pytest.mark.parametrize("name", ["../a.txt", "sub/../../a.txt", "/etc/a.txt", "C:/a.txt", "..\\a.txt"])
def test_a_name_that_leads_out_of_a_zip(tmp_path, name):
    with pytest.raises(DataError, match="leads out of the zip"):
        Tree(zipped(tmp_path / "x.zip", {name: b"x"}))


def test_a_link_in_a_zip_is_not_followed(tmp_path):
    info = zipfile.ZipInfo("a.txt")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr(info, "/etc/passwd")
    assert Tree(tmp_path / "x.zip").names == []


def test_a_bomb_is_not_unpacked(tmp_path):
    tree = Tree(zipped(tmp_path / "x.zip", {"a.json": bytes(2**25)}))
    with pytest.raises(DataError, match=r"a\.json: \d+ bytes that would become 33554432"):
        tree.json("a.json")


def test_damage(tmp_path):
    path = zipped(tmp_path / "x.zip", {"a.json": b"[1, 2, 3]" * 99}, zipfile.ZIP_STORED)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"[1, 2, 3]", b"[1, 2, 4]", 1))
    with pytest.raises(DataError, match=r"a\.json: damaged or locked"):
        Tree(path).read("a.json")
    path.write_bytes(content[:200])
    with pytest.raises(DataError, match="damaged, no zip"):
        Tree(path)
    with zipfile.ZipFile(path, "w") as file, pytest.warns(UserWarning):
        file.writestr("a", "1")
        file.writestr("a", "2")
    with pytest.raises(DataError, match="twice"):
        Tree(path)
    with pytest.raises(DataError, match="no such file or folder"):
        Tree(tmp_path / "gone")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1, 2", "no JSON"),
        (b'{"a": 1, "a": 2}', "there twice"),
        ('"größe"'.encode("latin-1"), "no UTF-8"),
        ('"a"'.encode("utf-16"), "UTF-16"),
        (b"[" * 100_000, "no JSON"),
        (b"", "no JSON"),
    ],
    ids=["half", "twice", "latin", "utf16", "deep", "empty"],
)
def test_what_is_no_json(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        Tree(tmp_path).json("a.json")
    assert "a.json" in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "a.json").write_bytes("[1]".encode("utf-8-sig"))
    assert Tree(tmp_path).json("a.json") == [1]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a.jpg", "val/a.jpg"),
        ("sub\\b.jpg", "val/sub/b.jpg"),
        ("C:\\pictures\\c.jpg", "other/c.jpg"),
        ("/home/me/c.jpg", "other/c.jpg"),
        ("../../c.jpg", "other/c.jpg"),
        ("../other/c.jpg", "other/c.jpg"),
        ("twice.jpg", None),
        ("gone.jpg", None),
    ],
)
def test_pictures_are_found(tmp_path, name, found):
    files = ["val/a.jpg", "val/sub/b.jpg", "other/c.jpg", "x/twice.jpg", "y/twice.jpg"]
    tree = Tree(unpacked(tmp_path, dict.fromkeys(files, b"x")))
    assert tree.find(name, ["val"]) == found


def test_names_below_a_split():
    assert plain_name("a/b.jpg") == "a/b.jpg" and plain_name("a\\b.jpg") == "a/b.jpg"
    assert plain_name("../b.jpg") == plain_name("/x/b.jpg") == plain_name("C:\\x\\b.jpg") == "b.jpg"
