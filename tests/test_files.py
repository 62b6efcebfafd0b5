"""Files and folders take the place of older ones: whole or not at all, through links, and without leftovers."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ldmseg_fast import temporary
from ldmseg_fast.errors import CheckpointError, DataError
from ldmseg_fast.files import (
    check_output,
    inside,
    is_standard_output,
    open_file,
    read_lines,
    real_path,
    replacing,
    replacing_folder,
    require_file,
    write_json,
)

ROOT = Path(__file__).resolve().parents[1]


def killed(function: Callable[[], object]) -> None:
    """Runs a function in a process that kills itself at the end."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "漢" * 85, "名" * 84 + ".ab"], ids=["x", "é", "漢", "名"])
def test_every_name_that_the_file_system_takes(name: str, tmp_path: Path) -> None:
    write_json(tmp_path / name, [1])
    write_json(tmp_path / name, [2])
    assert json.loads((tmp_path / name).read_text()) == [2] and len(list(tmp_path.iterdir())) == 1
    with replacing_folder(tmp_path / ("f" + name[1:])) as folder:
        (folder / "file").touch()
    with pytest.raises(OSError, match="too long") as caught:
        write_json(tmp_path / (name + name), 1)
    assert caught.value.filename == str(tmp_path / (name + name))


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "x.json").write_text("old")
    (tmp_path / "one").symlink_to("far/x.json")
    (tmp_path / "two").symlink_to("one")
    (tmp_path / "dangling").symlink_to("far/new.json")
    for link in ("two", "dangling"):
        check_output(tmp_path / link)
        write_json(tmp_path / link, link)
        assert (tmp_path / link).is_symlink()
    assert (tmp_path / "far" / "x.json").read_text() == '"two"\n'
    assert (tmp_path / "far" / "new.json").read_text() == '"dangling"\n'
    assert sorted(path.name for path in (tmp_path / "far").iterdir()) == ["new.json", "x.json"]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        write_json(tmp_path / "loop", 1)


def test_a_folder_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "old").touch()
    (tmp_path / "link").symlink_to("far")
    with replacing_folder(tmp_path / "link") as folder:
        (folder / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["new"]


def test_a_folder_does_not_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("mine")
    (tmp_path / "link").symlink_to("thesis")
    os.mkfifo(tmp_path / "pipe")
    for name in ("thesis", "link", "pipe"):
        with pytest.raises(NotADirectoryError) as caught, replacing_folder(tmp_path / name):
            pass
        assert caught.value.filename == str(tmp_path / name)
    assert (tmp_path / "thesis").read_text() == "mine" and (tmp_path / "pipe").is_fifo()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_link_that_leads_to_itself(tmp_path: Path) -> None:
    loop = tmp_path / "loop.png"
    loop.symlink_to(loop.name)
    for check in (require_file, open_file):
        with pytest.raises(DataError, match=r"loop\.png: a link that leads to itself; put the file in its place"):
            check(loop)
    with pytest.raises(CheckpointError, match="leads to itself"):
        inside(tmp_path, loop)
    assert real_path(loop) == real_path(tmp_path) / "loop.png"


def test_a_device_is_written_to(tmp_path: Path) -> None:
    before = Path("/dev/null").stat()
    (tmp_path / "link").symlink_to("/dev/null")
    for path in (Path("/dev/null"), tmp_path / "link"):
        check_output(path)
        write_json(path, 1)
    assert os.path.samestat(before, Path("/dev/null").stat()) and (tmp_path / "link").is_symlink()
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_json(Path("/dev/full"), 1)
    assert caught.value.filename == "/dev/full"


def test_a_named_pipe_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    write_json(tmp_path / "pipe", {"a": 1})
    reader.join(10)
    assert json.loads(read[0]) == {"a": 1} and (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "LINK"])
def test_standard_output_is_written_to_in_its_turn(path: str, tmp_path: Path) -> None:
    """Also where it is a file, which must not lose what is printed before and after."""
    if path == "LINK":
        (tmp_path / "link").symlink_to("/dev/stdout")
        path = str(tmp_path / "link")
    program = (
        "import sys; from pathlib import Path; from ldmseg_fast.files import check_output, write_json\n"
        "print('before'); check_output(sys.argv[1]); write_json(Path(sys.argv[1]), 7); print('after')"
    )
    command = [sys.executable, "-c", program, path]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (tmp_path / "out").open("w") as out:
        subprocess.run(command, stdout=out, env=environment, check=True)
    piped = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    assert (tmp_path / "out").read_text() == piped == "before\n7\nafter\n"


def test_what_is_standard_output() -> None:
    assert is_standard_output("/dev/stdout") and is_standard_output(f"/proc/{os.getpid()}/fd/1")
    assert not any(map(is_standard_output, (None, "/dev/stderr", "/dev/null", "x/fd/1", "/dev/fd/x")))


def test_rights_stay(tmp_path: Path) -> None:
    (tmp_path / "x").touch(0o600)
    write_json(tmp_path / "x", 1)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600


def test_leftovers_of_a_killed_process_go_with_the_next_start(tmp_path: Path) -> None:
    def half(path: Path) -> None:
        with replacing(path) as unfinished:
            unfinished.write_text("half")
            die()

    def half_folder(path: Path) -> None:
        with replacing_folder(path) as unfinished:
            (unfinished / "half").touch()
            die()

    (tmp_path / "x").write_text("old")
    for kill in (lambda: half(tmp_path / "x"), lambda: half_folder(tmp_path / "f")):
        killed(kill)
        left = [path for path in tmp_path.iterdir() if temporary.NAME.fullmatch(path.name)]
        assert len(left) == 1 and (tmp_path / "x").read_text() == "old" and not (tmp_path / "f").exists()
    write_json(tmp_path / "y", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]


def test_what_another_process_is_writing_stays(tmp_path: Path) -> None:
    with replacing(tmp_path / "x") as own, replacing_folder(tmp_path / "f") as folder:
        own.write_text("whole")
        (folder / "file").touch()
        child = os.fork()
        if child == 0:
            temporary.clear_leftovers(tmp_path)
            os._exit(0)
        os.waitpid(child, 0)
        assert own.is_file() and (folder / "file").is_file()
    assert (tmp_path / "x").read_text() == "whole" and (tmp_path / "f" / "file").is_file()


@pytest.mark.parametrize("moment", ["made", "opened"])
@pytest.mark.parametrize("kind", [temporary.temporary_file, temporary.temporary_folder])
def test_another_process_clears_before_the_lock_is_there(
    kind: Callable, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the path for a leftover as soon as it is there; the first path is lost, and another one made."""
    temporary.clear_once(tmp_path)
    cleared, make_folder, lock = [], Path.mkdir, temporary._lock

    def clear() -> None:
        if not cleared:
            cleared.extend(tmp_path.iterdir())
            temporary.clear_leftovers(tmp_path)

    def then_clear(path: Path) -> None:
        make_folder(path)
        clear()

    def held_by_another(descriptor: int) -> bool | None:
        if cleared:
            return lock(descriptor)
        cleared.extend(tmp_path.iterdir())
        return False

    if moment == "made":
        monkeypatch.setattr(Path, "mkdir", then_clear)
    else:
        monkeypatch.setattr(temporary, "_lock", held_by_another)
    with kind(tmp_path) as path:
        assert path.exists() and path not in cleared
    assert bool(cleared) == (moment == "opened" or kind is temporary.temporary_folder)


def test_no_folder_is_no_reason_to_try_again(tmp_path: Path) -> None:
    for kind in (temporary.temporary_file, temporary.temporary_folder):
        with pytest.raises(FileNotFoundError), kind(tmp_path / "none"):
            pass


def test_what_only_has_a_leftovers_name_stays(tmp_path: Path) -> None:
    """A pipe, which nobody writes into, and a link to a file and to a folder of the user's."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    os.mkfifo(tmp_path / ".ldmseg-0123456789ab.tmp")
    (tmp_path / ".ldmseg-0123456789ac.tmp").symlink_to("mine")
    (tmp_path / ".ldmseg-0123456789ad.tmp").symlink_to("mine/file")
    (tmp_path / ".ldmseg-0123456789ae.tmp").touch()
    temporary.clear_leftovers(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4 and (tmp_path / "mine" / "file").is_file()


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_there_at_every_moment(exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after each rename in turn; where the file system cannot exchange two folders there are two."""
    if not exchange:
        monkeypatch.setattr(temporary, "_exchange", lambda *_: False)
    final = tmp_path / "model"
    with replacing_folder(final) as folder:
        (folder / "old").touch()
    rename = Path.rename

    def replace(kills: int) -> None:
        def counted(path: Path, target: Path) -> Path:
            nonlocal kills
            renamed = rename(path, target)
            kills -= 1
            if kills == 0:
                die()
            return renamed

        monkeypatch.setattr(Path, "rename", counted)
        with replacing_folder(final) as folder:
            (folder / "new").touch()

    for kills in (1, 2):
        killed(lambda kills=kills: replace(kills))
        temporary.clear_leftovers(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        found = [path.name for path in final.iterdir()]
        assert found == (["new"] if exchange or kills == 2 else ["old"])


@pytest.mark.parametrize("back", [True, False], ids=["put back", "kept aside"])
def test_a_rename_that_fails_loses_no_folder(back: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two folders cannot change places, and the new one cannot be put in its place either."""
    monkeypatch.setattr(temporary, "_exchange", lambda *_: False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("mine")
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name == temporary.NEW or (target == tmp_path / "model" and not back):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"), replacing_folder(tmp_path / "model") as folder:
        (folder / "new").touch()
    monkeypatch.setattr(Path, "rename", rename)
    temporary.clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "old").read_text() == "mine"


def test_only_whole_records_are_read(tmp_path: Path) -> None:
    lines = [
        b'{"a": 1}',
        b"5",
        b"null",
        b"[1]",
        b"",
        b"\0\0",
        b"[" * 10_000,
        b'{"a": "\xe2\x80\xa8"}\r',
        b'{"b": "\xc3',
    ]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines))
    assert read_lines(tmp_path / "log.jsonl") == [{"a": 1}, {"a": "\u2028"}]
    assert read_lines(tmp_path / "none.jsonl") == []


def test_an_error_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(OSError, match="No space left") as caught, replacing(tmp_path / "x") as unfinished:
        unfinished.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(tmp_path / "x") and (tmp_path / "x").read_text() == "old"
    assert str(caught.value) == f"[Errno 28] No space left on device: '{tmp_path}/x'"
    with pytest.raises(FileNotFoundError) as missing:
        write_json(tmp_path / "none" / "x", 1)
    assert missing.value.filename == str(tmp_path / "none" / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_read_only_disk_is_named_by_what_was_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with pytest.raises(OSError) as caught, replacing_folder(tmp_path / "model") as folder:
        (folder / "unet").write_bytes(b"")
        (folder / "unet" / "x").touch()
    assert caught.value.filename == str(tmp_path / "model" / "unet" / "x")
    monkeypatch.setattr(temporary, "_make_folder", refuse)
    with pytest.raises(OSError) as caught, replacing_folder(tmp_path / "model"):
        pass
    assert caught.value.filename == str(tmp_path / "model") and caught.value.filename2 is None
