"""Many pictures at once, and what may be in a zip that somebody sends."""

import io
import stat
import zipfile

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.app.batch import run_batch, unpack
from ldmseg_fast.app.exports import EXPORTS
from ldmseg_fast.app.limits import Limits
from ldmseg_fast.app.work import Settings
from ldmseg_fast.errors import ArgumentError, DataError

LIMITS = Limits(max_upload=2**20, batch=5, unpacked=2**21)


def png(seed=0, size=(48, 40)):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def make_zip(path, members, compress=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compress) as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    return tmp_path / "pictures"


def test_pictures_of_a_zip_and_files(tmp_path, folder):
    members = {"a/x.png": png(1), "b/x.png": png(2), "readme.txt": b"hi", ".hidden.png": png(), "__MACOSX/x.png": b""}
    source = make_zip(tmp_path / "in.zip", members)
    (tmp_path / "one.png").write_bytes(png(3))
    found = unpack([source, tmp_path / "one.png", tmp_path / "notes.txt"], folder, LIMITS)
    assert [each.name for each in found.pictures] == ["x.png", "x-2.png", "one.png"]
    assert found.left_out == ("readme.txt: no picture by its ending", "notes.txt: no picture by its ending")
    assert sorted(each.name for each in folder.iterdir()) == ["one.png", "x-2.png", "x.png"]
    assert (folder / "x-2.png").read_bytes() == png(2)


@pytest.mark.parametrize("name", ["../x.png", "/tmp/x.png", "..\\x.png", "a/../../x.png", "C:/x.png"])
def test_names_that_lead_out_of_the_zip_are_refused(name, tmp_path, folder):
    with pytest.raises(DataError, match=r"in\.zip: the member .* leads out"):
        unpack([make_zip(tmp_path / "in.zip", {"ok.png": png(), name: png()})], folder, LIMITS)
    assert list(folder.iterdir()) == []


def test_links_and_passwords_are_refused(tmp_path, folder):
    info = zipfile.ZipInfo("link.png")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as zipped:
        zipped.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match="is a link"):
        unpack([tmp_path / "in.zip"], folder, LIMITS)
    content = bytearray(make_zip(tmp_path / "in.zip", {"a.png": png()}).read_bytes())
    content[content.rfind(b"PK\1\2") + 8] |= 1  # the flag of encryption in the list of members
    (tmp_path / "in.zip").write_bytes(content)
    with pytest.raises(DataError, match="without a password"):
        unpack([tmp_path / "in.zip"], folder, LIMITS)


def test_bombs_are_refused(tmp_path, folder):
    bomb = make_zip(tmp_path / "bomb.zip", {"a.png": bytes(8 * 2**20)}, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 2**15
    with pytest.raises(ArgumentError, match="unpack to too much"):
        unpack([bomb], folder, LIMITS)
    assert list(folder.iterdir()) == []
    content = bytearray(bomb.read_bytes())
    place = content.rfind(b"PK\1\2") + 24
    content[place : place + 4] = b"\1\0\0\0"  # a list of members that claims one byte
    bomb.write_bytes(content)
    found = None
    try:
        found = unpack([bomb], folder, LIMITS)
    except ArgumentError as error:
        assert "no pictures" in str(error) or "too much" in str(error)
    assert found is None or sum(each.stat().st_size for each in folder.iterdir()) <= 2**20
    many = {f"{number}.png": bytes(2**19) for number in range(5)}
    with pytest.raises(ArgumentError, match="unpack to too much"):
        unpack([make_zip(tmp_path / "all.zip", many, zipfile.ZIP_DEFLATED)], folder, LIMITS)
    with pytest.raises(ArgumentError, match="6 pictures: this app takes 5"):
        unpack([make_zip(tmp_path / "6.zip", {f"{each}.png": b"" for each in range(6)})], folder, LIMITS)


def test_a_long_list_of_members_is_not_read(tmp_path, folder):
    path = make_zip(tmp_path / "in.zip", {"a.png": png()})
    content = bytearray(path.read_bytes())
    place = content.rfind(b"PK\5\6")
    content[place + 12 : place + 16] = (2**24).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(DataError, match="too many members"):
        unpack([path], folder, LIMITS)


def test_damaged_zips_and_members(tmp_path, folder):
    path = tmp_path / "in.zip"
    path.write_bytes(b"PK\3\4 no zip")
    with pytest.raises(DataError, match=r"in\.zip: no zip"):
        unpack([path], folder, LIMITS)
    with pytest.raises(ArgumentError, match="no pictures in what was given"):
        unpack([make_zip(path, {"a.txt": b""})], folder, LIMITS)
    with pytest.raises(ArgumentError, match="give pictures"):
        unpack([], folder, LIMITS)
    make_zip(path, {"bad.png": png(1), "good.png": png(2)})
    content = bytearray(path.read_bytes())
    content[60:90] = bytes(30)  # inside the first member, whose check sum is wrong then
    path.write_bytes(content)
    found = unpack([path], folder, LIMITS)
    assert [each.name for each in found.pictures] == ["good.png"]
    assert found.left_out == ("bad.png: damaged in the zip, left out",)


@pytest.fixture
def batch(tmp_path, folder, worker):
    members = {"a.png": png(1), "broken.png": b"\x89PNG\r\n\x1a\n", "b.png": png(2), "c.txt": b""}
    found = unpack([make_zip(tmp_path / "in.zip", members)], folder, LIMITS)
    (tmp_path / "results").mkdir()
    return found, tmp_path / "results"


def test_broken_pictures_are_told_and_skipped(batch, worker, tmp_path):
    found, out = batch
    told = []
    result = run_batch(worker, found, out, progress=lambda *args: told.append(args))
    assert [each.name for each in result.pictures] == ["a.png", "b.png"]
    assert (
        len(result.left_out) == 2 and result.left_out[1].startswith("broken.png: ") and "\n" not in result.left_out[1]
    )
    assert told == [(0, 3, "a.png"), (1, 3, "broken.png"), (2, 3, "b.png"), (2, 3, "")]
    expected = worker.segment(found.pictures[0])
    assert result.segments >= len(expected.result.segments_info) and not result.cancelled and result.seconds > 0
    with zipfile.ZipFile(result.write("maps", tmp_path / "out.zip")) as zipped:
        assert set(zipped.namelist()) == {
            f"{name}{end}" for name in "ab" for end in (".png", ".json", "_overlay.png")
        } | {"left-out.txt"}
        assert zipped.read("left-out.txt").decode().count("\n") == 2


@pytest.mark.parametrize("kind", EXPORTS)
def test_results_in_every_format(kind, batch, worker, tmp_path):
    found, out = batch
    result = run_batch(worker, found, out)
    path = result.write(kind, tmp_path / "out.zip")
    with zipfile.ZipFile(path) as zipped:
        assert zipped.testzip() is None and "left-out.txt" in zipped.namelist() and len(zipped.namelist()) > 1


def test_a_batch_that_is_cancelled_keeps_what_is_there(batch, worker, tmp_path):
    found, out = batch
    limits = Limits()
    with limits.work("batch", "me") as stop:
        result = run_batch(worker, found, out, Settings(), stop, lambda done, *_: limits.cancel("me") if done else None)
    assert result.cancelled and [each.name for each in result.pictures] == ["a.png"]
    assert [line.partition(":")[0] for line in result.left_out] == ["c.txt", "broken.png", "b.png"]
    assert result.write("maps", tmp_path / "out.zip").is_file()


def test_a_picture_that_takes_too_long_ends_a_batch(batch, worker, tmp_path):
    found, out = batch
    with Limits(timeout=-1.0).work("batch") as stop:
        result = run_batch(worker, found, out, None, stop)
    assert not result.pictures and not result.cancelled and "limit" in result.left_out[-1]
    with pytest.raises(ArgumentError, match="no results"):
        result.write("maps", tmp_path / "out.zip")


def test_settings_out_of_range_end_a_batch(batch, worker):
    found, out = batch
    with pytest.raises(ArgumentError, match="num_inference_steps=0"):
        run_batch(worker, found, out, Settings(steps=0))
