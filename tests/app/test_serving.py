"""Parts of the server, each by itself: ports, folders, files that are old, what is kept."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ldmseg_fast.app import process, server
from ldmseg_fast.app.keep import Keeper
from ldmseg_fast.app.limits import Limits, Refused, TimeOver
from ldmseg_fast.app.process import ProcessWorker
from ldmseg_fast.app.server import Address, check_auth, exposed, listen
from ldmseg_fast.app.visitors import Sweeper, visitors_folder
from ldmseg_fast.app.work import Settings, Worker
from ldmseg_fast.cli import main
from ldmseg_fast.errors import ArgumentError, BackendError, CheckpointError
from ldmseg_fast.panoptic.format import read_panoptic_png

ROOT = Path(__file__).resolve().parents[2]


def test_a_free_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ArgumentError, match=rf"--port {port} on 127\.0\.0\.1: .*: --port \d+ is free"):
            listen("127.0.0.1", port)
    with listen("127.0.0.1", 0) as free:
        assert free.getsockname()[1] > 0
    with pytest.raises(ArgumentError, match="--host no such host"):
        listen("no such host", 0)


def test_what_an_address_exposes():
    assert exposed(Address()) == []
    assert "anybody" in exposed(Address("0.0.0.0"))[0] and "--auth" in exposed(Address("0.0.0.0"))[0]
    guarded = exposed(Address("0.0.0.0", auth="me:secret"), "https://x")
    assert len(guarded) == 3 and "secret" not in "".join(guarded) and "internet" in guarded[2]


@pytest.mark.parametrize("text", ["", "me", "me:", ":secret", "me:sec\nret"])
def test_a_password_of_another_form(text):
    with pytest.raises(ArgumentError) as caught:
        check_auth(text, "--auth")
    assert "secret" not in str(caught.value) and str(caught.value).startswith("--auth: USER:PASSWORD")
    assert check_auth("me:se:cret", "--auth") == "me:se:cret"


def test_the_folder_of_visitors_goes_away(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("TEMP_DIR", "ANALYTICS_ENABLED", "ANALYTICS_MAX_EVENTS"):
        monkeypatch.setenv(f"GRADIO_{name}", "before")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "before")
    code = (
        "import os, tempfile\nfrom ldmseg_fast.app.visitors import visitors_folder\n"
        "with visitors_folder() as folder:\n    (folder / 'a.png').touch()\n    os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix == ".png"] == ["a.png"]
    with visitors_folder() as folder:
        assert os.environ["GRADIO_TEMP_DIR"] == tempfile.gettempdir() == str(folder)
        assert not list(tmp_path.rglob("a.png"))  # what was killed has left nothing
        (folder / "b.png").touch()
    assert tempfile.gettempdir() == str(tmp_path) and not list(tmp_path.rglob("*.png"))
    root = next(tmp_path.iterdir())
    root.rmdir()
    root.symlink_to("/tmp")
    with pytest.raises(ArgumentError, match="TMPDIR"), visitors_folder():
        pass


def test_old_files_are_deleted(tmp_path):
    (tmp_path / "example.png").touch()
    (tmp_path / "link").symlink_to("/etc/passwd")
    with Sweeper(tmp_path, age=60.0, every=0.01) as sweeper:
        for name in ("a/old.png", "b/new.png"):
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).touch()
        for name in ("a/old.png", "a", "example.png"):
            os.utime(tmp_path / name, (time.time() - 100,) * 2)
        end = time.monotonic() + 10
        while (tmp_path / "a").exists() and time.monotonic() < end:
            os.utime(tmp_path / "a", (time.time() - 100,) * 2)
            time.sleep(0.02)
        assert sweeper.sweep() == 0
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["example.png", "new.png"]
    assert not (tmp_path / "a").exists() and Path("/etc/passwd").exists()


def test_what_is_kept(scene, tmp_path):
    worker = Worker()
    worker.keep = Keeper(tmp_path)
    done = worker.segment(scene[0])
    known = np.zeros((64, 64), bool)
    known[:, :40] = True
    worker.complete(np.asarray(done.view), scene[1], known)
    worker.compare(scene[0], None, None)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 4 and sum("complete" in path.name for path in kept) == 1
    first = next(path for path in kept if "segment" in path.name)
    np.testing.assert_array_equal(read_panoptic_png(first / "map.png"), done.result.segmentation)
    assert json.loads((first / "result.json").read_text())["segments_info"] == done.result.segments_info
    assert (first / scene[0].name).read_bytes() == scene[0].read_bytes()


def test_without_gradio_one_line_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", "--port", "0"]) == 2
    assert capsys.readouterr().err == f"error: {server.MISSING}\n"
    assert "pip install 'ldmseg_fast[app]'" in server.MISSING


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--auth", "secret"], "--auth: USER:PASSWORD"),
        (["--auth", "@/no/such/file"], "/no/such/file"),
        (["--port", "70000"], "--port 70000"),
        (["--queue", "0"], "--queue 0"),
        (["--timeout", "0"], "--timeout 0"),
        (["--max-pixels", "0"], "--max-pixels 0"),
        (["--max-upload", "0"], "--max-upload 0"),
        (["--keep", "/proc/x"], "/proc/x"),
    ],
    ids=lambda value: value[0] + value[1].replace("/", "_") if isinstance(value, list) else "",
)
def test_bad_options_are_one_line(options, word, capsys):
    assert main(["app", *options]) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def apart():
    worker = ProcessWorker(threads=1)
    yield worker
    worker.close()


@pytest.mark.serial
def test_a_model_in_its_own_process_gives_the_same(apart, worker, scene):
    done, expected = apart.segment(scene[0], Settings(seed=2)), worker.segment(scene[0], Settings(seed=2))
    np.testing.assert_array_equal(done.result.segmentation, expected.result.segmentation)
    assert done.result.segments_info == expected.result.segments_info and done.settings == expected.settings
    known = np.zeros((64, 64), bool)
    known[:, :40] = True
    completed = apart.complete(scene[0], scene[1], known)
    np.testing.assert_array_equal(completed.result.segmentation[known], scene[1][known])
    assert apart.compare(scene[0], None, None).share == 1.0
    with pytest.raises(ArgumentError, match="num_inference_steps=0"):
        apart.segment(scene[0], Settings(steps=0))
    with pytest.raises(AttributeError) as caught:
        apart._call("no_such_work", (), {}, None)
    assert "Traceback" in "".join(caught.value.__notes__)


@pytest.mark.serial
def test_work_in_another_process_is_stopped(apart, scene):
    before = apart.process_id
    limits = Limits(timeout=0.5)
    with pytest.raises(TimeOver), limits.work("segment") as stop:
        apart.segment(scene[0], Settings(steps=1000, size=256), stop)
    assert apart.process_id == before  # it ended between two steps
    assert apart.segment(scene[0]).result.segments_info


@pytest.mark.serial
def test_a_process_that_does_not_stop_is_killed(apart, scene, monkeypatch):
    monkeypatch.setattr(process, "PATIENCE", 0.0)
    before = apart.process_id
    with pytest.raises(TimeOver), Limits(timeout=0.3).work("segment") as stop:
        apart.segment(scene[0], Settings(steps=1000, size=512), stop)
    assert apart.segment(scene[0]).result.segments_info and apart.process_id != before


@pytest.mark.serial
def test_the_end_does_not_wait_for_work(scene):
    worker = ProcessWorker(threads=1)
    worker.warm_up()
    errors = []

    def work():
        with pytest.raises(Refused) as caught:
            worker.segment(scene[0], Settings(steps=100, size=256))
        errors.append(str(caught.value))

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.5)
    start = time.perf_counter()
    worker.close()
    assert time.perf_counter() - start < 5
    thread.join()
    assert errors == ["the app is ending: nothing more is done"]
    with pytest.raises(Refused, match="the app is ending"):
        worker.segment(scene[0])
    worker.warm_up()
    assert worker.process_id is None


def test_a_model_that_is_none_is_told_at_once():
    with pytest.raises(CheckpointError, match="no such model folder"):
        ProcessWorker("nothing")


def test_a_tunnel_that_fails_is_one_line(monkeypatch):
    networking = pytest.importorskip("gradio.networking", reason="the extra `app` brings gradio")

    def fail(*_):
        raise RuntimeError("Could not get share link\nfrom Gradio API Server.")

    monkeypatch.setattr(networking, "setup_tunnel", fail)
    with listen("127.0.0.1", 0) as bound, pytest.raises(BackendError, match="leave --share out") as caught:
        server.public_address(bound)
    assert "\n" not in str(caught.value)


def test_a_file_of_a_password_that_is_no_text(model_dir, tmp_path, capsys):
    (tmp_path / "password").write_bytes(b"\x89PNG\xff")
    assert main(["app", "--model", str(model_dir), "--auth", f"@{tmp_path / 'password'}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: --auth @{tmp_path / 'password'}: no text in UTF-8; ")


def test_where_only_this_machine_comes_in():
    for host, options, expected in (
        ("127.0.0.1", {}, True),
        ("127.0.0.1", {"auth": "a:b"}, False),
        ("127.0.0.1", {"share": True}, False),
        ("0.0.0.0", {}, False),
    ):
        with listen(host, 0) as bound:
            assert server.only_local(bound, Address(host, 0, **options)) is expected
