"""The folder of an export: written whole or not at all, by one process at a time, and nothing of the user's lost."""

import errno
import multiprocessing
import time
from pathlib import Path

import pytest

from ldmseg_fast.errors import BackendError
from ldmseg_fast.export.model_export import exported_files
from ldmseg_fast.export.output_folder import exclusive, new_folder


def test_a_full_disk_is_one_error_and_nothing_stays(tmp_path):
    with (
        pytest.raises(BackendError, match="the disk is full"),
        new_folder(tmp_path / "out", exported_files) as folder,
    ):
        (folder.path / "half").write_bytes(b"x")
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EFBIG])
def test_a_used_up_quota_is_a_full_disk(tmp_path, code):
    with pytest.raises(BackendError, match="the disk is full"), new_folder(tmp_path / "out", exported_files):
        raise OSError(code, "no more")
    assert not list(tmp_path.iterdir())


def test_folders_that_were_made_for_nothing_go(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(KeyboardInterrupt), exclusive(tmp_path / "mine" / "a" / "b" / ".lock"):
        raise KeyboardInterrupt
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]
    with exclusive(tmp_path / "mine" / "a" / "b" / ".lock"):
        (tmp_path / "mine" / "a" / "work").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "mine", "work"]


def test_a_folder_that_vanishes_is_made_again(tmp_path, monkeypatch):
    """The holder before has removed it between the folder's making and the file's."""
    opened = Path.open
    calls = []

    def vanishing(self, *arguments, **options):
        calls.append(self)
        if len(calls) == 1:
            self.parent.rmdir()
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", vanishing)
    with exclusive(tmp_path / "a" / ".lock"):
        assert len(calls) == 2
    assert not list(tmp_path.iterdir())


def test_a_lock_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "nowhere" / "file")
    with pytest.raises(BackendError, match="cannot be written"), exclusive(tmp_path / ".lock"):
        pass


def test_a_folder_that_was_made_by_a_waiting_process_goes_too(tmp_path):
    out = tmp_path / "e"
    spawn = multiprocessing.get_context("spawn")  # a fork would have this process's lock, too
    waited = spawn.Event()
    with exclusive(out / ".lock"):
        other = spawn.Process(target=hold, args=(out, waited))
        other.start()
        assert waited.wait(60)
    other.join(60)
    assert other.exitcode == 0 and not list(tmp_path.iterdir())


def hold(out, waited):
    with exclusive(out / ".lock", waited.set):
        pass


def test_what_is_not_ours_is_not_deleted(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("export.json", "denoiser.onnx", "parity.json"):
        (out / name).write_text("{}")
    (out / "denoiser.engine").write_bytes(b"hours of building")
    with (
        pytest.raises(BackendError, match=r"no export \(denoiser\.engine\); choose another"),
        new_folder(out, exported_files),
    ):
        pass
    (out / "denoiser.engine").rename(out / "mine.onnx")
    with pytest.raises(BackendError, match=r"no export \(mine\.onnx\)"), new_folder(out, exported_files):
        pass
    (out / "mine.onnx").rename(out / "sampler_4.onnx.data")
    with new_folder(out, exported_files) as folder:
        (folder.path / "export.json").write_text("new")
    assert [path.name for path in out.iterdir()] == ["export.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _export_and_wait(out: Path, ready) -> None:
    with new_folder(out, exported_files) as folder:
        (folder.path / "denoiser.onnx").write_bytes(b"half")
        ready.set()
        time.sleep(60)


def test_a_second_export_waits_and_clears_up_after_a_killed_one(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, out, said = context.Event(), tmp_path / "out", []
    worker = context.Process(target=_export_and_wait, args=(out, ready))
    worker.start()
    assert ready.wait(30) and not out.exists()

    def waiting(text):
        said.append(text)
        worker.kill()

    with new_folder(out, exported_files, waiting) as folder:
        assert folder.waited and not list(folder.path.iterdir())
        (folder.path / "export.json").write_text("new")
    worker.join(30)
    assert "another export is under way; waiting" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_killed_in_the_last_moment(tmp_path):
    """Between the two renames: the older export is found again."""
    old = tmp_path / ".out.old.123"
    old.mkdir()
    (old / "export.json").write_text("old")
    (tmp_path / ".out.old.zip").write_text("mine")
    with new_folder(tmp_path / "out", exported_files) as folder:
        folder.keep = False
    assert (tmp_path / "out" / "export.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.old.zip", "out"]


def test_what_comes_while_the_export_runs_is_not_deleted(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(BackendError, match=r"no export \(mine\.txt\)"), new_folder(out, exported_files):
        out.mkdir()
        (out / "mine.txt").write_text("meanwhile")
    assert (out / "mine.txt").read_text() == "meanwhile"


def test_folders_that_cannot_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_folder(tmp_path / "link", exported_files) as folder:
        (folder.path / "export.json").write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "export.json").read_text() == "new"
    monkeypatch.chdir(tmp_path / "real")
    with (
        pytest.raises(BackendError, match="the current folder, which cannot be replaced"),
        new_folder(Path(), exported_files),
    ):
        pass
    (tmp_path / "file").touch()
    with (
        pytest.raises(BackendError, match=r"file: cannot be written \(File exists\); choose another folder"),
        new_folder(tmp_path / "file" / "out", exported_files),
    ):
        pass
    (tmp_path / "loop").symlink_to("loop")
    for out, message in (
        (tmp_path / "loop", "a link that leads to itself"),
        (Path("/"), "the root of the file system"),
    ):
        with pytest.raises(BackendError, match=message), new_folder(out, exported_files):
            pass
