"""Who may come into the app, and what a request may hold."""

import asyncio
import json
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import pytest

from ldmseg_fast.app import gate as gate_module
from ldmseg_fast.app.gate import Gate
from ldmseg_fast.app.limits import Cancelled, Limits
from ldmseg_fast.app.metrics import PrometheusMetrics


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
