"""The server as a process of its own: its API over HTTP, its limits, its end."""

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the extra `app` brings gradio: pip install 'ldmseg_fast[app]'")

import httpx

from benchmarks.bench_app import put_load
from benchmarks.measuring.app_server import AppError, Visitor, serving
from ldmseg_fast.app.api import upload_of
from ldmseg_fast.app.work import Settings
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.panoptic.format import read_panoptic_png, write_panoptic_png

pytestmark = pytest.mark.serial
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return tmp_path_factory.mktemp("temporary"), tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def server(places):
    temporary, kept = places
    options = ("--max-upload", "1", "--max-pixels", "100000", "--timeout", "6", "--queue", "16", "--keep", str(kept))
    with serving(*options, environment={"TMPDIR": str(temporary)}) as server:
        yield server


@pytest.fixture
def visitor(server):
    with Visitor(server.url) as visitor:
        yield visitor


def fetched(visitor, file):
    answer = visitor.client.get(file["url"])
    assert answer.status_code == 200
    return answer.content


def numbers(visitor):
    lines = visitor.client.get("/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def png(size, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


def huge_header():
    """A PNG of a few bytes whose header claims 40000 x 40000 pixels."""
    content = bytearray(png((1, 1)))
    content[16:24] = (40000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def test_health_and_what_is_served(server, visitor):
    found = visitor.client.get("/health").json()
    assert (found["status"], found["model"], found["backends"]) == ("ok", "tiny", ["torch"])
    page = visitor.client.get("/")
    assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    for tag in ("<script", "<link"):  # nothing of another server is asked for
        for part in page.text.split(tag)[1:]:
            head = part.partition(">")[0]
            assert "http://" not in head.replace(server.url, "") and "https://" not in head, head
    assert visitor.client.get("/docs").status_code == 404 or "swagger" not in visitor.client.get("/docs").text
    names = set(visitor.client.get("/gradio_api/info").json()["named_endpoints"])
    assert names == {"/segment", "/complete", "/compare", "/score", "/batch"}


def test_segment_over_http(visitor, scene, places, worker):
    before = numbers(visitor)
    described, file, overlay = visitor.call("segment", visitor.upload(scene[0]), {"seed": 3})
    expected = worker.segment(scene[0], Settings(seed=3))
    (places[0] / "map.png").write_bytes(fetched(visitor, file))
    np.testing.assert_array_equal(read_panoptic_png(places[0] / "map.png"), expected.result.segmentation)
    assert described["segments_info"] == expected.result.segments_info and described["settings"]["seed"] == 3
    assert Image.open(io.BytesIO(fetched(visitor, overlay))).size == (64, 64)
    after = numbers(visitor)
    key = 'ldmseg_requests_total{outcome="done",work="segment"}'
    assert after[key] == before.get(key, 0) + 1 and after["ldmseg_segments_total"] > 0
    kept = max(places[1].iterdir(), key=lambda path: path.stat().st_mtime)
    assert {path.name for path in kept.iterdir()} == {scene[0].name, "map.png", "result.json"}
    assert (kept / scene[0].name).read_bytes() == scene[0].read_bytes()


def test_complete_compare_score_and_batch_over_http(visitor, scene, places):
    picture, truth = visitor.upload(scene[0]), scene[1]
    write_panoptic_png(places[0] / "truth.png", truth)
    mask = np.zeros(truth.shape, np.uint8)
    mask[:, :40] = 255
    Image.fromarray(mask).save(places[0] / "known.png")
    given = visitor.upload(places[0] / "truth.png")
    _, file, _ = visitor.call("complete", picture, given, visitor.upload(places[0] / "known.png"), {}, None)
    (places[0] / "map.png").write_bytes(fetched(visitor, file))
    done = read_panoptic_png(places[0] / "map.png")
    np.testing.assert_array_equal(done[:, :40], truth[:, :40])
    with pytest.raises(AppError, match="one of known"):
        visitor.call("complete", picture, given, None, {}, None)
    described, *files = visitor.call("compare", picture, {}, {"steps": 2})
    assert 0 < described["agreement"] <= 1 and described["second"]["settings"]["steps"] == 2 and len(files) == 3
    assert visitor.call("score", given, given)[0]["pq"] == 1.0
    described, file = visitor.call("batch", [picture, visitor.upload("broken.png", b"no")], {}, "labelme")
    assert described["pictures"] == 1 and described["left_out"][0].startswith("broken.png: ")
    with zipfile.ZipFile(io.BytesIO(fetched(visitor, file))) as zipped:
        assert "left-out.txt" in zipped.namelist()


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("broken.png", b"\x89PNG\r\n\x1a\nno", r"broken\.png"),
        ("text.jpg", b"hello", r"text\.jpg"),
        ("huge.png", huge_header(), r"huge\.png: over 100000 pixels"),
        ("large.png", png((400, 300)), r"large\.png: .*over 100000 pixels"),
        ("empty.png", b"", r"empty\.png"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith(("png", "jpg")) else "",
)
def test_bad_uploads_are_told_in_one_line(visitor, name, content, word):
    with pytest.raises(AppError, match=word) as caught:
        visitor.call("segment", visitor.upload(name, content), {})
    assert "\n" not in str(caught.value) and "/" not in str(caught.value).replace("image/", "")


def test_what_was_not_uploaded_is_refused(server, visitor, scene):
    meta = {"_type": "gradio.FileData"}
    for path in ("/etc/passwd", str(scene[0]), "../../etc/passwd", "x\0y", ""):
        for file in ({"path": path, "meta": meta}, {"path": path}, path):
            with pytest.raises(AppError, match=r"no such upload|a file expected"):
                visitor.call("segment", file, {})
    held = Path(visitor.upload("any.png", png((1, 1)))["path"])
    with pytest.raises(AppError, match="no such upload"):  # of a link out of the folder
        (held.parent / "link.png").symlink_to("/etc/passwd")
        visitor.call("segment", {"path": str(held.parent / "link.png"), "meta": meta}, {})
    (held.parent / "link.png").unlink()
    for path in ("http://127.0.0.1:9/x.png", "https://example.com/x.png", "file:///etc/passwd"):
        with pytest.raises(AppError, match=r"400: .*fetches nothing"):
            visitor.call("segment", {"path": path, "meta": meta}, {})
    assert visitor.client.get("/gradio_api/file=/etc/passwd").status_code in (403, 404)
    assert visitor.client.get(f"/gradio_api/file={ROOT / 'setup.py'}").status_code in (403, 404)


def test_settings_out_of_range_are_told(visitor, scene):
    file = visitor.upload(scene[0])
    for settings, word in (({"steps": 0}, "num_inference_steps=0"), ({"stepz": 1}, "stepz"), ([1], "JSON object")):
        with pytest.raises(AppError, match=word):
            visitor.call("segment", file, settings)


@pytest.mark.parametrize(
    ("name", "values", "word"),
    [
        ("batch", (5, {}, "maps"), "files: int; a list of uploaded files"),
        ("batch", (True, {}, "maps"), "files: bool; a list"),
        ("complete", ("P", "P", None, {}, "1"), "unknown_id='1': a whole number"),
        ("complete", ("P", "P", None, {}, True), "unknown_id=True: at least 0"),
        ("complete", ("P", "P", None, {}, -1), "unknown_id=-1: at least 0"),
        ("segment", ("P", {"size": 10**30}), "at most 16384"),
        ("segment", ("P", {"a" * 10000: 1}), "no such setting"),
    ],
    ids=lambda value: "",
)
def test_values_of_other_kinds_are_named(visitor, scene, name, values, word):
    uploaded = visitor.upload(scene[0])
    with pytest.raises(AppError, match=word) as error:
        visitor.call(name, *(uploaded if value == "P" else value for value in values))
    assert len(str(error.value)) < 400


def test_calls_that_gradio_would_log_are_refused_in_a_line(visitor):
    for path, body, word in (
        ("call/segment", {"data": []}, "`data` has 0 values; 2 expected"),
        ("call/batch", {"data": [1, 2, 3, 4]}, "`data` has 4 values; 3 expected"),
        ("queue/join", {"data": [], "fn_index": -1, "session_hash": "a"}, "fn_index=-1: this app has no"),
        ("queue/join", {"data": [], "fn_index": 10**400, "session_hash": "a"}, "this app has no such function"),
    ):
        answer = visitor.client.post(f"/gradio_api/{path}", json=body)
        assert answer.status_code == 400 and word in answer.json()["detail"]


def test_half_of_a_character_is_no_file():
    for value in ("\ud800", {"path": "\ud800"}):
        with pytest.raises(ArgumentError, match="picture: a file expected"):
            upload_of(value, "picture")


def test_whole_numbers_may_be_written_with_a_point(visitor, scene):
    described = visitor.call("segment", visitor.upload(scene[0]), {"count_threshold": 8.0})[0]
    assert described == visitor.call("segment", visitor.upload(scene[0]), {"count_threshold": 8})[0] | {
        "seconds": described["seconds"]
    }


def test_large_uploads_and_bodies_are_refused(visitor):
    with pytest.raises(AppError, match="413"):
        visitor.upload("a.png", bytes(2 * 2**20))
    with pytest.raises(AppError, match="413"):
        visitor.upload("a.png", bytes(11 * 2**20))
    with pytest.raises(AppError, match="413"):
        visitor.start("segment", "x" * (9 * 2**20), {})
    assert numbers(visitor)['ldmseg_rejected_total{reason="upload"}'] >= 2


def test_a_request_ends_when_its_time_is_over(visitor, scene):
    start = time.monotonic()
    with pytest.raises(AppError, match="over 6 seconds"):
        visitor.call("segment", visitor.upload(scene[0]), {"steps": 1000, "size": 512})
    assert time.monotonic() - start < 30
    assert visitor.call("segment", visitor.upload(scene[0]), {})[0]["segments_info"]


def test_work_ends_when_its_visitor_leaves_or_cancels(server, visitor, scene):
    slow = {"steps": 1000, "size": 256}
    file = visitor.upload(scene[0])
    key = 'ldmseg_requests_total{outcome="cancelled",work="segment"}'
    before = numbers(visitor).get(key, 0)
    event = visitor.start("segment", file, slow)
    with Visitor(server.url) as other, pytest.raises(httpx.ReadTimeout):
        other.client.get(f"/gradio_api/call/segment/{event}", timeout=1.0)
    end = time.monotonic() + 5
    while numbers(visitor).get(key, 0) == before and time.monotonic() < end:
        time.sleep(0.1)
    assert numbers(visitor)[key] == before + 1
    event = visitor.start("segment", file, slow)
    while not visitor.client.get("/health").json()["running"]:
        time.sleep(0.05)
    visitor.client.post("/gradio_api/cancel", json={"session_hash": event, "fn_index": 0, "event_id": event})
    while numbers(visitor).get(key, 0) < before + 2 and time.monotonic() < end + 10:
        time.sleep(0.1)
    assert numbers(visitor)[key] == before + 2


def test_two_visitors_at_once_and_a_short_load(server):
    load = put_load(server, clients=2, requests=12)
    assert not load.lost and len(load.seconds) == 12 and all(len(each) == 1 for each in load.segments.values())


def test_a_full_queue_turns_visitors_away(server, scene):
    with Visitor(server.url) as visitor:
        file = visitor.upload(scene[0])
        events = []
        with pytest.raises(AppError, match=r"503: .*Queue is full"):
            for _ in range(40):
                events.append(visitor.start("segment", file, {"steps": 12}))
        assert 16 <= len(events) <= 30
        for event in events:
            assert visitor.result("segment", event)[0]["segments_info"] is not None
        assert numbers(visitor)['ldmseg_rejected_total{reason="queue"}'] >= 1


def test_a_killed_model_is_told_and_starts_again(server, visitor, scene):
    file = visitor.upload(scene[0])
    event = visitor.start("segment", file, {"steps": 1000, "size": 256})
    while not visitor.client.get("/health").json()["running"]:
        time.sleep(0.05)
    time.sleep(0.5)
    for child in server.children():
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(child, signal.SIGKILL)
    with pytest.raises(AppError, match="the model's process was ended by signal 9"):
        visitor.result("segment", event)
    assert visitor.call("segment", file, {})[0]["segments_info"]


def test_gradio_client(server, scene):
    from gradio_client import Client, handle_file

    client = Client(server.url, verbose=False)
    described, file, overlay = client.predict(handle_file(scene[0]), {}, api_name="/segment")
    assert described["segments_info"] and read_panoptic_png(file).shape == (64, 64) and Path(overlay).is_file()


def test_the_documented_calls_work(server, scene, tmp_path):
    (tmp_path / "picture.png").write_bytes(scene[0].read_bytes())
    text = (ROOT / "docs" / "app.md").read_text(encoding="utf-8").replace("http://127.0.0.1:7860", server.url)
    python = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", python[0]], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
    )
    assert re.match(r"\d+ segments .*picture\.png", done.stdout)
    shell = [code for code in re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if "curl" in code]
    done = subprocess.run(["bash", "-eu", "-c", shell[0]], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "event: complete" in done.stdout and '"segments_info"' in done.stdout


def test_nothing_is_left_at_the_end(places, server):
    """The last test of this server: SIGTERM ends it with 0, and its folder of uploads is gone."""
    folders = [path for path in places[0].iterdir() if path.is_dir()]
    assert folders
    assert server.stop() == 0 and server.lines[-1] == "stopped", server.lines
    assert [path for folder in folders for path in folder.rglob("*") if path.is_file()] == []
    assert not any("Traceback" in line for line in server.lines), server.lines


def test_a_password(scene, tmp_path):
    (tmp_path / "auth").write_text("me:secret word\n")
    with serving("--auth", f"@{tmp_path / 'auth'}") as server:
        with Visitor(server.url) as nobody:
            assert nobody.client.get("/health").status_code == 200
            for path in ("/", "/metrics", "/gradio_api/info", "/config"):
                assert nobody.client.get(path).status_code == 401
            with pytest.raises(AppError, match="401"):
                nobody.upload(scene[0])
            wrong = base64.b64encode(b"me:secret").decode()
            assert nobody.client.get("/", headers={"Authorization": f"Basic {wrong}"}).status_code == 401
        with Visitor(server.url, auth=("me", "secret word")) as visitor:
            assert visitor.call("segment", visitor.upload(scene[0]), {})[0]["segments_info"]
            assert numbers(visitor)['ldmseg_rejected_total{reason="auth"}'] == 6
            event = visitor.start("segment", visitor.upload(scene[0]), {"steps": 1000, "size": 512})
            with ThreadPoolExecutor() as threads:
                waiting = threads.submit(visitor.result, "segment", event)
                time.sleep(1)
                assert server.stop(signal.SIGINT) == 0
                with pytest.raises(AppError, match=r"^the app is ending: nothing more is done$"):
                    waiting.result(60)
        assert not any("Traceback" in line for line in server.lines), server.lines
        assert not any("secret" in line for line in server.lines)


def test_a_port_in_use_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "ldmseg_fast.cli", "app", "--port", str(port)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and f"--port {port} on 127.0.0.1" in done.stderr
    assert "is free" in done.stderr


@pytest.mark.soak
def test_eight_clients_lose_nothing(record_property, tmp_path):
    command = [sys.executable, "benchmarks/bench_app.py", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    record = json.loads(next(tmp_path.glob("app-*.json")).read_text())
    row = next(row for row in record["results"] if "p95" in row)
    record_property("ms p95", row["p95"])
