"""What interrupted jobs recorded before an option existed still goes on: its default leaves no trace."""

import pytest

from ldmseg_fast.cli import main
from ldmseg_fast.commands import predict, shared_job
from ldmseg_fast.evaluation import EvaluationOptions


@pytest.fixture
def settings_of(model_dir, tmp_path, monkeypatch):
    """The settings that a job records."""
    found = []
    picture = tmp_path / "a.png"
    picture.write_bytes(b"")

    def run_job(args, command, check, find, settings, *more):
        found.append(settings())
        return 0

    for module in (shared_job, predict):  # which of them the command looks it up in
        monkeypatch.setattr(module, "run_job", run_job, raising=False)

    def record(command, *options):
        inputs = {
            "predict": [str(picture)],
            "inpaint": ["--image", str(picture), "--map", str(picture), "--unknown-id", "0"],
        }[command]
        assert main([command, str(model_dir), *inputs, "--out", str(tmp_path / "out"), *options]) == 0
        return found.pop()

    return record


def test_predict(settings_of):
    plain = settings_of("predict")
    assert (plain["fusion"], plain["edges"]) == ("medoid", 0)
    assert settings_of("predict", "--edges", "2") == settings_of("predict", "--fusion", "mean", "--edges", "2")


def test_inpaint(settings_of):
    assert "edges" not in settings_of("inpaint")
    assert settings_of("inpaint", "--edges", "2")["edges"] == 2


def test_evaluate():
    assert EvaluationOptions().fusion == "medoid" and EvaluationOptions(edges=2).fusion == "mean"
