"""What a run's settings come to on the machine that trains it, and that they stay so after a move."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldmseg_fast.config import Config, load_config, precision
from ldmseg_fast.config.precision import resolve_precision
from ldmseg_fast.distributed.liveness import Interrupt
from ldmseg_fast.errors import ConfigError
from ldmseg_fast.training.estimate import dry_run
from ldmseg_fast.training.loop import Run, train
from ldmseg_fast.training.machine import resolve_settings

Settings = Callable[..., Config]
CPU = torch.device("cpu")


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """`processor(True)`: from here on this one has bfloat16 units."""

    def become(units: bool) -> None:
        resolve_precision.cache_clear()
        monkeypatch.setattr(precision, "has_units", lambda device_type, dtype: units or dtype == torch.float32)
        monkeypatch.setattr(precision, "slowdown", lambda dtype: 9.0)

    become(True)
    yield become
    resolve_precision.cache_clear()


@pytest.mark.parametrize("preset", ["tiny", "coco"])
def test_presets_leave_the_precision_to_the_machine(preset: str) -> None:
    assert load_config(preset).train.precision == "auto"


@pytest.mark.parametrize(("units", "found"), [(True, "bf16"), (False, "fp32")])
def test_a_run_says_and_records_its_precision(
    units: bool, found: str, processor: Callable, settings: Settings, capfd: pytest.CaptureFixture
) -> None:
    processor(units)
    run = Run("autoencoder", settings("run", "train.precision=auto"), Interrupt())
    run.close()
    said = {True: "has bf16 units)", False: "emulates bf16: a small network takes 9 times as long as in fp32)"}[units]
    assert f"precision: {found} (this CPU {said}" in capfd.readouterr().err
    assert (
        run.config.train.precision
        == found
        == json.loads((run.folder / "config.json").read_text())["train"]["precision"]
    )
    assert f"train.precision={found}" in (run.folder / "settings.txt").read_text().splitlines()
    assert run.stage.compute_dtype == precision.DTYPES[found]


@pytest.mark.parametrize(("began", "first"), [(True, "bf16"), (False, "fp32")])
def test_a_run_that_moves_keeps_its_precision(
    began: bool, first: str, processor: Callable, settings: Settings, capfd: pytest.CaptureFixture
) -> None:
    """As if a run began on one kind of processor and went on on the other."""
    config = settings("run", "train.precision=auto", "train.steps=2", "train.save_every=1", "data.val_limit=1")
    processor(began)
    train("autoencoder", config)
    processor(not began)
    run = Run("autoencoder", config, Interrupt(), resume=True)
    run.close()
    assert run.config.train.precision == first
    assert f"precision: {first} (as the run began" in capfd.readouterr().err
    again = Run("autoencoder", settings("run", "train.precision=fp32"), Interrupt(), resume=True)
    again.close()
    assert again.config.train.precision == "fp32"  # what is asked for goes first


@pytest.mark.parametrize("recorded", [None, {}, {"train": {"precision": "auto"}}])
def test_a_run_without_a_record_asks_the_machine(recorded: dict | None, processor: Callable, tmp_path: Path) -> None:
    if recorded is not None:
        (tmp_path / "config.json").write_text(json.dumps(recorded))
    assert resolve_settings(load_config("tiny"), CPU, tmp_path)[0].train.precision == "bf16"


def test_one_rank_that_emulates_decides_for_all(processor: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = ("fp32", "this CPU emulates bf16")
    monkeypatch.setattr("ldmseg_fast.distributed.gather_objects", lambda value: [value, slow, value])
    config, line = resolve_settings(load_config("tiny"), CPU, None)
    assert config.train.precision == "fp32" and line == "precision: fp32 (this CPU emulates bf16)"


@pytest.mark.parametrize("units", [True, False])
def test_a_dry_run_shows_the_precision(units: bool, processor: Callable) -> None:
    processor(units)
    lines = dry_run("autoencoder", load_config("tiny"), None)
    assert f"train.precision={'bf16' if units else 'fp32'}" in lines
    assert any(line.startswith("precision: ") for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_attention_that_needs_a_gpu_is_refused_when_training_starts(settings: Settings) -> None:
    config = settings("run", "model.attention=triton")  # which a dry run of a GPU's settings may still say
    assert dry_run("autoencoder", config, None)
    with pytest.raises(ConfigError, match=r"model\.attention=triton needs a GPU .* use model\.attention=auto"):
        Run("autoencoder", config, Interrupt())


def test_attention_that_is_not_installed_is_refused(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"model\.attention=xformers: pip install 'ldmseg_fast\[xformers\]'"):
        resolve_settings(settings("run", "model.attention=xformers"), CPU, None)


@pytest.mark.parametrize(
    ("recorded", "asked", "kept"),
    [
        ({"scheduler": {"loss_weighting": "fixed"}}, "fixed", "constant"),
        ({"scheduler": {"loss_weighting": "inverse_log_snr"}}, "inverse_log_snr", "inverse_log1p_snr"),
        ({"settings_version": 2, "scheduler": {"loss_weighting": "constant"}}, "fixed", "constant"),
        ({"settings_version": 2, "scheduler": {"loss_weighting": "fixed"}}, "fixed", "fixed"),
        ({"scheduler": {"loss_weighting": "linear"}}, "linear", "linear"),
    ],
)
def test_a_run_of_before_keeps_its_loss_weights(recorded: dict, asked: str, kept: str, tmp_path: Path) -> None:
    """Two names of weights mean the original's now; a run that began under the old meaning goes on with it."""
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    config = load_config("tiny", [f"scheduler.loss_weighting={asked}", "train.precision=fp32"])
    found, _ = resolve_settings(config, torch.device("cpu"), tmp_path)
    assert found.scheduler.loss_weighting == kept
    assert resolve_settings(config, torch.device("cpu"), None)[0].scheduler.loss_weighting == asked


def test_a_fixed_weight_needs_its_mode() -> None:
    with pytest.raises(ConfigError, match=r"fixed_weight=0\.3 goes with scheduler\.loss_weighting=constant"):
        load_config("tiny", ["scheduler.fixed_weight=0.3", "scheduler.loss_weighting=fixed"])
