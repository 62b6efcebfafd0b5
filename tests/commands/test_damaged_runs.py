"""What a disk or a hand has done to a run's files ends no list of runs, and is one error where the file is needed."""

import json
import shutil
from pathlib import Path

import pytest

from ldmseg_fast.cli import main
from ldmseg_fast.config import load_config, to_dict

GOOD = '{"step": 2, "loss": 0.5, "seconds": 3.0}\n{"step": 2, "val/pq": 40.0}\n'
LINES = [
    '{"step": NaN, "loss": NaN}', '{"step": {}, "loss": []}', '{"step": 3, "loss": "x", "val/pq": {}}', "{}", "[1]",
    '{"step": -5, "loss": 1.0}', '{"step": true}', '{"step": 3, "seconds": "1", "val/sq": null, "cpu_seconds": "y"}',
]  # fmt: skip
NO_SETTINGS = [
    b"",
    b"[]",
    b"null",
    b"3",
    b"{}",
    b'{"stage": 3}',
    b'{"model": 5, "data": [], "train": null}',
    b"[" * 9999,
]


@pytest.fixture
def run(model_dir: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "one"
    shutil.copytree(model_dir, folder)
    settings = {"stage": "diffusion"} | to_dict(load_config("tiny", ["data.root=scenes"]))
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "checkpoints" / "step-new").mkdir(parents=True)
    (folder / "checkpoints" / "step-new" / "manifest.json").write_text("{}")
    (folder / "logs").mkdir()
    (folder / "logs" / "log.jsonl").write_text(GOOD)
    return folder


@pytest.mark.parametrize("line", LINES)
def test_of_a_log_what_is_sound_counts(run: Path, tmp_path: Path, line: str, capsys: pytest.CaptureFixture) -> None:
    (run / "logs" / "log.jsonl").write_text(f"{line}\n{GOOD}{line}\n")
    (run / "logs" / "starts.jsonl").write_text('{"machine": 3, "ranks": "x"}\n{}\n')
    assert main(["runs", str(run.parent), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["step"], found["loss"], found["best_pq"], found["checkpoint"]) == (2, 0.5, 40.0, None)
    (run / "settings.txt").write_bytes(b"\xff\xfe")
    assert main(["report", str(run)]) == 0
    assert main(["ship", str(run), str(tmp_path / "shipped")]) == 0
    assert "40.0" in (tmp_path / "shipped" / "README.md").read_text()


@pytest.mark.parametrize("content", NO_SETTINGS, ids=lambda content: content[:20])
def test_settings_that_are_none(run: Path, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(run, run.parent / "two")
    (run / "config.json").write_bytes(content)
    assert main(["runs", str(run.parent)]) == 0
    assert "two" in capsys.readouterr().out
    assert main(["ship", str(run), str(tmp_path / "shipped")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {run / 'config.json'}: ")
    assert not (tmp_path / "shipped").exists()
