"""Ctrl-C and SIGTERM end a command in one line, and leave nothing half written."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ldmseg_fast import cli
from ldmseg_fast.distributed.ending import run_command
from ldmseg_fast.files import replacing, replacing_folder
from ldmseg_fast.locks import only_writer
from ldmseg_fast.stopping import Terminated, terminable

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def default_handler():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    assert signal.signal(signal.SIGTERM, before) is signal.SIG_DFL, "the handler is put back"


def write_until_stopped(folder: str | Path) -> None:
    folder = Path(folder)
    with only_writer(folder / "out", "a test", "wait"), replacing(folder / "file") as file:
        file.write_text("half")
        with replacing_folder(folder / "folder") as new:
            (new / "part").touch()
            signal.raise_signal(signal.SIGTERM)


def test_sigterm_clears_what_was_being_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ldmseg_fast.commands.data_check.check_folder", write_until_stopped)
    assert cli.main(["data", "check", str(tmp_path)]) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM\n" and not list(tmp_path.iterdir())
    assert run_command(lambda: write_until_stopped(tmp_path)) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM\n" and not list(tmp_path.iterdir())


def test_a_second_sigterm_does_not_disturb_the_clearing():
    cleared = False
    with pytest.raises(Terminated), terminable():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleared = True
    assert cleared


def test_a_forked_process_ends_at_once():
    with terminable():
        child = os.fork()
        if child == 0:
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_other_handlers_and_other_threads_stay_as_they_are():
    def own(number, frame):
        raise AssertionError

    signal.signal(signal.SIGTERM, own)
    with terminable():
        assert signal.getsignal(signal.SIGTERM) is own
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    found = []

    def look():
        with terminable():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


@pytest.mark.parametrize(
    ("error", "code", "word"), [(KeyboardInterrupt, 130, "interrupted"), (Terminated, 143, "stopp")]
)
def test_a_signal_while_a_command_is_imported(monkeypatch, capsys, error, code, word):
    def stopped(name):
        raise error

    monkeypatch.setattr(cli.importlib, "import_module", stopped)
    monkeypatch.delitem(sys.modules, "ldmseg_fast.distributed.ending")
    assert cli.main(["data", "check", "x"]) == code
    assert capsys.readouterr().err.startswith(word)
    assert "ldmseg_fast.distributed.ending" not in sys.modules, "torch may be imported in part, and is let alone"


@pytest.mark.parametrize("script", ["export/to_onnx.py", "benchmarks/bench_latency.py", "ldmseg_fast/train.py"])
def test_ctrl_c_while_a_script_imports_torch(script, tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    code = f"import runpy, sys; sys.path[:0] = [{str((ROOT / script).parent)!r}, {str(tmp_path)!r}]\n"
    code += f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stderr) == (-signal.SIGINT, "interrupted\n")
