"""Parts of the server, each by itself: who may come in, ports, folders, files that are old, what is kept."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ldmseg_fast.app import gate as gate_module
from ldmseg_fast.app import process, server
from ldmseg_fast.app.gate import Gate
from ldmseg_fast.app.keep import Keeper
from ldmseg_fast.app.limits import Cancelled, Limits, Refused, TimeOver
from ldmseg_fast.app.metrics import PrometheusMetrics
from ldmseg_fast.app.process import ProcessWorker
from ldmseg_fast.app.server import Address, check_auth, exposed, listen
from ldmseg_fast.app.visitors import Sweeper, visitors_folder
from ldmseg_fast.app.work import Settings, Worker
from ldmseg_fast.cli import main
from ldmseg_fast.errors import ArgumentError, BackendError, CheckpointError
from ldmseg_fast.panoptic.format import read_panoptic_png

ROOT = Path(__file__).resolve().parents[2]


async def inner(scope, receive, send):
    """Answers with the body that it was sent; `/stream` waits until the visitor leaves."""
    if scope["path"].startswith("/gradio_api/queue/data"):
        await send({"type": "http.response.start", "status": 200})
        await receive()
        return
    message = await receive()
    await send({"type": "http.response.start", "status": scope.get("status", 200), "headers": []})
    await send({"type": "http.response.body", "body": message.get("body", b"")})


def run(work):
    """Runs a coroutine in a thread of its own: the browser of other tests has a loop in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def ask(gate, path="/", method="GET", body=b"", headers=(), query=b""):
    """Sends one request through a gate: status and body."""
    sent = []
    parts = [
        {"type": "http.request", "body": body[at : at + 2**20], "more_body": True} for at in range(0, len(body), 2**20)
    ]
    messages = iter([*parts, {"type": "http.request", "body": b"", "more_body": False}, {"type": "http.disconnect"}])

    async def receive():
        return next(messages, {"type": "http.disconnect"})

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "method": method, "headers": list(headers), "query_string": query}
    run(gate(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


@pytest.fixture
def limits():
    return Limits(max_upload=100, metrics=PrometheusMetrics())


def rejected(limits, reason):
    return f'ldmseg_rejected_total{{reason="{reason}"}} 1.0' in limits.metrics.text().decode()


def test_a_gate_without_a_password_lets_everybody_in(limits, tmp_path):
    gate = Gate(inner, limits, tmp_path)
    assert ask(gate) == (200, b"")
    assert ask(gate, "/gradio_api/call/x", "POST", b'{"data": [1]}') == (200, b'{"data": [1]}')


def test_a_password(limits, tmp_path, monkeypatch):
    monkeypatch.setattr(gate_module, "WRONG", 0.0)
    gate = Gate(inner, limits, tmp_path, "me:pä:ss")
    good = b"Basic bWU6cMOkOnNz"
    assert ask(gate, "/health")[0] == 200 and ask(gate, "/", headers=[(b"authorization", good)])[0] == 200
    for wrong in (b"", b"Basic", b"Basic !!", b"Bearer bWU6cMOkOnNz", b"Basic bWU6cGFzcw=="):
        assert ask(gate, "/metrics", headers=[(b"authorization", wrong)])[0] == 401


def test_what_is_too_long_is_refused(limits, tmp_path, monkeypatch):
    gate = Gate(inner, limits, tmp_path)
    assert ask(gate, "/gradio_api/upload", "POST", headers=[(b"content-length", b"1001")])[0] == 413
    assert rejected(limits, "upload")
    monkeypatch.setattr(gate_module, "MAX_BODY", 2**21)
    assert ask(gate, "/gradio_api/call/x", "POST", bytes(3 * 2**20))[0] == 413


def test_a_full_disk_is_told(limits, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(gate_module.shutil, "disk_usage", lambda folder: usage(1000))
    status, body = ask(Gate(inner, limits, tmp_path), "/gradio_api/upload", "POST", headers=[(b"content-length", b"9")])
    assert status == 507 and "disk of this machine is full" in json.loads(body)["detail"] and rejected(limits, "disk")
    assert ask(Gate(inner, limits, tmp_path), "/")[0] == 200


@pytest.mark.parametrize("path", ["http://10.0.0.1/x", " HTTPS://a.b/x", "ftp://x/y", "file:/etc/passwd"])
def test_nothing_is_fetched(limits, tmp_path, path):
    for body in ({"data": [{"path": path}]}, {"data": [[{"a": {"path": path, "meta": {"_type": "gradio.FileData"}}}]]}):
        status, answer = ask(Gate(inner, limits, tmp_path), "/gradio_api/queue/join", "POST", json.dumps(body).encode())
        assert status == 400 and b"fetches nothing" in answer


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_files_are_found_however_json_writes_them(limits, tmp_path, encoding):
    for path in ("http://10.0.0.1/x", "/etc/passwd"):
        text = json.dumps({"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}]})
        text = text.replace('"path"', '"\\u0070ath"').replace("gradio.F", "gradio.\\u0046")
        body = text.encode(encoding)
        assert ask(Gate(inner, limits, tmp_path), "/gradio_api/queue/join", "POST", body)[0] == 400


def test_an_upload_says_its_length(limits, tmp_path):
    gate = Gate(inner, limits, tmp_path)
    assert ask(gate, "/gradio_api/upload", "POST", b"chunks")[0] == 411
    assert ask(gate, "/gradio_api/upload", "POST", b"known", [(b"content-length", b"5")])[0] == 200


def test_only_uploads_are_files(limits, tmp_path):
    gate = Gate(inner, limits, tmp_path)
    (tmp_path / "link").symlink_to("/etc")
    (tmp_path / "a.png").touch()
    for path, status in ((f"{tmp_path}/a.png", 200), ("/etc/passwd", 400), (f"{tmp_path}/link/passwd", 400), ("", 400)):
        body = json.dumps({"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}).encode()
        assert ask(gate, "/gradio_api/call/segment", "POST", body)[0] == status, path
    assert ask(gate, "/gradio_api/call/segment", "POST", b'{"path": no json')[0] == 400


def test_a_gate_hears_who_leaves(limits, tmp_path):
    gate = Gate(inner, limits, tmp_path)
    ask(gate, "/gradio_api/queue/data", query=b"session_hash=abc")
    assert "abc" in limits._left and not limits._streams
    with limits.work("segment", "abc", "0123") as stop:
        limits._left["abc"] -= 10
        with pytest.raises(Cancelled, match="has left"):
            stop()
        ask(gate, "/gradio_api/cancel", "POST", b'{"event_id": "0123"}')
        with pytest.raises(Cancelled, match="stopped"):
            stop()
    for body in (b"", b"[]", b"{}", b'{"event_id": 3}'):
        assert ask(gate, "/gradio_api/cancel", "POST", body)[0] == 200
    assert ask(gate, "/gradio_api/cancel", "POST", b"no JSON")[0] == 400


def test_a_request_of_the_api_is_forgotten_when_its_result_is_sent(limits, tmp_path):
    forgotten = []
    gate = Gate(inner, limits, tmp_path, forget=forgotten.append)
    ask(gate, "/gradio_api/call/segment/0123")
    ask(gate, "/gradio_api/call/v2/segment/4567")
    ask(gate, "/gradio_api/call/segment", "POST")
    ask(gate, "/gradio_api/queue/data", query=b"session_hash=abc")
    assert forgotten == ["0123", "4567"]


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
    assert len(errors) == 1
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


@pytest.mark.parametrize(
    ("host", "local", "status"),
    [
        (b"127.0.0.1:7860", True, 200),
        (b"[::1]:7860", True, 200),
        (b"localhost", True, 200),
        (b"a.localhost:1", True, 200),
        (b"evil.example:7860", True, 403),
        (b"127.0.0.1.evil.example", True, 403),
        (b"[", True, 403),
        (b"", True, 403),
        (b"app.example", False, 200),
    ],
)
def test_a_name_of_another_site_does_not_lead_in(limits, tmp_path, host, local, status):
    gate = Gate(inner, limits, tmp_path, local=local)
    for path in ("/", "/gradio_api/file=/x", "/health"):
        assert ask(gate, path, headers=[(b"host", host)])[0] == status
    assert ('ldmseg_rejected_total{reason="site"} 3.0' in limits.metrics.text().decode()) == (status == 403)


def test_pages_of_other_sites_send_nothing(limits, tmp_path):
    for site, status in ((b"cross-site", 403), (b"same-origin", 200), (b"none", 200)):
        for path in ("/gradio_api/call/segment", "/gradio_api/queue/join"):
            headers = [(b"sec-fetch-site", site)]
            assert ask(Gate(inner, limits, tmp_path), path, "POST", b'{"data": []}', headers)[0] == status
    assert ask(Gate(inner, limits, tmp_path), "/", headers=[(b"sec-fetch-site", b"cross-site")])[0] == 200  # a link


def test_a_visitor_who_hangs_up_in_an_upload_is_no_fault(limits, tmp_path):
    class ClientDisconnect(Exception):
        """Has the name of Starlette's."""

    async def reading(scope, receive, send):
        while (await receive())["type"] != "http.disconnect":
            pass
        raise ClientDisconnect if scope["path"] == "/gradio_api/upload" else KeyError("ours")

    async def left(path):
        async def receive():
            return {"type": "http.disconnect"}

        scope = {"type": "http", "path": path, "method": "GET", "headers": [], "query_string": b""}
        await Gate(reading, limits, tmp_path)(scope, receive, None)

    run(left("/gradio_api/upload"))
    with pytest.raises(KeyError, match="ours"):
        run(left("/"))


def test_where_only_this_machine_comes_in():
    for host, options, expected in (
        ("127.0.0.1", {}, True),
        ("127.0.0.1", {"auth": "a:b"}, False),
        ("127.0.0.1", {"share": True}, False),
        ("0.0.0.0", {}, False),
    ):
        with listen(host, 0) as bound:
            assert server.only_local(bound, Address(host, 0, **options)) is expected
