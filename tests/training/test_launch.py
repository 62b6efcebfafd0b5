"""A training that was started from another process: its bar, its log, and how it is stopped, waited for and gone on."""

import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

from ldmseg_fast.training import launch
from ldmseg_fast.training.launch import launch_training

ROOT = Path(__file__).resolve().parents[2]
# logs a step each tenth of a second; SIGTERM makes it save, which takes a while
TRAINING = """
import json, pathlib, signal, sys, time
folder, steps, code = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
def save(*_):
    time.sleep(0.5)
    (folder / "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
(folder / "logs").mkdir(parents=True, exist_ok=True)
print("chatter on stdout", flush=True)
print("chatter on stderr", file=sys.stderr, flush=True)
for step in range(1, steps + 1):
    with (folder / "logs" / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": step, "loss": 2.5, "seconds": 0.1 * step}) + "\\n")
    (folder / "running").touch()
    time.sleep(0.1)
sys.exit(code)
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Takes the place of `train.py`; its arguments are the settings."""
    path = tmp_path / "training.py"
    path.write_text(TRAINING)
    monkeypatch.setattr(launch, "PERIOD", 0.05)
    monkeypatch.setattr(launch, "_command", lambda stage, folder, settings, *_: command(path, folder, *settings))
    return path


def command(script: Path, folder: Path, *settings: str) -> list[str]:
    return [sys.executable, str(script), str(folder), *settings]


def test_the_command_of_a_start_and_of_going_on(tmp_path: Path) -> None:
    words = launch._command("diffusion", tmp_path, ["train.steps=3"], 2, 1.5)
    assert words[-5:] == [str(launch.TRAIN), "diffusion", "train.steps=3", f"output_dir={tmp_path}", words[-1]]
    assert words[-1] == "train.max_minutes=1.5000" and words[words.index("--num_gpus") + 1] == "2"
    (tmp_path / "checkpoints" / "step-00000025").mkdir(parents=True)
    assert "--resume" not in launch._command("diffusion", tmp_path, [], 2, 1.5)  # killed while it was written
    (tmp_path / "checkpoints" / "step-00000025" / "manifest.json").touch()
    assert "--resume" in launch._command("diffusion", tmp_path, [], 2, 1.5)


def test_chatter_goes_to_the_log_and_nothing_to_a_pipe(script: Path, tmp_path: Path, capfd) -> None:
    launch_training("autoencoder", tmp_path / "run", ["3", "0"], 1, 0.01)
    assert capfd.readouterr() == ("", "")
    assert sorted((tmp_path / "run.log").read_text().splitlines()) == ["chatter on stderr", "chatter on stdout"]


def test_a_terminal_shows_one_clean_bar(script: Path, tmp_path: Path) -> None:
    program = (
        f"import sys; from pathlib import Path; from tests.training.test_launch import command, launch\n"
        f"launch.PERIOD, script = 0.05, Path({str(script)!r})\n"
        f"launch._command = lambda stage, folder, *_: command(script, folder, '8', '0')\n"
        f"launch.launch_training('autoencoder', Path({str(tmp_path / 'run')!r}), [], 1, 1.0 / 60)"
    )
    own, other = pty.openpty()
    termios.tcsetwinsize(other, (24, 100))
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=other, stderr=other) as process:
        os.close(other)
        shown = b""
        try:
            while part := os.read(own, 4096):
                shown += part
        except OSError:  # Linux says so when the other end is closed
            pass
    os.close(own)
    assert process.returncode == 0
    text = shown.decode()
    assert "chatter" not in text and "autoencoder:" in text
    assert "left, starting" in text and "left, step " in text and "loss 2.500" in text
    assert text.strip().count("\n") == 0  # it is drawn in one place


def test_a_failure_shows_the_end_of_the_log(script: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"(?s)exit code 3: .*run\.log\n.*chatter on std"):
        launch_training("autoencoder", tmp_path / "run", ["1", "3"], 1, 0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_training_which_saves(number: int, script: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def interrupt() -> None:
        while not (folder / "running").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    # a shell's job in the background starts with SIGINT ignored
    handlers = {signal.SIGTERM: lambda *_: sys.exit(143), signal.SIGINT: signal.default_int_handler}
    before = {each: signal.signal(each, handler) for each, handler in handlers.items()}
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            launch_training("autoencoder", folder, ["600", "0"], 1, 1.0)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        thread.join()
    assert (folder / "saved").exists()  # and it was waited for


def test_what_a_killed_start_left_is_waited_for(script: Path, tmp_path: Path) -> None:
    """Two trainings in one folder would destroy each other's checkpoints."""
    with (tmp_path / "run.log").open("a") as log:
        assert launch._lock(log)
        left = subprocess.Popen(command(script, tmp_path / "run", "10", "0"), stdout=log, stderr=log)
    start = time.monotonic()
    launch_training("autoencoder", tmp_path / "run", ["1", "0"], 1, 0.1)
    assert left.poll() == 0 and time.monotonic() - start > 0.5
