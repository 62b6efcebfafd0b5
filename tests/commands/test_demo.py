"""`make demo` in next to no time: the whole path under DeepSpeed, and a second run that finds nothing to do."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ldmseg_fast import cli
from ldmseg_fast.commands.runs import find_runs

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--scenes", "16", "--images", "8", "--ranks", "2"]


@pytest.mark.serial
def test_the_whole_path_and_its_report(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), *SMALL, "--minutes", "0.01", "--autoencoder-steps", "2"]
    assert cli.main(["demo", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    parts = ["shipped model", "scenes", "autoencoder", "diffusion", "evaluation"]
    assert [line.partition(":")[0] for line in lines if line] == [*parts, "PQ", "report"]  # a line a part
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6  # both models' segments; curves and pictures of both trainings
    assert "one segment" in page and "halves" in page and "grid 3x3" in page and "precision" in page
    assert not re.search(r"(?:src|href)=\"http", page)
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["images"] == 8
    assert json.loads((tmp_path / "shipped.json").read_text())["class_agnostic"]["pq"] > 20
    assert len(list((tmp_path / "shipped" / "panoptic").glob("*.png"))) == 8
    assert "launch" in (tmp_path / "diffusion.log").read_text()
    runs = {run.name: run for run in find_runs(tmp_path)}
    assert runs["autoencoder"].step == 2  # that many steps were asked for
    assert 1 <= runs["diffusion"].step < 3000  # its time was over
    assert {run.state for run in runs.values()} == {"finished"}
    assert all(run.best_pq is not None for run in runs.values())

    assert cli.main(["demo", *arguments]) == 0
    assert capsys.readouterr().out.count("done before") == 5  # every part of it


@pytest.mark.parametrize("option", ["--minutes", "--scenes", "--images", "--ranks"])
def test_nonsense_is_refused(option, tmp_path, capsys):
    assert cli.main(["demo", "--out", str(tmp_path / "out"), option, "0"]) == 2
    assert capsys.readouterr().err == f"error: {option} 0{'.0' if option == '--minutes' else ''}: must be positive\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\0\0", b"5", b"[]", b"\xff", b'{"done": 5}', b'{"done": {"scenes": {"seconds": 1}}}'),
        *(b'{"done": {"scenes": {"seconds": "1", "processor_seconds": 1}}}', b'{"minutes": {"diffusion": null}}'),
    ],
)
def test_damaged_progress_is_named(content, tmp_path, capsys):
    (tmp_path / "progress.json").write_bytes(content)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'progress.json'}: damaged, or no demo's")
    assert (tmp_path / "progress.json").read_bytes() == content


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_same_command_goes_on_after_an_interruption(number, tmp_path):
    """Of the demo's own process alone: a training that SIGKILL leaves behind is waited for."""
    out, records = tmp_path / "out", tmp_path / "out" / "autoencoder" / "logs" / "log.jsonl"
    command = [sys.executable, "-m", "ldmseg_fast.cli", "demo", "--out", str(out), *SMALL]
    command += ["--autoencoder-steps", "12", "--diffusion-steps", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as first:
        while not records.is_file() or not records.read_text():
            assert first.poll() is None
            time.sleep(0.2)
        first.send_signal(number)
        said = first.communicate()[1]
    assert first.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert number == signal.SIGKILL or "the same command goes on from here" in said
    before = next(run for run in find_runs(out) if run.name == "autoencoder")
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert again.stdout.startswith("shipped model: done before")
    (autoencoder,) = (run for run in find_runs(out) if run.name == "autoencoder")
    assert autoencoder.state == "finished" and autoencoder.step == 12
    starts = [json.loads(line) for line in (out / "autoencoder" / "logs" / "starts.jsonl").read_text().splitlines()]
    # what SIGKILL left behind came to its end, and the second start found nothing left to do
    assert [start["step"] for start in starts] == ([0, 12] if number == signal.SIGKILL else [0, before.checkpoint])
