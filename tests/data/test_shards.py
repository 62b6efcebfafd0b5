"""Pictures in tar files as webdataset writes them, whole and broken."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.data.shards import ShardPicture, expand_braces, find_inputs
from ldmseg_fast.errors import ArgumentError, DataError


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_grouped_by_key(tmp_path, format):
    members = {
        "b/0001.jpg": png(1), "b/0001.json": b"{}", "b/0002.json": b"{}", "b/0002.PNG": png(2),
        "b/0001.map.png": png(3), f"{'long' * 20}/{'x' * 60}.png": png(4), ".hidden.png": b"", "README": b"text",
    }  # fmt: skip
    found = find_inputs([write(tmp_path / "s.tar", members, format)])
    assert not found.broken and not found.from_folders
    names = [(each.folder.as_posix(), each.file.stem) for each in found.pictures]
    assert names == [("b", "0001"), ("b", "0002"), ("long" * 20, "x" * 60)]
    first = found.pictures[0]
    assert isinstance(first, ShardPicture) and [kind for kind, _ in first.members] == ["jpg", "json", "map.png"]
    for picture, content in zip(found.pictures, (png(1), png(2), png(4))):
        expected = np.asarray(Image.open(io.BytesIO(content)))
        np.testing.assert_array_equal(np.asarray(picture.read(max_pixels=1000).pixels), expected)
    assert found.left_out == {"members without a key": 2}
    with pytest.raises(DataError, match=r"s\.tar/b/0001\.jpg: 11x9 is over 50 pixels"):
        first.read(max_pixels=50)


def test_names_with_braces(tmp_path):
    assert [path.name for path in expand_braces("s-{008..011}.tar")] == [f"s-{n:03d}.tar" for n in range(8, 12)]
    assert [str(path) for path in expand_braces("{2..1}/{1..2}.tar")] == ["2/1.tar", "2/2.tar", "1/1.tar", "1/2.tar"]
    literal = tmp_path / "x{1..2}.png"
    literal.write_bytes(png())
    assert expand_braces(literal) == [literal]
    with pytest.raises(ArgumentError, match="stands for 1000000000000 files"):
        expand_braces("s-{000000000001..1000000000000}.tar")
    for number in range(2):
        write(tmp_path / f"s-{number}.tar", {f"{number}.png": png()})
    assert [p.file.name for p in find_inputs([f"{tmp_path}/s-{{0..1}}.tar"]).pictures] == ["0.png", "1.png"]
    with pytest.raises(FileNotFoundError, match=r"s-2\.tar"):
        find_inputs([f"{tmp_path}/s-{{0..2}}.tar"])


def test_a_folder_of_tars(tmp_path):
    for number in range(3):
        write(tmp_path / f"s-{number}.tar", {f"{number}.png": png()})
    (tmp_path / "sizes.json").write_text("{}")
    found = find_inputs([tmp_path])
    assert [picture.file.name for picture in found.pictures] == ["0.png", "1.png", "2.png"] and found.from_folders
    (tmp_path / "a.png").write_bytes(png())
    found = find_inputs([tmp_path])
    assert [picture.file.name for picture in found.pictures] == ["a.png"]
    assert found.left_out["with other endings than pictures"] == 4


ELSEWHERE = [
    "../up.png", "a/../../up.png", "/abs.png", "a\\b.png", "a\x01.png", ".ldmseg-run/a.png", f"{'x' * 256}/a.png",
    f"{'x/' * 1025}a.png",
]  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE, ids=lambda name: name[:20])
def test_a_key_that_leads_elsewhere_is_no_result(tmp_path, name):
    found = find_inputs([write(tmp_path / "s.tar", {"a.png": png(), name: png(), "b.png": png()})])
    assert [picture.file.name for picture in found.pictures] == ["a.png", "b.png"]
    assert len(found.broken) == 1 and "rename the member" in found.broken[0] and "\n" not in found.broken[0]


def test_folders_in_a_tar_are_nothing_that_is_left_out(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        (tmp_path / "in" / "b").mkdir(parents=True)
        (tmp_path / "in" / "b" / "a.png").write_bytes(png())
        tar.add(tmp_path / "in", ".")
    found = find_inputs([tmp_path / "s.tar"])
    assert [(each.folder, each.file.name) for each in found.pictures] == [(Path("b"), "a.png")]
    assert not found.left_out and not found.broken


def test_keys_without_a_picture_are_counted(tmp_path):
    """Such as of names with a dot too many, which are no pictures in webdataset either."""
    found = find_inputs([write(tmp_path / "s.tar", {"a.png": png(), "b.2024.png": png(), "c.json": b"{}"})])
    assert [picture.file.name for picture in found.pictures] == ["a.png"] and not found.broken
    assert found.left_out == {"keys without a picture": 2}


@pytest.mark.parametrize("size", [-512, -1024, -1536])
def test_a_header_that_leads_back(tmp_path, size):
    """Python's `tarfile` reads such a tar for ever."""
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        content = io.BytesIO(png())
        first, second = tarfile.TarInfo("a.png"), tarfile.TarInfo("b.png")
        first.size, second.pax_headers = len(content.getvalue()), {"size": str(size)}
        tar.addfile(first, content)
        tar.addfile(second)
    found = find_inputs([tmp_path / "s.tar"])
    assert [picture.file.name for picture in found.pictures] == ["a.png"]
    assert len(found.broken) == 1 and "after 1 members (a damaged header)" in found.broken[0]


def test_links_and_devices(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, kind in (("a.png", tarfile.SYMTYPE), ("b.png", tarfile.LNKTYPE), ("c.png", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    found = find_inputs([tmp_path / "s.tar"])
    assert not found.pictures and len(found.broken) == 3
    assert all("a link or no regular file" in line for line in found.broken)


def test_two_pictures_of_one_key(tmp_path):
    found = find_inputs([write(tmp_path / "s.tar", {"a.jpg": png(), "a.png": png(), "b.jpg": png()})])
    assert [picture.file.name for picture in found.pictures] == ["b.jpg"]
    assert found.broken == [f"{tmp_path}/s.tar: a.jpg, a.png: 2 pictures of one key; name what is no picture KEY.x.png"]


@pytest.mark.parametrize("end", [1, 511, 512, 700, 1024, 1536, 2100, 3072])
def test_a_cut_tar_gives_what_is_whole(tmp_path, end):
    whole = write(tmp_path / "whole.tar", {"a.png": png(), "b.png": png(), "c.png": png()}, tarfile.USTAR_FORMAT)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[:end])
    found = find_inputs([cut])
    assert len(found.pictures) == end // 1024 and len(found.broken) == 1, found.broken
    assert found.broken[0].startswith(f"{cut}: not readable as a tar file")
    for picture in found.pictures:
        picture.read(max_pixels=1000)


def test_a_damaged_header_and_strangers(tmp_path):
    whole = write(tmp_path / "s.tar", {"a.png": png(), "b.png": png()}, tarfile.USTAR_FORMAT).read_bytes()
    (tmp_path / "s.tar").write_bytes(whole[:1030] + b"\xff" * 100 + whole[1130:])
    found = find_inputs([tmp_path / "s.tar"])
    assert len(found.pictures) == 1 and "after 1 members (a damaged header)" in found.broken[0]
    for name, content in (("empty.tar", b""), ("text.tar", b"text" * 999), ("zip.tar", b"PK\3\4" + bytes(2000))):
        (tmp_path / name).write_bytes(content)
        found = find_inputs([tmp_path / name])
        assert not found.pictures and len(found.broken) == 1 and "not readable as a tar file" in found.broken[0]
    found = find_inputs([write(tmp_path / "none.tar", {"a.txt": b""})])
    assert found.broken == [f"{tmp_path}/none.tar: no pictures in this tar file"]
    with pytest.raises(DataError, match="decompress it first"):
        find_inputs([tmp_path / "s.tar.gz"])


def test_a_tar_that_changes_is_seen_when_it_is_read(tmp_path):
    path = write(tmp_path / "s.tar", {"a.png": png(), "b.png": png()})
    *_, last = find_inputs([path]).pictures
    path.write_bytes(path.read_bytes()[:1100])
    with pytest.raises(DataError, match=r"s\.tar/b\.png: the tar file ends in the middle of it"):
        last.read(max_pixels=1000)
    path.unlink()
    with pytest.raises(DataError, match="not readable"):
        last.read(max_pixels=1000)
